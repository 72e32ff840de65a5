import functools

import jax
import numpy as np
import pytest
from oracles import losses as oracle

from mgrpo_jax import critic

PART = {"coefficient": 0.5, "discount": 1.0, "trace": 0.95, "clip": 0.2}


def rows(seed, shape=(4, 7)):
  rng = np.random.default_rng(seed)
  mask = (rng.random(shape) < 0.6).astype(np.float32)
  mask[0] = 0.0  # nothing was sampled
  return rng, mask


def advantages(rewards, values, mask, **keywords):
  run = jax.jit(functools.partial(critic.generalised_advantages, **keywords))
  return run(np.float32(rewards), np.float32(values), mask)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("discount", (1.0, 0.9))
@pytest.mark.parametrize("trace", (0.0, 0.95, 1.0))
def test_advantages_equal_the_sum_of_later_errors(seed, discount, trace):
  rng, mask = rows(seed)
  rewards, values = rng.normal(size=4), rng.normal(size=mask.shape)
  values[mask == 0] = np.nan  # garbage
  keywords = {"discount": discount, "trace": trace}
  np.testing.assert_allclose(
      advantages(rewards, values, mask, **keywords),
      oracle.generalised_advantages(rewards, values, mask, **keywords),
      rtol=1e-5,
      atol=1e-6,
  )


def test_without_a_critic_every_token_has_the_reward():
  _, mask = rows(0)
  rewards = np.float32([1.0, 2.0, 3.0, 4.0])
  found = advantages(rewards, 0 * mask, mask, discount=1.0, trace=1.0)
  np.testing.assert_array_equal(found, rewards[:, None] * mask)


def test_a_perfect_critic_leaves_nothing_to_learn():
  _, mask = rows(0)
  rewards = np.float32([1.0, 2.0, 3.0, 4.0])
  values = rewards[:, None] * np.ones_like(mask)
  found = advantages(rewards, values, mask, discount=1.0, trace=0.5)
  np.testing.assert_array_equal(found, 0.0)


def test_advantages_have_no_gradient():
  _, mask = rows(0)

  def total(values):
    return critic.generalised_advantages(
        np.ones(4, np.float32), values, mask, discount=1.0, trace=0.9
    ).sum()

  np.testing.assert_array_equal(jax.grad(total)(0.5 * mask), 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_value_loss_equals_its_equation(seed):
  rng, _ = rows(seed)
  values, old, returns = np.float32(rng.normal(size=(3, 4, 7)))
  run = jax.jit(functools.partial(critic.clipped_value_loss, clip=0.2))
  np.testing.assert_allclose(
      run(values, old, returns),
      oracle.clipped_value_loss(values, old, returns, clip=0.2),
      rtol=1e-5,
      atol=1e-7,
  )


def test_a_value_that_moved_too_far_learns_nothing_more():
  def total(value):
    old, returns = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    return critic.clipped_value_loss(value, old, returns, clip=0.2).sum()

  slope = jax.jit(jax.grad(total))
  np.testing.assert_allclose(slope(np.float32([[0.1]])), [[-0.9]], rtol=1e-6)
  np.testing.assert_array_equal(slope(np.float32([[0.5]])), [[0.0]])


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("coefficient", 0.0),
        ("discount", 0.0),
        ("discount", 1.1),
        ("trace", -0.1),
        ("clip", float("inf")),
    ),
)
def test_impossible_critics_are_named(name, value):
  with pytest.raises(ValueError, match=name):
    critic.Critic(**PART | {name: value})
