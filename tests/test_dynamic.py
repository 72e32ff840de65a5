import asyncio
import dataclasses

import numpy as np
import pytest
from trajectories import group as rollout_group
from trajectories import task, trajectory

from mgrpo_jax import dynamic
from mgrpo_jax.rewards import Scores


def graded(name, main, researcher=(), weight=None):
  """A group of one rollout for each reward of the main agent."""
  calls = [trajectory(task_id=name, rollout=k) for k in range(len(main))]
  calls += [
      trajectory(task_id=name, role="researcher", parent=0, call=number)
      for number in range(len(researcher))
  ]
  total = np.float32([*main, *researcher])
  nothing = np.zeros_like(total)
  scores = Scores(
      format=nothing,
      correct=nothing,
      expert=nothing,
      overlong=nothing,
      total=total,
      weight=np.float32(np.ones_like(total) if weight is None else weight),
  )
  one = dataclasses.replace(task(), id=name)
  return rollout_group(one, calls, len(main)), scores


FLAT, GOOD = (1.0, 1.0), (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "roles", "teaches"),
    [
        ((GOOD,), ("main",), True),
        ((FLAT,), ("main",), False),
        ((FLAT, GOOD), ("main",), False),
        ((FLAT, GOOD), ("main", "researcher"), True),
        ((GOOD, FLAT), ("researcher",), False),
        ((GOOD, (), (1, 0)), ("main",), False),  # one failed
        ((GOOD, (), (0, 0)), ("main",), False),
    ],
)
def test_what_teaches(arguments, roles, teaches):
  assert dynamic.teaches(*graded("a", *arguments), roles) is teaches


def resampled(first, draws, rounds):
  """Ids of the groups in the end, how many are new, and what was asked."""
  asked, left = [], iter(draws)

  async def draw(count):
    asked.append(count)
    return next(left)

  found, replaced = asyncio.run(
      dynamic.resample(first, roles=("main",), rounds=rounds, draw=draw)
  )
  return [group.task.id for group, _ in found], replaced, asked


def test_flat_groups_are_replaced_in_place_until_rounds_run_out():
  first = [graded("a", GOOD), graded("b", FLAT), graded("c", FLAT)]
  draws = [
      [graded("d", FLAT), graded("e", GOOD)],
      [graded("f", FLAT)],
      [graded("g", GOOD)],
  ]
  assert resampled(first, draws, 0) == (["a", "b", "c"], 0, [])
  assert resampled(first, draws, 1) == (["a", "e", "c"], 1, [2])
  assert resampled(first, draws, 2) == (["a", "e", "c"], 1, [2, 1])
  assert resampled(first, draws, 9) == (["a", "e", "g"], 2, [2, 1, 1])


def test_nothing_is_drawn_where_all_groups_teach():
  assert resampled([graded("a", GOOD)], [], 5) == (["a"], 0, [])
