"""Which groups teach, and what becomes of those that do not."""

import asyncio
import dataclasses

import numpy as np
import pytest
from trajectories import group as rollout_group
from trajectories import task, trajectory

from experiments.method import COMPARISONS
from mgrpo_jax import alignment, credit, dynamic
from mgrpo_jax.rewards import Scores
from mgrpo_jax.testing.team import small_team

TEAM = small_team()
BOTH = ("main", "researcher")
FLAT, GOOD = (1.0, 1.0), (0.0, 1.0)
NONE = ((), ())  # of two rollouts, neither calls


def graded(name, main, researcher=NONE, failed=(), attempts=None):
  """A group of a rollout for each reward of the main agent.

  Args:
    name: of the task.
    main: rewards.
    researcher: of each rollout, the rewards of the calls.
    failed: rollouts that do not count.
    attempts: of the researcher's calls of each rollout, which attempt it is.
  """
  calls, totals, weights = [], [], []
  for k, reward in enumerate(main):
    parent = len(calls)
    calls.append(trajectory(task_id=name, rollout=k))
    for number, _ in enumerate(researcher[k]):
      calls.append(
          trajectory(
              task_id=name,
              rollout=k,
              role="researcher",
              parent=parent,
              call=number,
              attempt=attempts[k][number] if attempts else 0,
          )
      )
    totals += [reward, *researcher[k]]
    weights += [float(k not in failed)] * (1 + len(researcher[k]))
  total = np.float32(totals)
  nothing = np.zeros_like(total)
  scores = Scores(
      format=nothing,
      correct=nothing,
      expert=nothing,
      overlong=nothing,
      total=total,
      weight=np.float32(weights),
  )
  one = dataclasses.replace(task(), id=name)
  return rollout_group(one, calls, len(main)), scores


def compare(groups, scores, *, comparison="per_task", trained=BOTH):
  """What the groups would be trained with."""
  return credit.compared(
      groups,
      scores,
      team=TEAM,
      trained=trained,
      align=alignment.mask,
      comparison=COMPARISONS[comparison],
      num_slots=2,
      seeds={"main": 0, "researcher": 1},
  )


@pytest.mark.parametrize(
    ("settings", "teaches", "rewards"),
    [
        ({}, True, (GOOD,)),
        ({}, False, (FLAT,)),
        ({}, False, (GOOD, NONE, (0,))),  # one failed, and with it the group
        ({}, False, (GOOD, NONE, (0, 1))),
        ({}, True, (FLAT, ((0.0,), (1.0,)))),
        ({"trained": ("main",)}, False, (FLAT, ((0.0,), (1.0,)))),
        ({"trained": ("researcher",)}, False, (GOOD, ((1.0,), (1.0,)))),
        # Calls inherit the root's advantage, whether it learns or not.
        ({"comparison": "inherit_parent"}, False, (FLAT, ((0.0,), (1.0,)))),
        (
            {"comparison": "inherit_parent", "trained": ("researcher",)},
            True,
            (GOOD, ((0.0,), (0.0,))),
        ),
        (
            {"comparison": "inherit_parent", "trained": ("researcher",)},
            False,
            (GOOD,),  # nobody is there to inherit
        ),
        # First calls are alike, and second ones.
        ({"comparison": "per_call_index"}, False, (FLAT, (GOOD, GOOD))),
        ({"comparison": "per_task"}, True, (FLAT, (GOOD, GOOD))),
        ({"comparison": "per_call_index"}, True, (FLAT, ((0.0,), (1.0,)))),
        # Only one rollout calls: there is no other one to compare with.
        ({"comparison": "other_rollouts"}, False, (FLAT, (GOOD, ()))),
        ({"comparison": "leave_one_out"}, True, (FLAT, (GOOD, ()))),
        ({"comparison": "mean_only"}, True, (FLAT, (GOOD, ()))),
        # The second is another attempt, or was asked something else.
        (
            {"comparison": "per_subtask"},
            True,
            (FLAT, (GOOD, ()), (), ((0, 1), ())),
        ),
        ({"comparison": "per_subtask"}, False, (FLAT, (GOOD, ()))),
        ({"comparison": "per_subtask"}, True, (GOOD,)),
    ],
)
def test_what_teaches(settings, teaches, rewards):
  """Beside another group, in the second place of the step."""
  other, one = graded("other", FLAT), graded("a", *rewards)
  groups, scores = zip(other, one, strict=True)
  credits = compare(groups, scores, **settings)
  assert dynamic.teaches(credits).tolist() == [False, teaches]
  gains = np.concatenate(credits.advantages)
  assert bool(np.any(np.nan_to_num(gains) != 0)) is teaches


def resampled(first, draws, rounds):
  """Ids of the groups in the end, how many are new, and what was asked."""
  asked, left = [], iter(draws)

  async def draw(count, number):
    asked.append((number, count))
    return zip(*next(left), strict=True)

  (groups, scores), replaced = asyncio.run(
      dynamic.resample(
          *zip(*first, strict=True),
          compare=lambda groups, scores: compare(
              groups, scores, trained=("main",)
          ),
          rounds=rounds,
          draw=draw,
      )
  )
  known = {
      id(one[1]): one[0] for one in [*first, *(g for d in draws for g in d)]
  }
  for group, graded in zip(groups, scores, strict=True):
    assert known[id(graded)] is group
  return [group.task.id for group in groups], replaced, asked


def test_flat_groups_are_replaced_in_place_until_rounds_run_out():
  first = [graded("a", GOOD), graded("b", FLAT), graded("c", FLAT)]
  draws = [
      [graded("d", FLAT), graded("e", GOOD)],
      [graded("f", FLAT)],
      [graded("g", GOOD)],
  ]
  assert resampled(first, draws, 0) == (["a", "b", "c"], 0, [])
  one, two, three = (1, 2), (2, 1), (3, 1)
  assert resampled(first, draws, 1) == (["a", "b", "e"], 1, [one])
  assert resampled(first, draws, 2) == (["a", "b", "e"], 1, [one, two])
  every = (["a", "g", "e"], 2, [one, two, three])
  assert resampled(first, draws, 3) == every
  assert resampled(first, draws, 9) == every


def test_what_failed_is_replaced_and_does_not_replace():
  first = [graded("a", GOOD, NONE, (0, 1)), graded("b", FLAT)]
  draws = [[graded("c", GOOD), graded("d", GOOD, NONE, (0, 1))]]
  assert resampled(first, draws, 1) == (["c", "b"], 1, [(1, 2)])


def test_where_fewer_come_than_were_asked_for_the_rest_stays():
  first = [graded("a", FLAT), graded("b", FLAT)]
  draws = [[graded("c", GOOD)]]
  assert resampled(first, draws, 1) == (["c", "b"], 1, [(1, 2)])


def test_nothing_is_drawn_where_all_groups_teach():
  assert resampled([graded("a", GOOD)], [], 5) == (["a"], 0, [])
