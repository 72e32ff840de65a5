"""Prompts that trajectories of a row have in common are computed once.

What stands in a row is checked here, and that a policy says the same of it;
that updates are the same, in test_invariance.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from many_objectives import jit
from trajectories import begun_alike, random_credits, trajectory

from mgrpo_jax import losses, objectives, packing, prefixes, update
from mgrpo_jax.policy import attention, logprobs
from mgrpo_jax.policy import lora as adapters
from mgrpo_jax.policy.config import Experts
from mgrpo_jax.policy.lora import LoRA

VOCAB = 23
ALIKE = begun_alike(
    random_credits(
        [7, 12, 3, 9, 5, 5, 10, 14], vocab_size=VOCAB, weights=(0.5, 1, 2)
    ),
    ((12, 0), (9, 0), (11, 0), (10, 9)),
)
SHAPE = packing.BatchShape(
    rows=4, row_tokens=40, trajectories=10, row_targets=40, least_shared=0
)
SHARING = dataclasses.replace(SHAPE, least_shared=8)
POLICY_LOSS = objectives.PolicyLoss(
    ratio=losses.token_ratio,
    aggregation=losses.sequence_mean_token_mean,
    clip_low=0.2,
    clip_high=0.2,
    kl=None,
    kl_coefficient=0.0,
    importance=None,
    importance_cap=1.0,
    entropy_coefficient=0.1,
    surrogate=losses.clipped_surrogate,
    critic=None,
)


def read(batch):
  """Reads trajectories back: for each, what its tokens see, and its arrays."""
  found = []
  for m in np.flatnonzero(batch.weight):
    row, offset = batch.row[m], batch.offset[m]
    segments, prefix = batch.segment_ids[row], batch.prefix_ids[row]
    (last,) = np.flatnonzero(batch.loss_mask[m])[-1:] + offset
    branch = np.flatnonzero(segments == segments[last])
    assert len(set(prefix[branch])) == 1
    for t in branch:
      seen = (segments == segments[t]) | (prefix[t] > 0) & (
          segments == prefix[t]
      )
      columns = np.flatnonzero(seen[: t + 1])
      np.testing.assert_array_equal(
          batch.positions[row, columns], np.arange(t - offset + 1)
      )
    mask = batch.loss_mask[m, : len(columns)]
    np.testing.assert_array_equal(
        batch.sampled[row, branch], mask[branch - offset]
    )
    predicted = branch[1:] - offset  # what the branch's own tokens predict
    wanted = np.zeros(len(batch.loss_mask[m]))
    wanted[predicted] = 1
    np.testing.assert_array_equal(
        batch.loss_mask[m] + batch.context_mask[m], wanted
    )
    found.append(
        (
            tuple(batch.tokens[row, columns]),
            tuple(mask),
            tuple(batch.sampler_logprobs[m, : len(mask)]),
            float(batch.advantage[m]),
            float(batch.weight[m]),
        )
    )
  return found


def record(credit):
  one = credit.trajectory
  return (
      tuple(one.tokens),
      tuple(one.loss_mask),
      tuple(one.sampler_logprobs),
      float(np.float32(credit.advantage)),
      float(np.float32(credit.weight)),
  )


def sampling(credits):
  """Those that have a sampled token, by which `read` finds them."""
  return [one for one in credits if one.trajectory.loss_mask.any()]


@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=24),
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from((0, 1, 30))),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from((12, 40)),
)
@settings(max_examples=80, deadline=None)
def test_each_branch_sees_its_own_past_and_nothing_else(
    lengths, prompts, rows, entries, least_shared, row_targets
):
  shape = packing.BatchShape(
      rows=rows,
      row_tokens=40,
      trajectories=entries,
      row_targets=row_targets,
      least_shared=least_shared,
  )
  credits = sampling(
      begun_alike(
          random_credits(lengths, vocab_size=3, weights=(1.0,)), prompts
      )
  )
  batches = packing.pack(credits, shape=shape)
  found = [one for batch in batches for one in read(batch)]
  assert sorted(found) == sorted(map(record, credits))
  apart = packing.pack(
      credits, shape=dataclasses.replace(shape, least_shared=0)
  )
  used, alone = (
      sum(int(np.sum(batch.segment_ids > 0)) for batch in some)
      for some in (batches, apart)
  )
  assert used <= alone
  assert prefixes.shared_fraction(batches) == pytest.approx(
      1 - used / max(alone, 1)
  )
  for batch in batches:
    assert batch.prefix_ids.shape == batch.tokens.shape
    assert not batch.prefix_ids[batch.segment_ids == 0].any()
    assert batch.sampled.sum(axis=1).max() <= row_targets
    assert batch.weight.any()


@given(
    st.lists(st.integers(2, 6), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(14, 30),
    st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_no_other_cut_leaves_fewer_tokens(lengths, least, row_tokens, most):
  credits = begun_alike(
      random_credits(lengths, vocab_size=2, weights=(1.0,)),
      ((2, 0), (5, 0), (3, 7), (4, 0)),
  )
  calls = [one.trajectory for one in credits]
  limits = dict(row_tokens=row_tokens, row_targets=9, most_members=most)
  pieces = prefixes.cut(calls, least_shared=least, **limits)
  order = [member for piece in pieces for member in piece.members]
  assert sorted(order) == list(range(len(calls)))

  def tokens(members):
    """Of a piece; None where it may not be one."""
    some = [calls[i] for i in members]
    total = sum(len(one.tokens) for one in some)
    if len(some) == 1:
      return total
    firsts = [int(np.argmax(np.append(one.loss_mask, 1))) for one in some]
    prompts = [
        one.tokens[: first - 1] for one, first in zip(some, firsts, strict=True)
    ]
    alike = zip(*prompts, strict=False)
    same = list(itertools.takewhile(lambda at: len(set(at)) == 1, alike))
    total -= (len(some) - 1) * len(same)
    targets = sum(int(one.loss_mask.sum()) for one in some)
    fits = total <= row_tokens and targets <= 9 and len(some) <= most
    return total if fits and len(same) >= least else None

  costs = [tokens(piece.members) for piece in pieces]
  assert costs == [piece.tokens for piece in pieces]
  others = []
  for places in itertools.product((False, True), repeat=len(order) - 1):
    bounds = [0, *(i + 1 for i, cut in enumerate(places) if cut), len(order)]
    parts = [tokens(order[a:b]) for a, b in itertools.pairwise(bounds)]
    if None not in parts:
      others.append(sum(parts))
  assert sum(costs) == min(others)


def test_a_row_by_hand():
  def credit(tokens, mask):
    one = trajectory(
        tokens=np.array(tokens, np.int32),
        loss_mask=np.array(mask, np.float32),
        sampler_logprobs=-np.array(mask, np.float32),
    )
    return packing.Credit(trajectory=one, advantage=1.0, weight=1.0)

  credits = [
      credit([7, 7, 7, 5, 1, 1], [0, 0, 0, 0, 1, 1]),
      credit([9, 9], [0, 1]),
      credit([7, 7, 7, 2], [0, 0, 0, 1]),  # the third 7 predicts the 2
  ]
  shape = packing.BatchShape(
      rows=1, row_tokens=12, trajectories=4, row_targets=12, least_shared=2
  )
  (batch,) = packing.pack(credits, shape=shape)
  assert batch.tokens[0].tolist() == [7, 7, 7, 2, 7, 5, 1, 1, 9, 9, 0, 0]
  assert batch.segment_ids[0].tolist() == [2, 2, 3, 3, 4, 4, 4, 4, 1, 1, 0, 0]
  assert batch.prefix_ids[0].tolist() == [0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0]
  assert batch.positions[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 0, 1, 0, 0]
  assert batch.offset[:3].tolist() == [8, 0, 2]
  assert prefixes.shared_fraction([batch]) == 2 / 12
  assert prefixes.shared_fraction([]) == 0
  wanted = dataclasses.replace(shape, least_shared=3)
  (batch,) = packing.pack(credits, shape=wanted)
  assert not batch.prefix_ids.any()  # two tokens are too few


def test_rows_that_share_nothing_have_nothing_to_say_of_it():
  assert packing.empty(SHAPE).prefix_ids is None
  (batch,) = packing.pack(ALIKE[:2], shape=SHAPE)
  assert batch.prefix_ids is None
  assert prefixes.shared_fraction([batch]) == 0


FAMILIES = {
    "grouped heads": {},
    "biases": {"qkv_bias": True, "num_kv_heads": 4},
    "norms": {"qk_norm": True, "post_norms": True, "tied_embeddings": False},
    "experts": {
        "experts": Experts(number=4, per_token=2, mlp_dim=10, normalised=True)
    },
}


@functools.cache
def program(family, lora):
  """Gradient, metrics and log-probs of a micro-batch, compiled; weights."""
  config = tiny_llama.config(num_layers=2, **FAMILIES[family])
  trained, base = tiny_llama.weights(config), None
  if lora is not None:
    base, rng = trained, np.random.default_rng(3)
    trained = jax.tree.map(
        lambda x: np.float32(rng.normal(0, 0.3, x.shape)),
        adapters.init(jax.random.key(0), config, lora),
    )
  said = functools.partial(
      logprobs.predict,
      config=config,
      temperature=0.8,
      most_wanted=30,
      entropy=True,
  )

  def predict(params, *rows, **asked):
    if lora is not None:
      params = adapters.merge(base, params, lora=lora)
    return said(params, *rows, **asked)

  def run(params, batch, totals):
    old = update.score(params, batch, predict_fn=predict).logprobs
    gradient, tally = update.accumulate(
        update.zeros(params),
        params,
        batch.replace(old_logprobs=jax.lax.stop_gradient(old) + 0.05),
        totals,
        objective=POLICY_LOSS,
        predict_fn=predict,
    )
    return gradient, tally, old

  return jit(run), trained


def gradients(shape, family, lora=None, order=1):
  """Of all micro-batches: the gradient, metrics, each trajectory's scores."""
  run, trained = program(family, lora)
  sums, scores = [], {}
  for batch in packing.pack(ALIKE[::order], shape=shape):
    gradient, tally, old = jax.device_get(
        run(trained, batch, packing.count(ALIKE))
    )
    sums.append((gradient, tally.count, tally.sums))
    for m in np.flatnonzero(batch.weight):
      key = float(batch.advantage[m])
      scores[key] = old[m][batch.loss_mask[m] > 0]
  return jax.tree.map(lambda *each: sum(each), *sums), scores


def assert_close(found, expected):
  # float32: the same sums in another order, of gradients of about 1.
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5),
      found,
      expected,
  )


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_gradients_and_metrics_are_those_without_sharing(family):
  batches = packing.pack(ALIKE, shape=SHARING)
  assert prefixes.shared_fraction(batches) > 0.2
  assert_close(gradients(SHARING, family), gradients(SHAPE, family))


def test_adapters_learn_the_same():
  lora = LoRA(rank=2, alpha=3.0, targets=("query", "down"))
  expected = gradients(SHAPE, "grouped heads", lora)
  assert_close(gradients(SHARING, "grouped heads", lora), expected)


def test_the_order_of_trajectories_does_not_matter():
  expected = gradients(SHAPE, "grouped heads")
  assert_close(gradients(SHARING, "grouped heads", order=-1), expected)


def test_no_branch_sees_another():
  run, params = program("grouped heads", None)
  batch, totals = packing.pack(ALIKE, shape=SHARING)[0], packing.count(ALIKE)
  row = int(np.argmax([len(set(one) - {0}) for one in batch.prefix_ids]))
  of_prefix = batch.prefix_ids[row] > 0
  first, second, *_ = sorted(set(batch.segment_ids[row][of_prefix]))
  changed = batch.replace(tokens=np.copy(batch.tokens))
  span = (row, batch.segment_ids[row] == first)
  changed.tokens[span] = (batch.tokens[span] + 1) % VOCAB
  before, after = (run(params, one, totals)[2] for one in (batch, changed))
  sampled = batch.offset + np.argmax(batch.loss_mask, axis=1)
  segment = batch.segment_ids[batch.row, sampled]
  here = (batch.row == row) & (segment == first) & (batch.weight > 0)
  assert here.sum() == 1 and second in segment[batch.row == row]
  assert not np.array_equal(before[here], after[here])
  np.testing.assert_array_equal(before[~here], after[~here])


def test_windows_and_other_kernels_share_nothing():
  near = tiny_llama.config(num_layers=2, windows=(0, 9))
  assert "windows" in near.shares_nothing
  config = tiny_llama.config()
  assert not config.shares_nothing
  other = dataclasses.replace(config.execution, attention=attention.splash)
  other = dataclasses.replace(config, execution=other)
  assert "not blockwise" in other.shares_nothing
