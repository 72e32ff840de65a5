import fractions
import functools

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import alignment as oracle

from mgrpo_jax import alignment

STRATEGIES = (
    alignment.duplicate_or_drop,
    alignment.mask,
    alignment.inverse_count,
)
NUM_SLOTS = 3


@functools.cache
def jitted(strategy, num_slots=NUM_SLOTS):
  return jax.jit(functools.partial(strategy, num_slots=num_slots))


def align(strategy, num_calls, seed=0, num_slots=NUM_SLOTS):
  num_calls = np.array(num_calls, np.int32)
  return jax.device_get(
      jitted(strategy, num_slots)(jax.random.key(seed), num_calls)
  )


COUNTS = st.lists(st.integers(0, 9), min_size=8, max_size=8).map(
    lambda counts: np.array(counts, np.int32).reshape(2, 4)
)


@given(COUNTS, st.integers(0, 2**31 - 1), st.sampled_from(STRATEGIES))
@settings(max_examples=60, deadline=None)
def test_slots_hold_calls_of_their_own_rollout(counts, seed, strategy):
  aligned = align(strategy, counts, seed)
  assert aligned.index.shape == aligned.weight.shape == (2, 4, NUM_SLOTS)
  assert aligned.index.dtype == np.int32
  np.testing.assert_array_equal(aligned.num_calls, counts)
  for place in np.ndindex(counts.shape):
    d, index, weight = (
        counts[place],
        aligned.index[place],
        aligned.weight[place],
    )
    filled = min(d, NUM_SLOTS)
    chosen = index[:filled]
    assert (np.diff(chosen) > 0).all()  # distinct calls, in order
    assert (index >= 0).all() and (index < max(d, 1)).all()
    if d <= NUM_SLOTS:
      np.testing.assert_array_equal(chosen, range(filled))
    if strategy is alignment.duplicate_or_drop:
      expected = np.full(NUM_SLOTS, float(d > 0))
    else:
      one = (
          1.0 if strategy is alignment.mask else np.float32(1) / max(filled, 1)
      )
      expected = np.where(np.arange(NUM_SLOTS) < filled, one, 0.0)
    np.testing.assert_array_equal(weight, np.float32(expected))


def test_one_call_in_one_slot_is_the_identity():
  for strategy in STRATEGIES:
    aligned = align(strategy, [[1, 1, 0, 1]], num_slots=1)
    np.testing.assert_array_equal(aligned.index, 0)
    np.testing.assert_array_equal(aligned.weight[0, :, 0], [1, 1, 0, 1])


@pytest.mark.parametrize("num_calls", range(1, 7))
def test_oracle_expectation_is_inverse_count(num_calls):
  # Exact, in fractions: E[copies of a call] = D · its inverse_count weight.
  counts = oracle.expected_counts(num_calls, NUM_SLOTS)
  weight = oracle.inverse_count_weight(num_calls, NUM_SLOTS)
  assert counts == [NUM_SLOTS * weight] * num_calls


@pytest.mark.parametrize("num_calls", [1, 2, 4, 5])
def test_fillings_are_as_likely_as_the_paper_says(num_calls):
  # Every filling of the slots is counted over independent rollouts; a count
  # of a binomial lies within 5 standard deviations but once in 10^6 tests.
  trials = 6000
  aligned = align(alignment.duplicate_or_drop, [[num_calls] * trials], seed=3)
  seen, counts = np.unique(aligned.index[0], axis=0, return_counts=True)
  expected = oracle.outcomes(num_calls, NUM_SLOTS)
  assert {tuple(row) for row in seen.tolist()} == set(expected)
  p = 1 / len(expected)
  slack = 5 * np.sqrt(trials * p * (1 - p))
  assert np.abs(counts - trials * p).max() <= slack


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_dropped_calls_are_drawn_uniformly(strategy):
  trials = 6000
  aligned = align(strategy, [[5] * trials], seed=5)
  _, counts = np.unique(aligned.index[0], axis=0, return_counts=True)
  assert len(counts) == 10  # subsets of 3 of 5
  slack = 5 * np.sqrt(trials * 0.1 * 0.9)
  assert np.abs(counts - trials / 10).max() <= slack


def test_expected_gradient_of_copies_is_inverse_counts():
  # A linear functional of per-call gradients g, over many draws; standard
  # error of the mean is measured, 5 of it are allowed.
  counts, trials = [0, 1, 2, 3, 5], 4000
  g = np.random.default_rng(0).normal(size=(5, 5))
  means, errors = [], []
  for strategy in (alignment.duplicate_or_drop, alignment.inverse_count):
    aligned = align(strategy, [counts] * trials, seed=1)
    per_call = np.broadcast_to(g, (trials, 5, 5))
    values = np.take_along_axis(per_call, aligned.index, axis=2)
    weight = aligned.weight.astype(np.float64)
    drawn = (values * weight).sum((1, 2)) / weight.sum((1, 2))
    means.append(drawn.mean())
    errors.append(drawn.std() / np.sqrt(trials))
  exact = np.mean([g[k, :d].mean() for k, d in enumerate(counts) if d])
  for mean, error in zip(means, errors, strict=True):
    assert abs(mean - exact) <= 5 * error + 1e-6
  assert errors[1] < errors[0]  # that is what it is for


def test_gather_looks_up_calls():
  aligned = align(alignment.duplicate_or_drop, [[2, 5]], seed=1)
  values = np.arange(10, dtype=np.float32).reshape(1, 2, 5)
  slots = jax.jit(alignment.gather)(values, aligned)
  np.testing.assert_array_equal(
      slots[0], [[0, 1, aligned.index[0, 0, 2]], 5 + aligned.index[0, 1]]
  )


def test_same_key_same_slots():
  first, again, other = (
      align(alignment.duplicate_or_drop, [[2] * 50], seed) for seed in (7, 7, 8)
  )
  np.testing.assert_array_equal(first.index, again.index)
  assert (first.index != other.index).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_64_bit_types_change_no_slot(strategy):
  counts = [[0, 1, 2, 3, 5, 9]]
  expected = align(strategy, counts, seed=7)
  with jax.enable_x64(True):
    found = align(strategy, counts, seed=7)
  assert found.index.dtype == np.int32
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@example([1] * 7 + [2] * 93, fractions.Fraction(7, 100))  # 0.07 * 100 > 7
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=40),
    st.fractions(min_value="1/100", max_value=1, max_denominator=100),
)
def test_suggested_slots_cover_and_no_fewer_do(counts, coverage):
  suggested = alignment.suggest_num_slots(
      np.array(counts), coverage=float(coverage)
  )
  assert suggested == oracle.smallest_cover(counts, coverage)


@pytest.mark.parametrize("coverage", [0.0, -1.0, 1.5, float("nan")])
def test_coverage_is_checked(coverage):
  with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\]"):
    alignment.suggest_num_slots(np.array([1]), coverage=coverage)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="num_calls must hold"):
    alignment.suggest_num_slots(np.array([], int), coverage=0.9)
  for strategy in STRATEGIES:
    with pytest.raises(ValueError, match="num_slots must be >= 1, got 0"):
      strategy(jax.random.key(0), np.ones((1, 1), np.int32), num_slots=0)
