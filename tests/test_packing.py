import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import random_credits, trajectory

from mgrpo_jax import packing
from mgrpo_jax.types import Alignment

credits_of = functools.partial(
    random_credits, vocab_size=50, weights=(0.25, 1.0, 3.0)
)


def unpacked(batch):
  """Reads the trajectories back, as hashable records."""
  records = []
  for m in range(len(batch.row)):
    inside = np.flatnonzero(batch.loss_mask[m] + batch.context_mask[m])
    length = inside[-1] + 1 if inside.size else 0
    if not length:
      continue
    row, start = batch.row[m], batch.offset[m]
    span = slice(start, start + length)
    assert len(set(batch.segment_ids[row, span])) == 1
    np.testing.assert_array_equal(batch.positions[row, span], range(length))
    records.append(
        (
            tuple(batch.tokens[row, span]),
            tuple(batch.loss_mask[m, :length]),
            tuple(batch.context_mask[m, :length]),
            tuple(batch.sampler_logprobs[m, :length]),
            batch.advantage[m],
            batch.weight[m],
        )
    )
  return records


def expected(credit):
  one = credit.trajectory
  other = 1 - one.loss_mask
  other[0] = 0
  return (
      tuple(one.tokens),
      tuple(one.loss_mask),
      tuple(other),
      tuple(one.sampler_logprobs),
      np.float32(credit.advantage),
      np.float32(credit.weight),
  )


@given(
    st.lists(st.integers(2, 16), max_size=30),
    st.integers(1, 4),
    st.integers(1, 6),
)
@settings(max_examples=80, deadline=None)
def test_every_trajectory_stands_once_and_alone(lengths, rows, entries):
  shape = packing.BatchShape(
      rows=rows,
      row_tokens=16,
      trajectories=entries,
      row_targets=16,
      least_shared=0,
  )
  credits = credits_of(lengths)
  batches = packing.pack(credits, shape=shape)
  found = [record for batch in batches for record in unpacked(batch)]
  assert sorted(found) == sorted(map(expected, credits))
  # Segments do not overlap: what is not padding adds up to all tokens.
  assert sum((b.segment_ids > 0).sum() for b in batches) == sum(lengths)
  for batch in batches:
    assert batch.tokens.shape == (rows, 16)
    assert batch.loss_mask.shape == (entries, 16)
    assert batch.weight.any()  # no micro-batch of padding alone
  assert not any(b.tokens[b.segment_ids == 0].any() for b in batches)


def test_neighbours_in_a_row_have_segments_of_their_own():
  shape = packing.BatchShape(
      rows=1, row_tokens=16, trajectories=4, row_targets=16, least_shared=0
  )
  (batch,) = packing.pack(credits_of([5, 6, 4]), shape=shape)
  assert list(batch.segment_ids[0]) == [2] * 6 + [1] * 5 + [3] * 4 + [0]


def test_packing_is_tight_and_deterministic():
  rng = np.random.default_rng(0)
  lengths = rng.integers(10, 128, 200)
  shape = packing.BatchShape(
      rows=8, row_tokens=128, trajectories=64, row_targets=128, least_shared=0
  )
  first, second = (
      packing.pack(credits_of(lengths), shape=shape) for _ in range(2)
  )
  for a, b in zip(first, second, strict=True):
    for field in dataclasses.fields(a):
      np.testing.assert_array_equal(
          getattr(a, field.name), getattr(b, field.name)
      )
  rows = sum((batch.segment_ids.any(1)).sum() for batch in first)
  # First fit decreasing needs at most 11/9 of the best, which needs this.
  assert rows <= np.ceil(lengths.sum() / 128) * 11 / 9 + 1


def test_nothing_packs_to_nothing():
  shape = packing.BatchShape(
      rows=2, row_tokens=16, trajectories=4, row_targets=16, least_shared=0
  )
  assert packing.pack([], shape=shape) == ()
  totals = packing.count([])
  assert (totals.trajectories, totals.tokens, totals.context_tokens) == (0,) * 3


def test_totals_count_weighted_tokens():
  one = trajectory(loss_mask=np.array([0, 0, 1], np.float32))
  two = trajectory(
      tokens=np.arange(5, dtype=np.int32),
      loss_mask=np.array([0, 1, 0, 1, 1], np.float32),
      sampler_logprobs=np.zeros(5, np.float32),
  )
  totals = packing.count(
      [
          packing.Credit(trajectory=one, advantage=0.0, weight=2.0),
          packing.Credit(trajectory=two, advantage=1.0, weight=0.5),
      ]
  )
  # The first token of a trajectory is neither sampled nor predicted.
  assert totals.trajectories == 2.5
  assert totals.tokens == 2 * 1 + 0.5 * 3
  assert totals.context_tokens == 2 * 1 + 0.5 * 1


def test_copies_fold_into_weights():
  a, b, c = (trajectory(call=n) for n in range(3))
  calls = [[(a,), (b, c), ()]]
  alignment = Alignment(
      index=np.array([[[0, 0, 0], [0, 1, 1], [0, 0, 0]]], np.int32),
      weight=np.array([[[1, 1, 1], [1, 1, 1], [0, 0, 0]]], np.float32),
      num_calls=np.array([[1, 2, 0]], np.int32),
  )
  gains = np.array([[[2, 2, 2], [-1, 3, 4], [9, 9, 9]]], np.float32)
  folded = packing.fold(calls, alignment, gains)
  assert [(f.trajectory.call, f.advantage, f.weight) for f in folded] == [
      (0, 2.0, 3.0),
      (1, -1.0, 1.0),
      (2, 3.0, 1.0),  # copies of unequal advantage stay apart
      (2, 4.0, 1.0),
  ]


SHAPE = packing.BatchShape(
    rows=2, row_tokens=4, trajectories=2, row_targets=4, least_shared=0
)
NAMED = "task 't' rollout 3 researcher 1"


@pytest.mark.parametrize(
    "fields, advantage, problem",
    [
        ({"tokens": np.zeros(5, np.int32)}, 0.0, "has 5 tokens, allowed: 1 to"),
        ({"tokens": np.zeros(0, np.int32)}, 0.0, "has 0 tokens"),
        ({"tokens": np.zeros(2, np.int32)}, 0.0, "3 loss mask entries and 3"),
        ({"loss_mask": np.ones(3)}, 0.0, "loss mask 1.0 on its first token"),
        ({}, float("nan"), "advantage nan"),
    ],
)
def test_bad_trajectories_are_named(fields, advantage, problem):
  bad = trajectory(rollout=3, role="researcher", call=1, **fields)
  credit = packing.Credit(trajectory=bad, advantage=advantage, weight=1.0)
  with pytest.raises(ValueError, match=problem) as raised:
    packing.pack([credit], shape=SHAPE)
  assert NAMED in str(raised.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rows", 0),
        ("row_tokens", 0),
        ("trajectories", 0),
        ("row_targets", 0),
        ("least_shared", -1),
    ],
)
def test_bad_shapes_are_named(field, value):
  sizes = dict.fromkeys(("rows", "trajectories", "row_targets"), 1)
  sizes |= {"row_tokens": 2, "least_shared": 0, field: value}
  with pytest.raises(ValueError, match=f"^{field} must be >= "):
    packing.BatchShape(**sizes)


def test_no_row_has_more_targets_than_it_may():
  calls = [
      trajectory(
          rollout=k,
          loss_mask=np.array([0, 1, 1, 0], np.float32),
          tokens=np.array([1, 2, 3, 4], np.int32),
          sampler_logprobs=np.zeros(4, np.float32),
      )
      for k in range(3)
  ]
  credits = [
      packing.Credit(trajectory=one, advantage=1.0, weight=1.0) for one in calls
  ]
  for targets, rows in ((6, 1), (5, 2), (2, 3)):
    shape = packing.BatchShape(
        rows=3,
        row_tokens=16,
        trajectories=4,
        row_targets=targets,
        least_shared=0,
    )
    (batch,) = packing.pack(credits, shape=shape)
    assert np.sum(np.any(batch.sampled, axis=1)) == rows
    assert np.max(np.sum(batch.sampled, axis=1)) <= targets
    assert np.sum(batch.sampled) == np.sum(batch.loss_mask) == 6
  narrow = packing.BatchShape(
      rows=3, row_tokens=16, trajectories=4, row_targets=1, least_shared=0
  )
  with pytest.raises(ValueError, match="2 sampled tokens, .* row_targets = 1"):
    packing.pack(credits, shape=narrow)
