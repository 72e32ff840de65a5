"""The game of `mgrpo_jax.testing.game` as tests use it, in double precision."""

import functools

import jax
import numpy as np

from mgrpo_jax import advantages, alignment
from mgrpo_jax.comparison import Comparison, alike
from mgrpo_jax.rewards import RewardWeights
from mgrpo_jax.testing import batches, estimators, game

MAIN = RewardWeights(format=0.1, correct=0.9, expert=0.0, overlong=0.0)
PAPER = RewardWeights(format=0.1, correct=0.4, expert=0.5, overlong=0.0)
EXPERT = RewardWeights(format=0.1, correct=0.0, expert=0.9, overlong=0.0)
TEAM = RewardWeights(format=0.0, correct=1.0, expert=0.0, overlong=0.0)
FAINT = RewardWeights(format=0.0, correct=1.0, expert=0.01, overlong=0.0)
LAW = (0.1, 0.3, 0.6)  # of d = 0, 1, 2
TWICE = (1e-30, 1e-30, 1.0)
STRATEGIES = (
    alignment.duplicate_or_drop,
    alignment.mask,
    alignment.inverse_count,
)
DUPLICATE, MASK, INVERSE = STRATEGIES
BEYOND = (advantages.plain, advantages.other_rollouts)
# Advantages, weights and slopes are float32 whatever the game is.
FLOAT32 = dict(rtol=2e-5, atol=1e-7)
FLOAT64 = dict(rtol=1e-10, atol=1e-14)


@functools.cache
def small(max_calls=2, attempts=1):
  return game.small_game(max_calls), game.outcomes(
      max_calls=max_calls, num_reports=3, attempts=attempts
  )


def policies(law=LAW):
  return game.Policies(
      calls=np.log(law),
      reports=np.log([[0.6, 0.3, 0.1], [0.3, 0.4, 0.3]]),
  )


@functools.cache
def jitted(function, **fixed):
  return jax.jit(functools.partial(function, **fixed))


@functools.cache
def chance_of(law=LAW, attempts=1):
  found = jitted(game.probabilities)(
      policies(law), *small(len(law) - 1, attempts)
  )
  return np.asarray(found)


@functools.cache
def calls_of(split, law=LAW, attempts=1):
  rules, every = small(len(law) - 1, attempts)
  found = jitted(game.main_calls, weights=MAIN)(policies(law), every)
  if split is not MAIN:
    found = jitted(game.sub_calls, weights=split)(
        policies(law), rules, every, roots=found.roots
    )
  return jax.device_get(found)


def weights_of(calls, align, num_slots):
  found = batches.call_weights(
      calls.num_calls, align=align, num_slots=num_slots
  )
  return np.asarray(found, np.float64)


def differentiate(advantage, slots):
  """Takes a normaliser of rewards and weights, or a comparison."""
  if not isinstance(advantage, Comparison):
    advantage = alike(advantage)
  found = jitted(estimators.gradients, comparison=advantage)(slots)
  return np.asarray(found, np.float64)


@functools.cache
def listed(split, law, align, num_rollouts, num_slots, attempts=1):
  return batches.enumerate_slots(
      chance_of(law, attempts),
      calls_of(split, law, attempts),
      align=align,
      num_rollouts=num_rollouts,
      num_slots=num_slots,
  )


def exactly(
    split,
    advantage,
    *,
    law=LAW,
    align=INVERSE,
    rollouts=3,
    slots=3,
    attempts=1,
):
  every = listed(split, law, align, rollouts, slots, attempts)
  return estimators.exact_moments(differentiate(advantage, every.slots), every)


def own(split, *, law=LAW, align=INVERSE, slots=3, attempts=1):
  calls = calls_of(split, law, attempts)
  chance = chance_of(law, attempts).mean(0)
  return np.asarray(
      jitted(game.own_gradient)(chance, calls, weights_of(calls, align, slots))
  )


def true(split, *, law=LAW, align=INVERSE, slots=3, attempts=1):
  rules, every = small(len(law) - 1, attempts)
  calls = calls_of(split, law, attempts)
  slopes = jitted(jax.grad(game.expected_reward))(
      policies(law),
      game=rules,
      outcomes=every,
      calls=calls,
      call_weights=weights_of(calls, align, slots),
  )
  return np.ravel(slopes.calls if split is MAIN else slopes.reports)
