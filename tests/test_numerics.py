import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrpo_jax import numerics

NAN = float("nan")


def test_masked_values_do_not_count_whatever_they_hold():
  values = np.array([1.0, NAN, np.inf, 4.0], np.float32)
  weights = np.array([1.0, 0.0, 0.0, 0.5], np.float32)
  value, slope = jax.jit(jax.value_and_grad(numerics.masked_sum))(
      values, weights
  )
  assert value == 3.0
  np.testing.assert_array_equal(slope, [1.0, 0.0, 0.0, 0.5])


def test_division_by_zero_is_zero_with_zero_gradient():
  @jax.jit
  def both(x, y):
    return numerics.divide(x, y), jax.grad(
        lambda x, y: numerics.divide(x, y).sum(), argnums=(0, 1)
    )(x, y)

  x, y = np.array([3.0, 5.0], np.float32), np.array([2.0, 0.0], np.float32)
  value, (dx, dy) = both(x, y)
  np.testing.assert_array_equal(value, [1.5, 0.0])
  np.testing.assert_array_equal(dx, [0.5, 0.0])
  np.testing.assert_array_equal(dy, [-0.75, 0.0])


@pytest.mark.parametrize("log_ratio", [-500.0, -40.5, 0.0, 39.5, 40.5, 500.0])
def test_exponential_stays_finite_and_so_does_a_norm(log_ratio):
  value, slope = jax.jit(jax.value_and_grad(numerics.bounded_exp))(
      np.float32(log_ratio)
  )
  inside = abs(log_ratio) < numerics.LOG_RATIO_BOUND
  expected = np.exp(np.clip(log_ratio, -40, 40))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(slope, expected if inside else 0.0, rtol=1e-5)
  assert np.isfinite(np.float32(value) ** 2)


@functools.partial(jax.jit, static_argnames="axis")
def unit_scaled(values, weights, axis):
  return numerics.unit_scaled(values, weights, axis=axis)


def test_groups_are_scaled_to_the_unit_interval():
  values = np.array([[2.0, 4.0, NAN, 3.0], [7.0, 9.0, 1.0, 1.0]], np.float32)
  weights = np.array([[1, 1, 0, 2], [0, 0, 1, 1]], np.float32)
  scaled, spread, spreads = unit_scaled(values, weights, 1)
  np.testing.assert_array_equal(scaled, [[0, 1, 0, 0.5], [0, 0, 0, 0]])
  np.testing.assert_array_equal(spread, [[2.0], [0.0]])
  np.testing.assert_array_equal(spreads, [[True], [False]])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_equal_values_rounded_differently_have_no_spread(scale):
  third = np.float32(scale) / np.float32(3)
  other = np.nextafter(third, np.float32(np.inf))
  apart = third * np.float32(1.001)
  weights = np.ones((1, 2), np.float32)
  for pair, expected in (((third, other), False), ((third, apart), True)):
    spreads = unit_scaled(np.array([pair], np.float32), weights, 1)[2]
    assert bool(spreads[0, 0]) is expected


def test_tree_norm_is_the_norm_of_everything():
  tree = {"a": np.array([[3.0]], np.float32), "b": np.array([4.0], np.float32)}
  assert jax.jit(numerics.tree_norm)(tree) == 5.0


def test_tree_where_chooses_every_leaf():
  chosen, other = {"a": np.ones(2)}, {"a": np.zeros(2)}
  choose = jax.jit(numerics.tree_where)
  for condition, expected in ((True, 1.0), (False, 0.0)):
    result = choose(jnp.asarray(condition), chosen, other)
    np.testing.assert_array_equal(result["a"], expected)
