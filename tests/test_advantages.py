import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import advantages as oracle

from mgrpo_jax import advantages

NORMALISERS = (
    "per_task",
    "mean_only",
    "leave_one_out",
    "other_rollouts",
    "per_call_index",
    "per_batch",
    "per_block",
)
STANDARDISING = ("per_task", "per_call_index", "per_batch")
SHAPES = ((1, 2, 1), (2, 4, 3), (3, 8, 2))


@functools.cache
def jitted(name):
  return jax.jit(getattr(advantages, name))


def compute(name, rewards, weights):
  return np.asarray(
      jitted(name)(np.float32(rewards), np.float32(weights)), np.float64
  )


def table(shape, elements):
  size = int(np.prod(shape))
  return st.lists(elements, min_size=size, max_size=size).map(
      lambda values: np.array(values, np.float64).reshape(shape)
  )


# Sixteenths are exact in float32, so that equal means equal in both.
REWARDS = st.integers(-64, 64).map(lambda n: n / 16)
WEIGHTS = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 3.0])
GROUPS = st.sampled_from(SHAPES).flatmap(
    lambda shape: st.tuples(table(shape, REWARDS), table(shape, WEIGHTS))
)


@pytest.mark.parametrize("name", NORMALISERS)
@given(GROUPS)
@settings(max_examples=40, deadline=None)
def test_equals_the_paper_in_loops(name, group):
  # float32 against float64: a few roundings of numbers up to 4.
  expected = getattr(oracle, name)(*group)
  np.testing.assert_allclose(
      compute(name, *group), expected, rtol=2e-5, atol=2e-5
  )


@given(GROUPS, st.data())
@settings(max_examples=40, deadline=None)
def test_attempts_are_compared_as_in_loops(group, data):
  rewards, weights = group
  subtasks = data.draw(table(rewards.shape, st.integers(0, 2))).astype(int)
  found = jitted("per_subtask")(
      np.float32(rewards), np.float32(weights), subtasks=subtasks
  )
  expected = oracle.per_subtask(rewards, weights, subtasks)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@given(GROUPS)
@settings(max_examples=40, deadline=None)
def test_what_is_not_compared_is_kept(group):
  rewards, weights = group
  np.testing.assert_array_equal(
      compute("plain", rewards, weights), oracle.plain(rewards, weights)
  )
  parents = rewards[..., :1]
  np.testing.assert_array_equal(
      compute("inherit_parent", parents, weights),
      oracle.inherit_parent(parents, weights),
  )


def test_worked_by_hand():
  # Two rollouts, rewards 1 and 0, of weight 1 and 3: mean 1/4, std √3/4.
  rewards, weights = np.array([[[1.0], [0.0]]]), np.array([[[1.0], [3.0]]])
  np.testing.assert_allclose(
      compute("per_task", rewards, weights).ravel(),
      [np.sqrt(3), -1 / np.sqrt(3)],
      rtol=1e-6,
  )
  mean_only = compute("mean_only", rewards, weights).ravel()
  np.testing.assert_array_equal(mean_only, [0.75, -0.25])
  loo = compute("leave_one_out", rewards, weights).ravel()
  np.testing.assert_array_equal(loo, [1.0, -1.0])


def test_blocks_of_arrivals_by_hand():
  # Two tasks, two rollouts, blocks of two. Rollout 0 of task 0 has one call, of
  # task 1 two; rollout 1 of task 0 two, of task 1 none: the queue is
  # 4 | 8, 6 | 1, 5 after its first, so (4, 8), (6, 1) and the lone 5.
  rewards = np.array([[[4.0, 9.0], [1.0, 5.0]], [[8.0, 6.0], [9.0, 9.0]]])
  weights = np.array([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])
  np.testing.assert_array_equal(
      compute("per_block", rewards, weights),
      [[[-1.0, 0.0], [-1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]],
  )


@pytest.mark.parametrize("name", NORMALISERS)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.0, 1e-20, 1e20])
@pytest.mark.parametrize("weight", [1 / 3, 0.7, 1.0])
def test_equal_rewards_give_exact_zeros(name, reward, weight):
  rewards, weights = np.full((2, 4, 3), reward), np.full((2, 4, 3), weight)
  np.testing.assert_array_equal(compute(name, rewards, weights), 0.0)


def test_doubles_from_the_host_are_compared_as_floats():
  # A rounding apart in float32, where rewards live; far more in float64.
  third = np.float32(1 / 3)
  rewards = np.array([[[third], [np.nextafter(third, np.float32(1))]]], float)
  found = advantages.per_task(rewards, np.ones_like(rewards))
  np.testing.assert_array_equal(found, 0.0)


@pytest.mark.parametrize("name", NORMALISERS)
def test_a_lone_member_gets_zero(name):
  weights = np.zeros((2, 4, 3))
  weights[0, 1, 2] = 1 / 3
  rewards = np.arange(24.0).reshape(2, 4, 3)
  np.testing.assert_array_equal(compute(name, rewards, weights), 0.0)


@pytest.mark.parametrize("name", NORMALISERS)
def test_garbage_of_weight_zero_changes_nothing(name):
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(2, 4, 3))
  weights = rng.integers(0, 2, size=(2, 4, 3)).astype(float)
  clean = compute(name, rewards, weights)
  for garbage in (np.nan, np.inf, -np.inf, 1e30):
    dirty = np.where(weights > 0, rewards, garbage)
    np.testing.assert_array_equal(compute(name, dirty, weights), clean)
  np.testing.assert_array_equal(clean[weights == 0], 0.0)


@pytest.mark.parametrize("name", STANDARDISING)
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e30])
def test_standardised_groups_have_unit_spread_at_any_scale(name, scale):
  # Nothing is added to the standard deviation, however small it is.
  rng = np.random.default_rng(1)
  rewards = rng.normal(size=(2, 4, 3)) * scale
  result = compute(name, rewards, np.ones((2, 4, 3)))
  axes = {"per_task": (1, 2), "per_call_index": 1, "per_batch": None}[name]
  np.testing.assert_allclose(result.mean(axes), 0.0, atol=1e-6)
  np.testing.assert_allclose((result**2).mean(axes), 1.0, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 0, 2), (2, 2, 0)])
@pytest.mark.parametrize("name", ["per_task", "per_block", "mean_only"])
def test_nothing_has_no_advantage(name, shape):
  found = getattr(advantages, name)(np.zeros(shape), np.zeros(shape))
  assert found.shape == shape


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 0, 2), (2, 2, 0)])
def test_no_sub_tasks_have_no_advantage(shape):
  nothing = np.zeros(shape, np.float32)
  subtasks = np.zeros(shape, np.int32)
  found = advantages.per_subtask(nothing, nothing, subtasks=subtasks)
  assert found.shape == shape


@pytest.mark.parametrize("name", ["per_task", "mean_only", "leave_one_out"])
def test_a_spread_beyond_float32_counts_as_none(name):
  rewards = np.float32([[[3e38], [-3e38], [0]]])
  found = getattr(advantages, name)(rewards, np.ones_like(rewards))
  np.testing.assert_array_equal(found, 0.0)
