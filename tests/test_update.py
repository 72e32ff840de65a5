import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import losses as loss_oracle
from oracles import update as oracle
from trajectories import random_credits

from mgrpo_jax import (
    importance,
    losses,
    metrics,
    objectives,
    optim,
    packing,
    sharding,
    update,
)
from mgrpo_jax.policy import logprobs as policy_logprobs
from mgrpo_jax.policy import params as policy_params
from mgrpo_jax.testing.sizes import tiny_config
from mgrpo_jax.types import Prediction, TrainState

VOCAB = 11
SHAPE = packing.BatchShape(
    rows=3, row_tokens=16, trajectories=8, row_targets=16, least_shared=0
)
# An eps that is not tiny: Adam divides by the root of the second moment, and
# a gradient that is nothing but rounding would become a full step.
ADAMW = dict(b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.01, clip_norm=0.7)
OPTIMIZER = optim.adamw(optim.AdamW(**ADAMW))
RATE = np.float32(0.1)
CLIP = (0.02, 0.03)  # tight, so that geometric ratios meet it too
PLAIN = objectives.PolicyLoss(
    ratio=losses.token_ratio,
    aggregation=losses.token_mean,
    clip_low=CLIP[0],
    clip_high=CLIP[1],
    kl=None,
    kl_coefficient=0.0,
    importance=None,
    importance_cap=2.0,
    surrogate=losses.clipped_surrogate,
    entropy_coefficient=0.0,
    critic=None,
)
RICH = dataclasses.replace(
    PLAIN,
    kl=losses.kl_k3,
    kl_coefficient=0.3,
    importance=importance.by_token,
)
CONFIG = tiny_config(
    vocab_size=VOCAB, num_layers=1, mlp_dim=16, tied_embeddings=False
)


def bigram(params, tokens, positions, segment_ids, *, wanted, prefix_ids):
  """Predicts each token from the one before it, of the same segment."""
  logits = jax.nn.log_softmax(params["table"][tokens[:, :-1]])
  values = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
  values = jnp.where(positions[:, 1:] > 0, values, 0.0)
  return Prediction(logprobs=jnp.pad(values, ((0, 0), (1, 0))))


transformer = functools.partial(
    policy_logprobs.predict, config=CONFIG, temperature=1.0
)


zeros = jax.jit(update.zeros)
apply = jax.jit(functools.partial(update.apply, optimizer=OPTIMIZER))


@functools.cache
def scorer(predict_fn):
  return jax.jit(functools.partial(update.score, predict_fn=predict_fn))


@functools.cache
def accumulator(predict_fn, objective):
  return jax.jit(
      functools.partial(
          update.accumulate, objective=objective, predict_fn=predict_fn
      ),
      donate_argnums=0,
  )


def new_state(params):
  return TrainState(
      params=params,
      opt_state=jax.jit(OPTIMIZER.init)(params),
      step=np.int32(0),
      rng=np.zeros(2, np.uint32),
  )


credits_of = functools.partial(
    random_credits, vocab_size=VOCAB, weights=(0.5, 1.0, 2.0)
)


CREDITS = credits_of([7, 16, 3, 9, 12, 5, 5, 10, 2, 14])


def differentiate(
    params,
    credits,
    *,
    objective,
    predict_fn,
    shape=SHAPE,
    old_params=None,
    totals=None,
):
  """Accumulates over all micro-batches, with old and reference log-probs."""
  score, accumulate = scorer(predict_fn), accumulator(predict_fn, objective)
  totals = packing.count(credits) if totals is None else totals
  gradient, tallies = zeros(params), []
  for batch in packing.pack(credits, shape=shape):
    if old_params is not None:
      old = score(old_params, batch).logprobs
      batch = batch.replace(old_logprobs=old, ref_logprobs=old)
    gradient, tally = accumulate(gradient, params, batch, totals)
    tallies.append(tally)
  return gradient, tallies


def tables(seed=0):
  rng = np.random.default_rng(seed)
  now, old = rng.normal(size=(2, VOCAB, VOCAB))
  # Near enough for some ratios to be clipped and others not.
  return now, now + 0.15 * old


def as_params(table):
  return {"table": np.float32(table)}


def padded(values):
  width = max(map(len, values))
  return np.array([np.pad(v, (0, width - len(v))) for v in values])


CASES = [
    ("token_ratio", "token_mean", RICH),
    ("token_ratio", "sequence_mean_token_sum_norm", PLAIN),
    ("sequence_ratio", "sequence_mean_token_mean", PLAIN),
    ("geometric_ratio", "sequence_mean_token_sum", RICH),
]


@pytest.mark.parametrize("ratio, aggregation, base", CASES)
def test_update_equals_the_oracle(ratio, aggregation, base):
  now, old = tables()
  norm = {"max_tokens": 16.0} if aggregation.endswith("norm") else {}
  objective = dataclasses.replace(
      base,
      ratio=getattr(losses, ratio),
      aggregation=functools.partial(getattr(losses, aggregation), **norm),
  )
  streams = [credit.trajectory.tokens for credit in CREDITS]
  masks = padded([c.trajectory.loss_mask for c in CREDITS])
  sampler = padded([c.trajectory.sampler_logprobs for c in CREDITS])
  weight = np.array([credit.weight for credit in CREDITS])
  gains = np.array([[credit.advantage] for credit in CREDITS]) + 0 * masks
  before = padded([oracle.logprobs(old, tokens) for tokens in streams])

  def loss(values):
    ratios = getattr(loss_oracle, ratio)(values, before, masks)
    per_token = loss_oracle.clipped_surrogate(
        ratios, gains, clip_low=CLIP[0], clip_high=CLIP[1]
    )
    if base is RICH:
      gap = loss_oracle.token_ratio(before, sampler, masks)
      per_token = per_token * np.minimum(gap, 2.0)
      per_token -= 0.3 * loss_oracle.kl_k3(values, before)
    return -getattr(loss_oracle, aggregation)(per_token, masks, weight, **norm)

  values = padded([oracle.logprobs(now, tokens) for tokens in streams])
  slope = oracle.backward(now, streams, oracle.slopes(loss, values))
  gradient, tallies = differentiate(
      as_params(now),
      CREDITS,
      objective=objective,
      predict_fn=bigram,
      old_params=as_params(old),
  )
  np.testing.assert_allclose(gradient.loss, loss(values), rtol=1e-4, atol=1e-6)
  # float32 sums of some 100 terms against float64 differences of step 1e-6.
  size = np.abs(slope).max()
  np.testing.assert_allclose(
      gradient.grads["table"], slope, rtol=1e-3, atol=1e-5 * size
  )
  state, applied = apply(new_state(as_params(now)), gradient, RATE)
  stepped = oracle.first_adamw_step(now, slope, rate=float(RATE), **ADAMW)
  np.testing.assert_allclose(state.params["table"], stepped, atol=2e-5)
  assert state.step == 1 and applied["nonfinite"] == 0
  clipped = update.summarise(tallies, [applied])["clip_fraction"]
  assert 0 < clipped < 1  # both sides of the minimum were at work


@pytest.mark.parametrize("context_weight", [0.0, 0.1])
def test_imitation_equals_the_oracle(context_weight):
  table, _ = tables()
  objective = objectives.ImitationLoss(context_weight=context_weight)
  streams = [credit.trajectory.tokens for credit in CREDITS]
  importance = []
  for credit in CREDITS:
    counts = np.where(credit.trajectory.loss_mask > 0, 1.0, context_weight)
    counts[0] = 0.0
    importance.append(credit.weight * counts)
  total = sum(map(np.sum, importance))
  slope = oracle.backward(table, streams, [-c / total for c in importance])
  values = [oracle.logprobs(table, tokens) for tokens in streams]
  loss = -sum(map(np.dot, importance, values)) / total
  gradient, tallies = differentiate(
      as_params(table), CREDITS, objective=objective, predict_fn=bigram
  )
  np.testing.assert_allclose(gradient.loss, loss, rtol=1e-5)
  np.testing.assert_allclose(
      gradient.grads["table"], slope, rtol=1e-4, atol=1e-7
  )
  summary = update.summarise(tallies, [{"nonfinite": 0, "learning_rate": 0}])
  sampled = [c.trajectory.loss_mask for c in CREDITS]
  nll = -sum(map(np.dot, sampled, values)) / sum(map(np.sum, sampled))
  np.testing.assert_allclose(summary["nll"], nll, rtol=1e-5)


@functools.cache
def transformer_params():
  init = functools.partial(policy_params.init, config=CONFIG)
  return jax.device_get(jax.jit(init)(jax.random.key(0)))


def update_once(params, credits, shape, predict_fn):
  old = jax.tree.map(lambda p: np.float32(p * 1.02), params)
  gradient, _ = differentiate(
      params,
      credits,
      objective=RICH,
      predict_fn=predict_fn,
      shape=shape,
      old_params=old,
  )
  state, applied = apply(new_state(params), gradient, RATE)
  return jax.device_get((state.params, applied))


def assert_same_update(found, expected):
  # float32: sums in another order. Steps are RATE long, gradients of norm
  # about 1; 1e-5 is a hundredth of a percent of a step.
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      found,
      expected,
  )


WHOLE = packing.BatchShape(
    rows=8, row_tokens=16, trajectories=16, row_targets=16, least_shared=0
)


def test_devices_do_not_matter():
  mesh = sharding.make_mesh(
      data=2, fsdp=4, tensor=1, expert=1, devices=jax.devices()[:8]
  )
  specs = policy_params.param_specs(CONFIG)
  (batch,) = packing.pack(CREDITS, shape=WHOLE)
  old = jax.tree.map(lambda p: np.float32(p * 1.02), transformer_params())
  placed = sharding.params_shardings(specs, mesh)
  score, accumulate = scorer(transformer), accumulator(transformer, RICH)
  with jax.set_mesh(mesh):
    params = jax.device_put(transformer_params(), placed)
    batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
    before = score(jax.device_put(old, placed), batch).logprobs
    batch = batch.replace(old_logprobs=before, ref_logprobs=before)
    gradient, _ = accumulate(
        zeros(params), params, batch, packing.count(CREDITS)
    )
    state, applied = apply(new_state(params), gradient, RATE)
  # What was sharded stays so: no device holds all of the weights.
  for array, resting in zip(
      jax.tree.leaves(state.params), jax.tree.leaves(placed), strict=True
  ):
    assert array.sharding.is_equivalent_to(resting, array.ndim)
  one_device = update_once(transformer_params(), CREDITS, WHOLE, transformer)
  assert_same_update(jax.device_get((state.params, applied)), one_device)


def test_one_program_for_any_number_of_micro_batches():
  objective = dataclasses.replace(PLAIN, clip_low=0.019)  # nothing cached
  table, old = map(as_params, tables())
  run = functools.partial(
      differentiate, objective=objective, predict_fn=bigram, old_params=old
  )
  gradient, _ = run(table, CREDITS)
  state, _ = apply(new_state(table), gradient, RATE)
  with metrics.count_compilations() as compiled:
    for lengths in ([3], [16] * 7, [5] * 30):
      gradient, _ = run(state.params, credits_of(lengths))
      state, _ = apply(state, gradient, np.float32(0.2))
  assert compiled.count <= 1  # apply, once more, for a state that it made
  with metrics.count_compilations() as compiled:
    gradient, _ = run(state.params, credits_of([4] * 9, seed=5))
    apply(state, gradient, np.float32(0.3))
  assert compiled.count == 0


def test_trajectories_without_advantage_may_be_left_out():
  credits = [
      dataclasses.replace(credit, advantage=credit.advantage * (i % 2))
      for i, credit in enumerate(CREDITS)
  ]
  table, old = map(as_params, tables())
  run = functools.partial(
      differentiate, objective=PLAIN, predict_fn=bigram, old_params=old
  )
  everything, _ = run(table, credits)
  some, _ = run(
      table,
      [credit for credit in credits if credit.advantage],
      totals=packing.count(credits),
  )
  np.testing.assert_allclose(
      everything.grads["table"], some.grads["table"], rtol=1e-5, atol=1e-8
  )


def test_metrics_are_means_over_sampled_tokens():
  now, old = tables()
  gradient, tallies = differentiate(
      as_params(now),
      CREDITS,
      objective=RICH,
      predict_fn=bigram,
      old_params=as_params(old),
  )
  _, applied = apply(new_state(as_params(now)), gradient, RATE)
  summary = update.summarise(tallies, [applied, applied])
  picked = [c.trajectory.loss_mask > 0 for c in CREDITS]

  def sampled(table):
    rows = [oracle.logprobs(table, c.trajectory.tokens) for c in CREDITS]
    return np.concatenate([r[p] for r, p in zip(rows, picked, strict=True)])

  new, before = sampled(now), sampled(old)
  recorded = np.concatenate(
      [
          c.trajectory.sampler_logprobs[p]
          for c, p in zip(CREDITS, picked, strict=True)
      ]
  )
  ratio, gap = np.exp(new - before), np.abs(before - recorded)
  gains = np.concatenate(
      [
          np.full(p.sum(), c.advantage)
          for c, p in zip(CREDITS, picked, strict=True)
      ]
  )
  acts = np.where(gains > 0, ratio > 1 + CLIP[1], ratio < 1 - CLIP[0]) & (
      gains != 0
  )
  expected = {
      "ratio_mean": ratio.mean(),
      "ratio_max": ratio.max(),
      "clip_fraction": acts.mean(),
      "old_kl": (ratio - 1 - np.log(ratio)).mean(),
      "kl": (1 / ratio - 1 + np.log(ratio)).mean(),
      "entropy": -new.mean(),
      "logprob_gap_mean": gap.mean(),
      "logprob_gap_max": gap.max(),
      "truncated_weights": (before - recorded > np.log(2)).mean(),
      "loss": float(gradient.loss),
      "learning_rate": 0.1,
      "nonfinite": 0.0,
  }
  for name, value in expected.items():
    np.testing.assert_allclose(
        summary[name], value, rtol=2e-4, atol=1e-6, err_msg=name
    )
  for name in summary:
    metrics.define(f"{name}/policy")  # every one is defined, with its unit


@pytest.mark.parametrize("broken", ["grads", "loss"])
def test_a_non_finite_update_is_not_made(broken):
  table = as_params(tables()[0])
  state = new_state(table)
  gradient = update.Gradient(
      grads={"table": np.ones((VOCAB, VOCAB), np.float32)}, loss=np.float32(0)
  )
  if broken == "grads":
    gradient.grads["table"][3, 4] = np.nan
  else:
    gradient = gradient.replace(loss=np.float32(np.inf))
  with jax.debug_nans(False):
    after, applied = apply(state, gradient, RATE)
  assert applied["nonfinite"] == 1
  jax.tree.map(np.testing.assert_array_equal, after, state)
  assert (
      update.summarise(
          [objectives.Tally(count=np.float32(0), sums={}, maxima={})],
          [applied, {**applied, "nonfinite": 0.0}],
      )["nonfinite"]
      == 1
  )


@pytest.mark.parametrize(
    "field, value",
    [
        ("clip_low", 1.5),
        ("clip_high", -0.1),
        ("kl_coefficient", 0.5),  # without a kl
        ("importance_cap", 0.5),
    ],
)
def test_bad_fields_are_named(field, value):
  with pytest.raises(ValueError, match=f"^{field} must be "):
    dataclasses.replace(PLAIN, **{field: value})
  with pytest.raises(ValueError, match="^context_weight must be >= 0"):
    objectives.ImitationLoss(context_weight=-1.0)


def test_objectives_are_hashable():
  assert len({PLAIN, dataclasses.replace(PLAIN), RICH}) == 2
