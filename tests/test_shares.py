"""Reward shares at either extreme are told from the recorded quickstart's."""

import dataclasses
import functools
import json
import pathlib

import pytest
from trajectories import group, task, trajectory

from configs import quickstart
from experiments.method import COMPARISONS
from mgrpo_jax import rewards, statistics
from mgrpo_jax.report import alerts
from mgrpo_jax.rewards import RewardWeights
from mgrpo_jax.types import Account

GOLDEN = pathlib.Path(__file__).parent / "golden" / "quickstart_rewards.json"
MAIN = RewardWeights(format=0.1, correct=0.9, expert=0.0, overlong=0.0)
RULES = rewards.Rules(  # never asked: every call brings its account
    format=NotImplemented,
    correct=NotImplemented,
    expert=NotImplemented,
    correct_of=rewards.of_root,
    overlong=None,
)


def default():
  """The shares of the recipe that the recording is of."""
  roles = quickstart.get_config().team.roles
  return {
      name: RewardWeights(
          format=role.format_share,
          correct=role.correct_share,
          expert=role.expert_share,
          overlong=0.0,
      )
      for name, role in roles.items()
  }


def graded(calls):
  """A group of calls of which only the components of rewards are known."""
  return group(
      task(),
      [
          trajectory(
              rollout=rollout,
              role=role,
              parent=parent,
              account=Account(
                  sampled=1,
                  turns=1,
                  format=valid > 0,
                  correct=correct,
                  expert=expert,
                  overlong=0.0,
              ),
          )
          for rollout, role, parent, valid, correct, expert in calls
      ],
      1 + max(call[0] for call in calls),
  )


@functools.cache
def recorded():
  return [
      [graded(calls) for calls in step]
      for step in json.loads(GOLDEN.read_text("utf-8"))
  ]


def shares(groups, weights, comparison="per_task"):
  scores = [rewards.score(g, weights=weights, rules=RULES) for g in groups]
  return statistics.of_shares(
      groups, scores, weights, weights, COMPARISONS[comparison]
  )


def names(groups, weights):
  return [f"{a.name} {a.key}" for a in alerts.find(shares(groups, weights))]


def with_shares(role, **changed):
  usual = default()
  return usual | {role: dataclasses.replace(usual[role], **changed)}


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_recorded_default_raises_no_alarm(step):
  found = shares(recorded()[step], default())
  assert set(found) == {
      "outcome_share/main",
      "outcome_share/researcher",
      "grade_share/researcher",
  }
  assert min(found.values()) > 0.1  # twice the limit
  assert names(recorded()[step], default()) == []


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize(
    ("role", "changed", "alarm"),
    [
        ("researcher", dict(correct=0.9, expert=0.0), "grade idle"),
        ("researcher", dict(correct=0.0, expert=0.9), "outcome idle"),
        ("researcher", dict(correct=0.89, expert=0.01), "grade idle"),
        ("researcher", dict(correct=0.01, expert=0.89), "outcome idle"),
        ("main", dict(format=1.0, correct=0.0), "outcome idle"),
    ],
)
def test_either_extreme_raises_one(step, role, changed, alarm):
  found = names(recorded()[step], with_shares(role, **changed))
  assert found == [f"{alarm} {role}"]


def rollouts(*rows):
  """A root and one call each: outcome, validity and grade of the call."""
  return graded(
      [
          call
          for k, (correct, valid, expert) in enumerate(rows)
          for call in (
              (k, "main", -1, 1, correct, 0),
              (k, "researcher", 2 * k, valid, 0, expert),
          )
      ]
  )


def of_researcher(*groups, **weights):
  found = shares(groups, {"main": MAIN, "researcher": RewardWeights(**weights)})
  return [
      found.get(f"{name}/researcher")
      for name in ("outcome_share", "grade_share")
  ]


PAPER = dict(format=0.1, correct=0.4, expert=0.5, overlong=0.0)
CROSSED = rollouts((1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 1, 0))


def test_shares_by_hand():
  # Outcome and grade cross: 0.4² : 0.5² of the variance.
  expected = [0.16 / 0.41, 0.25 / 0.41]
  assert of_researcher(CROSSED, **PAPER) == pytest.approx(expected, rel=1e-6)
  assert of_researcher(CROSSED, CROSSED, **PAPER) == pytest.approx(
      expected, rel=1e-6
  )
  # A malformed call earns 0: parts of 0.1, 0.4 and 0.5 move together.
  malformed = rollouts((1, 1, 1), (0, 0, 0))
  assert of_researcher(malformed, **PAPER) == pytest.approx(
      [0.4, 0.5], rel=1e-6
  )
  # R moves by 0.15, the outcome's part by 0.4, the grade's by -0.25.
  against = rollouts((1, 1, 0.5), (0, 1, 1))
  assert of_researcher(against, **PAPER) == pytest.approx(
      [0.4 / 0.65, 0.25 / 0.65], rel=1e-5
  )


def test_tasks_count_alike_however_many_calls_they_have():
  outcome = rollouts((1, 1, 1), (0, 1, 1))
  grade = rollouts(*[(1, 1, 1), (1, 1, 0)] * 8)
  both = rollouts((1, 1, 1), (0, 1, 0))
  many = rollouts(*[(1, 1, 1), (0, 1, 0)] * 8)
  assert of_researcher(outcome, many, **PAPER) == pytest.approx(
      of_researcher(outcome, both, **PAPER)
  )
  assert of_researcher(grade, **PAPER) == [None, pytest.approx(1.0)]


def test_who_makes_no_mistakes_is_not_warned_of():
  perfect = rollouts((1, 1, 1), (0, 1, 1))
  assert of_researcher(perfect, **PAPER) == [pytest.approx(1.0), None]


@pytest.mark.parametrize("comparison", ["inherit_parent", "per_subtask"])
def test_where_calls_are_not_compared_by_reward_nothing_is_said(comparison):
  found = shares(recorded()[0], default(), comparison)
  assert set(found) == {"outcome_share/main"}


def test_tasks_that_cannot_tell_are_left_out():
  lost = rollouts((0, 1, 1), (0, 1, 0))
  flat = rollouts((0, 1, 1), (0, 1, 1))
  assert of_researcher(flat, **PAPER) == [None, None]
  assert of_researcher(lost, **PAPER) == [None, pytest.approx(1.0)]
  (outcome, _), (alone, _) = (
      of_researcher(CROSSED, *others, **PAPER) for others in ((lost,), ())
  )
  assert outcome == alone


def test_outcomes_that_move_no_reward_count_for_nothing():
  differ = rollouts((1, 1, 1), (0, 1, 1))
  found = of_researcher(differ, **{**PAPER, "format": 1.0, "correct": 0.0})
  assert found == [0.0, None]


def test_the_root_has_no_grade():
  usual = RewardWeights(**PAPER)
  values = shares([CROSSED], {"main": MAIN, "researcher": usual})
  assert values["outcome_share/main"] == pytest.approx(1.0)
  assert "grade_share/main" not in values
