"""What attempts at a sub-task, and an inherited advantage, aim at."""

import functools
import itertools

import jax
import numpy as np
import pytest
from team_game import (
    DUPLICATE,
    EXPERT,
    FLOAT32,
    FLOAT64,
    INVERSE,
    LAW,
    MAIN,
    PAPER,
    STRATEGIES,
    TWICE,
    calls_of,
    chance_of,
    differentiate,
    exactly,
    jitted,
    listed,
    own,
    policies,
    small,
)

from experiments.method import COMPARISONS
from mgrpo_jax.rewards import RewardWeights
from mgrpo_jax.testing import batches, estimators, game

SUBTASK = COMPARISONS["per_subtask"]
INHERIT = COMPARISONS["inherit_parent"]
# Right and vague reports are equal, malformed ones worse.
OUTCOME = RewardWeights(format=0.1, correct=0.9, expert=0.0, overlong=0.0)
ONCE = (1e-30, 1.0, 1e-30)  # d = 1


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def inherited(law, weigh):
  """E_q[v(d) c Σ_i ∇ log π(report i)] on each kind of task, [Q, P]."""
  calls, (_, every) = calls_of(PAPER, law), small(len(law) - 1)
  counted = chance_of(law) * every.correct * weigh(every.requests)
  return np.einsum("qn,ncp->qp", counted, calls.scores)


def by_rollout(d):
  return 1 / np.maximum(d, 1)


def spread_of(right, rollouts):
  """E of the population std of the outcomes of K rollouts."""
  every = np.array(list(itertools.product((0, 1), repeat=rollouts)))
  hits = every.sum(1)
  chance = right**hits * (1 - right) ** (rollouts - hits)
  return chance @ every.std(1)


@pytest.mark.parametrize("align", STRATEGIES)
@pytest.mark.parametrize("rollouts", [2, 3])
def test_an_inherited_advantage_credits_the_roots_success(align, rollouts):
  # d = 2 always: Σ_q E std_K / (p (1 - p)) · E_q[c Σ_i g_i / d] / Q
  _, every = small()
  right = chance_of(TWICE) @ every.correct
  scales = [spread_of(p, rollouts) / (p * (1 - p)) for p in right]
  expected = np.mean(
      np.array(scales)[:, None] * inherited(TWICE, by_rollout), axis=0
  )
  found = exactly(
      PAPER, INHERIT, law=TWICE, align=align, rollouts=rollouts, slots=3
  )
  np.testing.assert_allclose(found.mean, expected, **FLOAT32)


@pytest.mark.parametrize("align", [DUPLICATE, INVERSE])
def test_rollouts_without_calls_are_compared_with_too(align):
  # K E[(A(right) - A(wrong)) / n] of the others' outcomes, kind by kind.
  _, every = small()
  rollouts = 3
  scales = []
  for chance in chance_of():
    likely = np.zeros((2, 2))  # has calls, is right
    places = (np.minimum(every.requests, 1), every.correct.astype(int))
    np.add.at(likely, places, chance)
    total = 0.0
    for others in itertools.product(np.ndindex(2, 2), repeat=rollouts - 1):
      calling, hits = np.sum(others, axis=0)
      up = np.sqrt((rollouts - 1 - hits) / (hits + 1))
      down = np.sqrt(hits / (rollouts - hits))
      total += (
          np.prod([likely[o] for o in others]) * (up + down) / (calling + 1)
      )
    scales.append(rollouts * total)
  shares = inherited(LAW, lambda d: (d > 0) * by_rollout(d))
  expected = np.mean(np.array(scales)[:, None] * shares, axis=0)
  found = exactly(PAPER, INHERIT, align=align)
  np.testing.assert_allclose(found.mean, expected, **FLOAT32)


def test_what_the_calls_earn_is_not_in_it():
  found, expected = (exactly(split, INHERIT) for split in (PAPER, EXPERT))
  np.testing.assert_allclose(found.mean, expected.mean, **FLOAT32)
  # Every call once is the derivative of what the root earns.
  rules, every = small()
  slopes = jitted(jax.grad(game.expected_reward))(
      policies(),
      game=rules,
      outcomes=every,
      calls=calls_of(MAIN),
      call_weights=np.ones(len(every.correct)),
  )
  whole = MAIN.correct * inherited(LAW, np.ones_like).mean(0)
  np.testing.assert_allclose(whole, np.ravel(slopes.reports), **FLOAT64)


@functools.cache
def preferred(order, law):
  """E over rollouts with calls of Σ_i F(report i) ∇ log π / d; F the odds.

  F of a report: the chance that another attempt is worse, less that it is
  better, by the order of right, vague, malformed.
  """
  probabilities = np.exp(policies().reports)
  probabilities /= probabilities.sum(1, keepdims=True)
  values = np.array(order)
  sides = np.sign(values[:, None] - values[None])
  odds = probabilities @ sides.T
  means = np.sum(probabilities * odds, axis=1, keepdims=True)
  slopes = probabilities * (odds - means)  # Σ_r π F ∇ log π
  share = np.zeros(2)  # of the first request and the later ones
  for d in range(1, len(law)):
    share += law[d] * np.array([1, d - 1]) / d
  return (slopes * share[:, None]).ravel() / sum(law[1:])


@pytest.mark.parametrize(
    ("split", "order"),
    [(PAPER, (2, 1, 0)), (EXPERT, (2, 1, 0)), (OUTCOME, (1, 1, 0))],
)
@pytest.mark.parametrize("rollouts", [1, 2])
def test_attempts_aim_at_the_better_of_two(split, order, rollouts):
  # Whatever the shares: only the order of the reports is left, and of the
  # team's success nothing, as attempts share it.
  found = exactly(split, SUBTASK, rollouts=rollouts, slots=4, attempts=2)
  some = 1 - LAW[0] ** rollouts
  expected = some * preferred(order, LAW)
  assert np.abs(expected).max() > 0.01
  np.testing.assert_allclose(found.mean, expected, **FLOAT32)


def test_copies_of_attempts_shrink_the_step_and_keep_its_direction():
  # d = 1, two calls in four slots: E √(c (4 - c)) / 2 of c = 1 + Bin(2, ½).
  found = exactly(
      PAPER,
      SUBTASK,
      law=ONCE,
      align=DUPLICATE,
      rollouts=2,
      slots=4,
      attempts=2,
  )
  expected = (2 + np.sqrt(3)) / 4 * preferred((2, 1, 0), ONCE)
  np.testing.assert_allclose(found.mean, expected, **FLOAT32)


@pytest.mark.parametrize("align", STRATEGIES)
@pytest.mark.parametrize("slots", [2, 3])
def test_slots_that_part_attempts_shrink_the_step(align, slots):
  # Of the 2d - 1 other calls D - 1 are kept, one of which may be the companion.
  found = exactly(
      PAPER,
      SUBTASK,
      law=TWICE,
      align=align,
      slots=slots,
      attempts=2,
      rollouts=1,
  )
  expected = (slots - 1) / 3 * preferred((2, 1, 0), TWICE)
  np.testing.assert_allclose(found.mean, expected, **FLOAT32)


def test_only_the_seen_attempt_helps_the_team():
  # Of the root's success the second attempt explains nothing.
  calls, (_, every) = calls_of(PAPER, attempts=2), small(2, 2)
  counted = chance_of(attempts=2).mean(0) * every.correct
  terms = np.einsum("n,ncp->cp", counted, calls.scores)
  assert np.abs(terms[0::2]).max(1).min() > 0.01
  np.testing.assert_allclose(terms[1::2], 0.0, atol=1e-12)


def test_attempts_change_nothing_for_whoever_credits_calls_alone():
  # Unseen attempts have no part in main_correct: u is the mean over both.
  found = own(EXPERT, slots=4, attempts=2)
  np.testing.assert_allclose(found, own(EXPERT), **FLOAT64)


@pytest.mark.parametrize(
    ("comparison", "attempts"), [(SUBTASK, 2), (INHERIT, 1)]
)
def test_random_batches_agree_with_the_list(comparison, attempts):
  number, slots, rollouts = 4000, 4, 2
  draw = jitted(
      batches.sample_slots,
      align=DUPLICATE,
      num_batches=number,
      num_tasks=1,
      num_rollouts=rollouts,
      num_slots=slots,
  )
  keys = jax.random.split(jax.random.key(1), 3)
  calls, chance = calls_of(PAPER, LAW, attempts), chance_of(LAW, attempts)
  values = [
      differentiate(comparison, draw(keys[0], again, chance, calls))
      for again in keys[1:]
  ]
  found = estimators.sampled_moments(*values)
  exact = exactly(
      PAPER,
      comparison,
      align=DUPLICATE,
      rollouts=rollouts,
      slots=slots,
      attempts=attempts,
  )
  error = np.sqrt(np.diag(exact.covariance) / number)
  # Five standard errors: once in 10^6 tests of six numbers.
  assert (np.abs(found.mean - exact.mean) <= 5 * error).all()
  assert np.trace(found.covariance) == pytest.approx(
      np.trace(exact.covariance), rel=0.1
  )
  assert found.draws == pytest.approx(exact.draws, rel=0.15)


def test_an_inherited_advantage_does_not_see_copies():
  means = []
  for align in (DUPLICATE, INVERSE):
    every = listed(PAPER, LAW, align, 3, 3)
    values = differentiate(INHERIT, every.slots)
    means.append(estimators.given_rollouts(values, every)[0])
  np.testing.assert_allclose(*means, rtol=1e-4, atol=1e-6)
