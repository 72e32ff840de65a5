"""The identities of the algorithm that are about losses and their gradients.

Numbers 5 to 8 of the list in the specification, for objectives in which all
parts meet in pairs; those about advantages are in `test_identities`, where it
says how to run more examples.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from many_objectives import (
    IMPORTANCES,
    KLS,
    MAX_TOKENS,
    OBJECTIVES,
    POLICY_LOSSES,
    accumulate_each,
    as_given,
    columns,
    jit,
)
from test_identities import CASES, ROUNDING, RUNS, SEEDS
from trajectories import random_credits

from mgrpo_jax import critic, losses, packing, update
from mgrpo_jax.types import Prediction, TrainBatch

N, T = 6, 5  # trajectories, of which the second half has weight 0; tokens
PER_TOKEN = (
    "old_logprobs",
    "sampler_logprobs",
    "ref_logprobs",
    "old_values",
)


def as_batch(arrays):
  unused = dict.fromkeys(TrainBatch.__dataclass_fields__, np.zeros(()))
  return TrainBatch(**(unused | arrays))


def slopes_of(named):
  """Loss, and its gradient by what the policy said, of every objective."""

  def slope(objective, said, batch, totals):
    def loss(said):
      return objective(Prediction(**said), as_batch(batch), totals)[0]

    return jax.value_and_grad(loss)(said)

  def every(said, batch, totals):
    return {n: slope(o, said, batch, totals) for n, o in named.items()}

  return jit(jax.vmap(every))


_slopes = slopes_of(OBJECTIVES)


def counted(batch):
  """Denominators, by hand."""
  sampled = batch["loss_mask"].sum(2)
  others = batch["context_mask"].sum(2)
  return losses.Totals(
      trajectories=batch["weight"].sum(1),
      tokens=(batch["weight"] * sampled).sum(1),
      context_tokens=(batch["weight"] * others).sum(1),
  )


def drawn(seed):
  """What a policy says of trajectories [CASES, N, T], and the batch."""
  rng = np.random.default_rng(seed)
  shape = (CASES, N, T)
  old = -rng.exponential(1.0, shape)
  mask = rng.random(shape) < 0.6
  mask[: CASES // 4, 0] = False  # a trajectory without a sampled token
  said = {
      "logprobs": old + rng.normal(0, 0.1, shape),
      "entropy": rng.exponential(1.0, shape),
      "values": rng.normal(size=shape),
  }
  weight = rng.choice([0.5, 1.0, 2.0], shape[:2])
  weight[:, N // 2 :] = 0.0
  batch = {
      "loss_mask": mask,
      "context_mask": ~mask & (np.arange(T) > 0),
      "old_logprobs": old,
      "sampler_logprobs": old + rng.normal(0, 0.5, shape),
      "ref_logprobs": old + rng.normal(0, 0.5, shape),
      "old_values": said["values"] + rng.normal(0, 0.02, shape),
      "advantage": rng.normal(size=shape[:2]),
      "weight": weight,
  }
  as_floats = functools.partial(jax.tree.map, np.float32)
  return rng, as_floats(said), as_floats(batch)


def slopes(said, batch, totals=None, run=_slopes):
  totals = counted(batch) if totals is None else totals
  return jax.device_get(run(said, batch, totals))


@RUNS
@given(SEEDS)
def test_5_duplicates_change_no_mean_loss(seed):
  _, said, batch = drawn(seed)
  loss, grads = {}, {}
  for name, (value, slope) in slopes(said, batch).items():
    loss[name], grads[name] = value, slope

  def twice(values):
    return np.concatenate([values[:, : N // 2]] * 2, axis=1)

  copied = jax.tree.map(twice, (said, batch))
  heavier = (said, batch | {"weight": 2 * batch["weight"]})
  for name, (value, slope) in slopes(*copied).items():
    np.testing.assert_allclose(value, loss[name], **ROUNDING, err_msg=name)
    for part, both in slope.items():
      np.testing.assert_allclose(
          both[:, : N // 2] + both[:, N // 2 :],
          grads[name][part][:, : N // 2],
          **ROUNDING,
          err_msg=f"{name} {part}",
      )
  for name, (value, slope) in slopes(*heavier).items():
    np.testing.assert_allclose(value, loss[name], **ROUNDING, err_msg=name)
    for part, found in slope.items():
      np.testing.assert_allclose(found, grads[name][part], **ROUNDING)


@RUNS
@given(SEEDS, st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_6_garbage_where_nothing_counts_changes_nothing(seed, garbage):
  rng, said, batch = drawn(seed)
  unused = batch["weight"] == 0
  unseen = (batch["loss_mask"] == 0) | unused[..., None]
  dirty = batch | {
      name: np.where(unseen, np.float32(garbage), batch[name])
      for name in PER_TOKEN
  }
  dirty["advantage"] = np.where(unused, np.float32(garbage), batch["advantage"])
  # A slot of weight 0 may even claim to have sampled tokens.
  dirty["loss_mask"] = np.where(unused[..., None], 1, batch["loss_mask"])
  dirty["loss_mask"] = np.float32(dirty["loss_mask"])
  # Imitation reads what a policy says of context; only M-GRPO's do not.
  wrong = {
      name: np.where(unseen, np.float32(garbage), values)
      for name, values in said.items()
  }
  clean, totals = slopes(said, batch), counted(batch)
  for found in (slopes(said, dirty, totals), slopes(wrong, dirty, totals)):
    for name in POLICY_LOSSES:
      jax.tree.map(np.testing.assert_array_equal, found[name], clean[name])
  found = slopes(said, dirty, totals)
  for name in OBJECTIVES.keys() - POLICY_LOSSES.keys():
    jax.tree.map(np.testing.assert_array_equal, found[name], clean[name])
  for value, slope in clean.values():
    assert np.isfinite(value).all() and slope["logprobs"].any()


accumulate = jit(accumulate_each)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_6_nor_does_garbage_in_packed_rows(garbage):
  shape = packing.BatchShape(
      rows=2, row_tokens=40, trajectories=16, row_targets=40, least_shared=0
  )
  rng = np.random.default_rng(5)
  rows = (shape.rows, shape.row_tokens)
  said = Prediction(
      logprobs=-np.float32(rng.exponential(size=rows)),
      entropy=np.float32(rng.exponential(size=rows)),
      values=np.float32(rng.normal(size=rows)),
  )
  unpack = jit(functools.partial(update.score, predict_fn=as_given))
  for seed in range(20):
    credits = random_credits(
        rng.integers(3, 10, 8), vocab_size=9, weights=(1, 2), seed=seed
    )
    (batch,) = packing.pack(credits, shape=shape)
    old = unpack(said, batch).logprobs + rng.normal(0, 0.05, (16, 40))
    near = np.where(batch.loss_mask > 0, np.float32(old), 0.0)
    batch = batch.replace(old_logprobs=near, sampler_logprobs=near)
    dirty = jax.tree.map(np.copy, batch)
    padding = batch.segment_ids == 0
    dirty.tokens[padding] = rng.integers(0, 9, padding.sum())
    for name in PER_TOKEN:
      getattr(dirty, name)[batch.loss_mask == 0] = garbage
    dirty.advantage[batch.weight == 0] = garbage
    totals = packing.count(credits)
    clean = jax.device_get(accumulate(said, batch, totals))
    found = jax.device_get(accumulate(said, dirty, totals))
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert all(one.grads.logprobs.any() for one, _ in clean.values())


def reinforced(objective, batch, row):
  """-A ∇ log π summed as the objective sums, and k1's own gradient."""
  mask, weight = batch["loss_mask"], batch["weight"][..., None]
  lengths = mask.sum(2, keepdims=True)
  trajectories = weight.sum(1, keepdims=True)
  tokens = (weight * lengths).sum(1, keepdims=True)
  share = (
      weight / np.where(tokens > 0, tokens, 1),  # of none, none has a share
      weight / np.maximum(lengths, 1) / trajectories,
      weight / trajectories,
      weight / MAX_TOKENS / trajectories,
  )[row[1]] * mask
  gains = batch["advantage"][..., None] * mask
  if objective.critic is not None:
    flat = CASES * N
    gains = critic.generalised_advantages(
        batch["advantage"].reshape(flat),
        batch["old_values"].reshape(flat, T),
        mask.reshape(flat, T),
        discount=objective.critic.discount,
        trace=objective.critic.trace,
    )
    gains = np.asarray(gains).reshape(CASES, N, T)
  pushed = share * gains
  if row[4] in (1, 2):  # a trajectory's ratio moves with each of its tokens
    pushed = mask * pushed.sum(2, keepdims=True)
  if row[4] == 2:  # and a length-normalised one by its part
    pushed = pushed / np.maximum(lengths, 1)
  if KLS[row[2]] is losses.kl_k1:
    pushed = pushed - objective.kl_coefficient * share
  return -pushed


@RUNS
@given(SEEDS)
def test_7_a_ratio_of_one_gives_the_reinforce_gradient(seed):
  _, said, batch = drawn(seed)
  batch |= dict.fromkeys(PER_TOKEN[:3], said["logprobs"])
  found = slopes(said, batch)
  for a, b in itertools.product(range(4), repeat=2):
    name = f"policy{a}{b}"
    np.testing.assert_allclose(
        found[name][1]["logprobs"],
        reinforced(OBJECTIVES[name], batch, columns(a, b)),
        rtol=1e-4,
        atol=1e-6,
        err_msg=name,
    )


def extremes(rng):
  """Log-probs from likely to all but impossible."""
  return np.float32(-np.exp(rng.uniform(-12, 6, (1000,))))


@RUNS
@given(SEEDS)
def test_8_k2_and_k3_are_positive_and_zero_at_equality(seed):
  rng = np.random.default_rng(seed)
  logprobs, ref = extremes(rng), extremes(rng)
  for kl in (losses.kl_k2, losses.kl_k3):
    assert (np.asarray(jax.jit(kl)(logprobs, ref)) >= 0).all()
  for kl in KLS[1:]:
    same = np.asarray(jax.jit(kl)(ref, ref))
    np.testing.assert_array_equal(same, 0.0)


@RUNS
@given(SEEDS)
def test_8_means_of_k1_and_k3_are_the_divergence(seed):
  rng = np.random.default_rng(seed)
  p, q = jax.nn.log_softmax(np.float32(rng.normal(size=(2, 300, 7))))
  divergence = np.sum(np.exp(p) * (p - q), axis=1)
  for kl in (losses.kl_k1, losses.kl_k3):
    mean = np.sum(np.exp(p) * np.asarray(jax.jit(kl)(p, q)), axis=1)
    np.testing.assert_allclose(mean, divergence, rtol=1e-3, atol=1e-5)


def test_importance_weights_of_equal_policies_are_one():
  _, said, batch = drawn(0)
  mask = batch["loss_mask"].reshape(-1, T)
  same = said["logprobs"].reshape(-1, T)
  for weighting in IMPORTANCES[1:]:
    run = jax.jit(functools.partial(weighting, cap=2.0))
    np.testing.assert_array_equal(run(same, same, mask), 1.0)
