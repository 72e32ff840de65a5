"""One policy in training."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from trajectories import begun_alike, random_credits

from mgrpo_jax import losses, objectives, optim, packing, update
from mgrpo_jax.learner import Learner
from mgrpo_jax.policy import logprobs
from mgrpo_jax.policy import params as policy_params
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.testing.sizes import tiny_config

CONFIG = tiny_config(vocab_size=11, num_layers=1, mlp_dim=16)
SHAPE = packing.BatchShape(
    rows=2, row_tokens=16, trajectories=4, row_targets=16, least_shared=0
)
TEMPERATURE = 0.7  # not 1: a trainer that forgets to divide by it is seen
CREDITS = random_credits([7, 16, 3], vocab_size=11, weights=(1.0,))
REGULARISED = objectives.PolicyLoss(
    ratio=losses.token_ratio,
    aggregation=losses.token_mean,
    clip_low=0.2,
    clip_high=0.2,
    kl=losses.kl_k2,
    kl_coefficient=0.1,
    importance=None,
    importance_cap=1.0,
    surrogate=losses.clipped_surrogate,
    entropy_coefficient=0.0,
    critic=None,
)
FLOAT32 = dict(rtol=1e-5, atol=1e-5)  # nats; of programs compiled apart


@functools.cache
def weights(seed):
  init = jax.jit(policy_params.init, static_argnums=1)
  return init(jax.random.key(seed), CONFIG)


def learner_arguments(**changes):
  arguments = dict(
      lora=None,
      shape=SHAPE,
      optimizer=optim.AdamW(
          b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
      ),
      temperature=TEMPERATURE,
      reference="first",
      seed=0,
      mesh=None,
  )
  return arguments | changes


def make_learner(**changes):
  return Learner(CONFIG, weights(0), **learner_arguments(**changes))


@functools.cache
def scorer():
  predict_fn = functools.partial(
      logprobs.predict, config=CONFIG, temperature=TEMPERATURE
  )
  return jax.jit(functools.partial(update.score, predict_fn=predict_fn))


def expected(seed, batch):
  """Log-probs of a batch under the weights of a seed."""
  return np.asarray(scorer()(weights(seed), batch).logprobs)


@pytest.fixture
def moved():
  """A learner whose weights are no longer those that it began with."""
  learner = make_learner()
  learner.state = dataclasses.replace(learner.state, params=weights(1))
  return learner


def test_old_logprobs_are_todays_and_the_reference_is_the_first(moved):
  (batch,) = moved.pack(CREDITS, REGULARISED)
  today, first = expected(1, batch), expected(0, batch)
  assert np.abs(today - first).max() > 0.01
  np.testing.assert_allclose(batch.old_logprobs, today, **FLOAT32)
  np.testing.assert_allclose(batch.ref_logprobs, first, **FLOAT32)


def test_without_a_reference_only_old_logprobs_are_scored():
  learner = make_learner(reference="none")
  (batch,) = learner.pack(CREDITS, REGULARISED)
  np.testing.assert_allclose(batch.old_logprobs, expected(0, batch), **FLOAT32)
  np.testing.assert_array_equal(batch.ref_logprobs, batch.sampler_logprobs)


def test_imitation_scores_nothing(moved):
  objective = objectives.ImitationLoss(context_weight=0.1)
  (batch,) = moved.pack(CREDITS, objective)
  np.testing.assert_array_equal(batch.old_logprobs, batch.sampler_logprobs)


def test_an_update_compares_at_the_temperature_of_the_score(moved):
  batches = moved.pack(CREDITS, REGULARISED)
  step = moved.step(
      [(batches, packing.count(CREDITS))],
      objective=REGULARISED,
      learning_rates=[1e-3],
  )
  found = step.metrics()
  # Before the first update a policy is what was scored a moment ago.
  np.testing.assert_allclose(found["ratio_mean"], 1.0, atol=1e-5)
  np.testing.assert_allclose(found["ratio_max"], 1.0, atol=1e-5)
  masks = [one.trajectory.loss_mask for one in CREDITS]
  assert step.tokens == sum(mask.sum() for mask in masks)


def test_rows_share_only_where_no_context_is_read():
  alike = begun_alike(CREDITS, ((6, 0), (7, 0), (5, 0)))
  shape = dataclasses.replace(SHAPE, row_tokens=40, row_targets=20)
  rate, found, after = 1e-3, {}, {}
  for least in (0, 4):
    learner = make_learner(shape=dataclasses.replace(shape, least_shared=least))
    reading = objectives.ImitationLoss(context_weight=0.1)
    (batch,) = learner.pack(alike, reading)
    assert batch.prefix_ids is None
    batches = learner.pack(alike, REGULARISED)
    assert all((one.prefix_ids is not None) == bool(least) for one in batches)
    step = learner.step(
        [(batches, packing.count(alike))],
        objective=REGULARISED,
        learning_rates=[rate],
    )
    found[least] = step.metrics()
    after[least] = learner.state.params
  # All three have five tokens in common, and stand in one row.
  tokens = sum(len(one.trajectory.tokens) for one in alike)
  shared = found[4].pop("shared_tokens")
  assert shared == pytest.approx(2 * 5 / tokens)
  assert found[4].keys() == found[0].keys()
  for name in found[0]:
    np.testing.assert_allclose(found[4][name], found[0][name], **FLOAT32)
  moved_by = jax.tree.map(lambda a, b: np.abs(a - b).max(), *after.values())
  assert max(jax.tree.leaves(moved_by)) < 0.1 * rate


def test_what_cannot_share_is_refused():
  shape = dataclasses.replace(SHAPE, least_shared=4)
  near = dataclasses.replace(CONFIG, windows=(8,))
  with pytest.raises(ValueError, match=r"least_shared must be 0, .* windows"):
    Learner(near, weights(0), **learner_arguments(shape=shape))


def test_an_adapters_reference_is_its_base():
  adapted = LoRA(rank=2, alpha=4.0, targets=("query", "down"))
  learner = make_learner(lora=adapted)
  shifted = jax.tree.map(lambda one: one + 0.3, learner.state.params)
  learner.state = dataclasses.replace(learner.state, params=shifted)
  (batch,) = learner.pack(CREDITS, REGULARISED)
  today = np.asarray(scorer()(learner.weights, batch).logprobs)
  first = expected(0, batch)
  assert np.abs(today - first).max() > 0.01
  np.testing.assert_allclose(batch.old_logprobs, today, **FLOAT32)
  np.testing.assert_allclose(batch.ref_logprobs, first, **FLOAT32)
