"""The identities of the algorithm that every change must keep.

Numbers are those of the list in the specification. 9, that micro-batches,
packing, order and devices do not matter, is in `test_update`; 10, that a
seed decides a rollout, is in the sampler's tests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import advantages as oracle
from rules import RULES
from trajectories import group, random_trajectory, task

from mgrpo_jax import (
    advantages,
    alignment,
    importance,
    losses,
    objectives,
    packing,
    rewards,
    update,
)
from mgrpo_jax.types import Alignment, Prediction, TrainBatch

SHAPE = (2, 4, 3)
NORMALISERS = (
    advantages.per_task,
    advantages.mean_only,
    advantages.leave_one_out,
    advantages.other_rollouts,
    advantages.per_call_index,
    advantages.per_batch,
)
PER_TASK = NORMALISERS[:3]
SCALED = (  # by the standard deviation, so free of the rewards' unit
    advantages.per_task,
    advantages.per_call_index,
    advantages.per_batch,
)
STRATEGIES = (
    alignment.duplicate_or_drop,
    alignment.mask,
    alignment.inverse_count,
)
RATIOS = (losses.token_ratio, losses.sequence_ratio, losses.geometric_ratio)
AGGREGATIONS = (
    losses.token_mean,
    losses.sequence_mean_token_mean,
    losses.sequence_mean_token_sum,
    functools.partial(losses.sequence_mean_token_sum_norm, max_tokens=8.0),
)
LOSS = objectives.PolicyLoss(
    ratio=losses.token_ratio,
    aggregation=losses.sequence_mean_token_mean,
    clip_low=0.2,
    clip_high=0.2,
    kl=losses.kl_k3,
    kl_coefficient=0.1,
    importance=importance.by_token,
    importance_cap=2.0,
)
PURE = dataclasses.replace(LOSS, kl=None, kl_coefficient=0.0, importance=None)


@functools.cache
def jitted(function):
  return jax.jit(function)


def compute(normaliser, values, weights):
  return np.asarray(
      jitted(normaliser)(np.float32(values), np.float32(weights)), np.float64
  )


def table(elements, shape=SHAPE):
  size = int(np.prod(shape))
  return st.lists(elements, min_size=size, max_size=size).map(
      lambda values: np.array(values, np.float64).reshape(shape)
  )


# Multiples of 1/16 up to 4: float32 adds and subtracts them exactly.
REWARDS = table(st.integers(-64, 64).map(lambda n: n / 16))
WEIGHTS = table(st.sampled_from([0.0, 0.25, 1.0, 2.0]))
ROUNDING = dict(rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@given(REWARDS, WEIGHTS, st.integers(-64, 64))
@settings(max_examples=25, deadline=None)
def test_1_a_constant_leaves_advantages_unchanged(
    normaliser, values, weights, constant
):
  np.testing.assert_allclose(
      compute(normaliser, values + constant, weights),
      compute(normaliser, values, weights),
      **ROUNDING,
  )


@pytest.mark.parametrize("normaliser", NORMALISERS)
@given(REWARDS, WEIGHTS, st.sampled_from([1e-12, 1 / 3, 7.0, 1e12]))
@settings(max_examples=25, deadline=None)
def test_1_so_does_a_scale(normaliser, values, weights, scale):
  expected = compute(normaliser, values, weights)
  unit = 1.0 if normaliser in SCALED else scale
  np.testing.assert_allclose(
      compute(normaliser, values * scale, weights) / unit,
      expected,
      **ROUNDING,
  )


@pytest.mark.parametrize("normaliser", PER_TASK)
@given(REWARDS, WEIGHTS, st.permutations(range(12)))
@settings(max_examples=25, deadline=None)
def test_2_permuting_a_group_permutes_the_result(
    normaliser, values, weights, order
):
  def permuted(x):
    return x.reshape(2, 12)[:, order].reshape(SHAPE)

  np.testing.assert_allclose(
      compute(normaliser, permuted(values), permuted(weights)),
      permuted(compute(normaliser, values, weights)),
      **ROUNDING,
  )


@pytest.mark.parametrize("normaliser", NORMALISERS)
@given(REWARDS, WEIGHTS, st.permutations(range(4)))
@settings(max_examples=25, deadline=None)
def test_2_so_does_permuting_its_rollouts(normaliser, values, weights, order):
  np.testing.assert_allclose(
      compute(normaliser, values[:, order], weights[:, order]),
      compute(normaliser, values, weights)[:, order],
      **ROUNDING,
  )


@pytest.mark.parametrize("normaliser", NORMALISERS)
@given(st.floats(-1e6, 1e6, width=32), WEIGHTS)
@settings(max_examples=25, deadline=None)
def test_3_equal_rewards_give_zeros(normaliser, reward, weights):
  found = compute(normaliser, np.full(SHAPE, reward), weights)
  np.testing.assert_array_equal(found, 0.0)


def assign(groups, scores, role, strategy, num_slots):
  calls = rewards.by_role(groups, scores, role=role, max_calls=3)
  run = jitted(functools.partial(strategy, num_slots=num_slots))
  aligned = run(jax.random.key(0), calls.num_calls)
  slots = np.take_along_axis(calls.rewards, np.asarray(aligned.index), axis=2)
  gains = jitted(advantages.per_task)(slots, aligned.weight)
  return packing.fold(calls.calls, aligned, np.asarray(gains))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_4_a_team_without_calls_is_a_single_agent(strategy):
  rng = np.random.default_rng(0)
  texts = [["Lima", "Quito", "Lima", "Lima"], ["Rome", "Lima", "?", "Quito"]]
  groups = [
      group(
          task(answers=("Lima",)),
          [
              random_trajectory(rng, 6, 9, rollout=k, result_text=text)
              for k, text in enumerate(row)
          ],
          4,
      )
      for row in texts
  ]
  weights = rewards.RewardWeights(format=0.1, correct=0.9, expert=0.0)
  scores = [
      rewards.score(g, weights={"main": weights}, rules=RULES) for g in groups
  ]
  assert assign(groups, scores, "researcher", strategy, 3) == ()
  found = assign(groups, scores, "main", strategy, 1)
  # GRPO as for one agent: K rewards of a task, standardised.
  right = np.array([[text == "Lima" for text in row] for row in texts])
  expected = oracle.per_task((0.1 + 0.9 * right)[..., None], np.ones((2, 4, 1)))
  assert [credit.weight for credit in found] == [1.0] * 8
  np.testing.assert_allclose(
      [credit.advantage for credit in found], expected.ravel(), rtol=1e-5
  )
  flat = [t for g in groups for t in g.trajectories]
  assert all(c.trajectory is t for c, t in zip(found, flat, strict=True))


def bigram(params, tokens, positions, segment_ids, *, wanted):
  logits = jax.nn.log_softmax(params[tokens[:, :-1]])
  values = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
  values = jnp.where(positions[:, 1:] > 0, values, 0.0)
  return Prediction(logprobs=jnp.pad(values, ((0, 0), (1, 0))))


PACKED = packing.BatchShape(
    rows=2, row_tokens=40, trajectories=16, row_targets=40
)
PARAMS = np.float32(np.random.default_rng(3).normal(size=(9, 9)))


@functools.cache
def accumulator(objective):
  return jax.jit(
      functools.partial(
          update.accumulate, objective=objective, predict_fn=bigram
      )
  )


def gradient_of(batches, totals, objective):
  gradient = update.Gradient(grads=np.zeros_like(PARAMS), loss=np.float32(0))
  for batch in batches:
    gradient, _ = accumulator(objective)(gradient, PARAMS, batch, totals)
  return jax.device_get(gradient)


def differentiate(credits, objective):
  batches = packing.pack(credits, shape=PACKED)
  return gradient_of(batches, packing.count(credits), objective)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_5_duplicating_every_slot_changes_no_mean(aggregation):
  objective = dataclasses.replace(LOSS, aggregation=aggregation)
  rng = np.random.default_rng(1)
  calls = [
      [tuple(random_trajectory(rng, 5, 9, call=n) for n in range(d))]
      for d in (1, 3)
  ]
  index = np.array([[[0, 0, 0]], [[0, 1, 2]]], np.int32)
  values, weight = rng.normal(size=index.shape), np.float32(index >= 0)
  weight[0, 0, 1:] = 0.0

  def credits(times):
    aligned = Alignment(
        index=np.tile(index, times),
        weight=np.tile(weight, times),
        num_calls=np.array([[1], [3]], np.int32),
    )
    gains = compute(
        advantages.per_batch, np.tile(values, times), aligned.weight
    )
    return packing.fold(calls, aligned, np.float32(gains))

  once, thrice = credits(1), credits(3)
  assert [c.weight for c in thrice] == [3 * c.weight for c in once]
  expected = differentiate(once, objective)
  copies = [
      dataclasses.replace(c, weight=c.weight / 3)
      for c in thrice
      for _ in range(3)
  ]
  for same in (thrice, copies):
    found = differentiate(same, objective)
    np.testing.assert_allclose(found.loss, expected.loss, **ROUNDING)
    np.testing.assert_allclose(found.grads, expected.grads, **ROUNDING)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_5_folded_copies_equal_copies(strategy):
  rng = np.random.default_rng(2)
  num_calls = np.array([[1, 2, 5, 0]], np.int32)
  calls = [
      [
          tuple(
              random_trajectory(rng, 6, 9, rollout=k, call=n) for n in range(d)
          )
          for k, d in enumerate(num_calls[0])
      ]
  ]
  run = jitted(functools.partial(strategy, num_slots=3))
  aligned = jax.device_get(run(jax.random.key(4), num_calls))
  values = rng.normal(size=(1, 4, 5))
  slots = np.take_along_axis(values, aligned.index, axis=2)
  gains = np.float32(compute(advantages.per_task, slots, aligned.weight))
  copies = [
      packing.Credit(
          trajectory=calls[0][k][aligned.index[0, k, slot]],
          advantage=float(gains[0, k, slot]),
          weight=float(aligned.weight[0, k, slot]),
      )
      for k in range(4)
      for slot in range(3)
      if aligned.weight[0, k, slot] > 0
  ]
  folded = packing.fold(calls, aligned, gains)
  if strategy is alignment.duplicate_or_drop:
    assert len(folded) == 1 + 2 + 3 < len(copies)
  found, expected = (differentiate(c, LOSS) for c in (folded, copies))
  np.testing.assert_allclose(found.loss, expected.loss, **ROUNDING)
  np.testing.assert_allclose(found.grads, expected.grads, **ROUNDING)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_6_garbage_where_nothing_counts_changes_nothing(ratio, garbage):
  objective = dataclasses.replace(LOSS, ratio=ratio)
  rng = np.random.default_rng(5)
  credits = [
      packing.Credit(
          trajectory=random_trajectory(rng, int(n), 9),
          advantage=float(np.float32(rng.normal())),
          weight=1.0,
      )
      for n in rng.integers(3, 12, 8)
  ]
  totals = packing.count(credits)
  (batch,) = packing.pack(credits, shape=PACKED)
  dirty = jax.tree.map(np.copy, batch)
  padding = batch.segment_ids == 0
  dirty.tokens[padding] = rng.integers(0, 9, padding.sum())
  for logprobs in (
      dirty.sampler_logprobs,
      dirty.old_logprobs,
      dirty.ref_logprobs,
  ):
    logprobs[batch.loss_mask == 0] = garbage
  unused = batch.weight == 0
  assert unused.any() and (batch.context_mask > 0).any()
  dirty.advantage[unused] = garbage
  # A slot of weight 0 may even claim to have sampled tokens.
  dirty.loss_mask[unused] = 1.0
  dirty.sampler_logprobs[unused] = garbage
  dirty.old_logprobs[unused] = garbage
  clean = gradient_of([batch], totals, objective)
  found = gradient_of([dirty], totals, objective)
  np.testing.assert_array_equal(found.loss, clean.loss)
  np.testing.assert_array_equal(found.grads, clean.grads)
  assert np.isfinite(clean.grads).all() and clean.grads.any()


def batch_of(logprobs, mask, gains, weight):
  """A micro-batch that only the loss function looks at."""
  fields = {
      field.name: np.zeros((), np.float32)
      for field in dataclasses.fields(TrainBatch)
  }
  return TrainBatch(
      **{
          **fields,
          "loss_mask": np.float32(mask),
          "old_logprobs": np.float32(logprobs),
          "sampler_logprobs": np.float32(logprobs),
          "advantage": np.float32(gains),
          "weight": np.float32(weight),
      }
  )


@functools.cache
def slope(objective):
  def loss(logprobs, batch, totals):
    return objective(Prediction(logprobs=logprobs), batch, totals)[0]

  return jax.jit(jax.grad(loss))


ROWS = (3, 5)
PER_TOKEN = table(st.floats(-5.0, -0.01), ROWS)
MASKS = table(st.sampled_from([0.0, 1.0]), ROWS)
PER_ROW = table(st.floats(-2.0, 2.0), (3,))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("clip", [0.0, 0.2])
@given(PER_TOKEN, MASKS, PER_ROW)
@settings(max_examples=20, deadline=None)
def test_7_a_ratio_of_one_gives_the_reinforce_gradient(
    ratio, clip, logprobs, mask, gains
):
  objective = dataclasses.replace(
      PURE, ratio=ratio, clip_low=clip, clip_high=clip
  )
  weight = np.array([1.0, 2.0, 0.0])
  lengths = np.maximum(mask.sum(1), 1)
  totals = losses.Totals(
      trajectories=np.float32(3),
      tokens=np.float32((weight * mask.sum(1)).sum()),
      context_tokens=np.float32(0),
  )
  found = slope(objective)(
      np.float32(logprobs), batch_of(logprobs, mask, gains, weight), totals
  )
  # -A ∇log π: of the whole trajectory for its product, else a token's mean.
  per_token = 1.0 if ratio is losses.sequence_ratio else 1 / lengths
  expected = -(weight / 3 * gains * per_token)[:, None] * mask
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@given(PER_TOKEN, PER_TOKEN)
@settings(max_examples=50, deadline=None)
def test_8_k3_is_positive_and_zero_at_equality(logprobs, ref):
  k3 = jitted(losses.kl_k3)
  assert (np.asarray(k3(np.float32(logprobs), np.float32(ref))) >= 0).all()
  same = np.asarray(k3(np.float32(ref), np.float32(ref)))
  np.testing.assert_array_equal(same, 0.0)
