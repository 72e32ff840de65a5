"""Filters against sorting, alone and together, with ties."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import filters as oracle

from mgrpo_jax.policy import filters, sampling

ROWS, SIZE = 8, 40
BOUNDS = jax.jit(filters.bounds)
SAMPLE = jax.jit(sampling.sample)
# Shares that no sum of the weights below comes near, however it is rounded.
SHARES = [0.05, 0.31, 0.5003, 0.9007, 0.9991]


def describe(rows):
  made = filters.none(len(rows))
  for row, (top_k, top_p, min_p) in enumerate(rows):
    made.top_k[row], made.top_p[row], made.min_p[row] = top_k, top_p, min_p
  return made


def draw_weights(seed, levels):
  """Weights of few levels, so that many are equal; the largest is 1."""
  rng = np.random.default_rng(seed)
  weights = (rng.integers(0, levels, (ROWS, SIZE)) / 64).astype(np.float32)
  weights[:, rng.integers(SIZE)] = (levels + 1) / 64
  return weights / weights.max(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([1, 3, 20, 60]),
    rows=st.lists(
        st.tuples(
            st.integers(0, SIZE + 3),
            st.sampled_from([*SHARES, 1.0]),
            st.sampled_from([0.0, 0.013, 0.29, 0.77]),
        ),
        min_size=ROWS,
        max_size=ROWS,
    ),
)
def test_bounds_keep_what_sorting_keeps(seed, levels, rows):
  weights = draw_weights(seed, levels)
  bound = np.asarray(BOUNDS(weights, describe(rows)))
  for row, (top_k, top_p, min_p) in enumerate(rows):
    probability = weights[row].astype(np.float64)
    expected = oracle.kept(
        probability / probability.sum(), top_k=top_k, top_p=top_p, min_p=min_p
    )
    # what is of weight zero is never drawn, kept or not
    drawable = (weights[row] >= bound[row]) & (weights[row] > 0)
    np.testing.assert_array_equal(drawable, expected & (weights[row] > 0))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((0, 1.0, 0.0), [1, 1, 1, 1, 1]),
        ((1, 1.0, 0.0), [1, 1, 0, 0, 0]),  # both of the likeliest
        ((2, 1.0, 0.0), [1, 1, 0, 0, 0]),
        ((3, 1.0, 0.0), [1, 1, 1, 1, 0]),  # and both of the next
        ((0, 0.33, 0.0), [1, 1, 0, 0, 0]),  # one alone holds 0.31
        ((0, 0.7, 0.0), [1, 1, 1, 1, 0]),  # both hold 0.62
        ((0, 1.0, 0.5), [1, 1, 1, 1, 0]),  # equal to the bound: kept
        ((0, 1.0, 1.0), [1, 1, 0, 0, 0]),
        # of what min-p leaves, the first two hold 0.67
        ((0, 0.66, 0.4), [1, 1, 0, 0, 0]),
        ((0, 0.66, 0.0), [1, 1, 1, 1, 0]),
        ((0, 1e-45, 0.0), [1, 1, 0, 0, 0]),  # 0 as float32
    ],
)
def test_ties_and_order_by_hand(row, expected):
  weights = np.float32([[1, 1, 0.5, 0.5, 0.25]])
  kept = weights[0] >= np.asarray(BOUNDS(weights, describe([row])))[0]
  assert kept.tolist() == [bool(one) for one in expected]


def test_frequencies_and_logprobs_are_of_what_is_kept():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=SIZE).astype(np.float32)
  count = 2048
  uniform = ((np.arange(count) + 0.5) / count).astype(np.float32)
  drawing = sampling.plainly(count)
  drawing.temperature[:] = 0.7
  drawing.filters.top_k[:] = 12
  drawing.filters.top_p[:] = 0.8
  token, logprob, raw = (
      np.asarray(x)
      for x in SAMPLE(np.tile(logits, (count, 1)), uniform, drawing)
  )
  warm = np.exp(logits.astype(np.float64) / 0.7)
  kept = oracle.kept(warm / warm.sum(), top_k=12, top_p=0.8, min_p=0)
  expected = np.where(kept, warm, 0) / warm[kept].sum()
  got = np.bincount(token, minlength=SIZE) / count
  np.testing.assert_allclose(got, expected, atol=1.5 / count)
  np.testing.assert_allclose(logprob, np.log(expected[token]), atol=1e-5)
  plain = np.exp(logits.astype(np.float64))
  np.testing.assert_allclose(raw, np.log(plain / plain.sum())[token], atol=1e-5)


def test_a_large_vocabulary_is_bounded_as_sorting_would():
  rng = np.random.default_rng(3)
  scores = 3 * rng.normal(size=(2, 49_152)).astype(np.float32)
  weights = np.exp(scores - scores.max(axis=1, keepdims=True))
  told = np.asarray(BOUNDS(weights, describe([(50, 1.0, 0.0), (0, 0.9, 0.0)])))
  assert (weights[0] >= told[0]).sum() == 50
  mass = np.sort(weights[1].astype(np.float64))[::-1].cumsum()
  size = (weights[1] >= told[1]).sum()
  # float32 sums of 49,152 weights: 0.9 to the fifth digit
  assert mass[size - 2] / mass[-1] < 0.9 + 1e-5
  assert mass[size - 1] / mass[-1] > 0.9 - 1e-5
