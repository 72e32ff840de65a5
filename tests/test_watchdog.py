"""What is stuck is named: where it stands, what it waits for, since when."""

import asyncio
import dataclasses
import re
import time

import pytest

from mgrpo_jax.agents.activity import Activity, describe
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.protocol import Action, answer
from mgrpo_jax.agents.watchdog import StuckError, all_within, watch
from mgrpo_jax.rollout import run_group
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.generate import replaying
from mgrpo_jax.testing.team import (
    chat_of,
    environment,
    small_team,
    small_tools,
)
from mgrpo_jax.types import Status

TASK = corpus.task()
TEAM = small_team()
CHAT = chat_of(COMPACT, TEAM)
SOON = 0.05  # seconds after which a call counts as stuck
LONG = 60.0  # seconds that nothing here waits for


def turn(kind, name, **arguments):
  return CHAT.write(
      COMPACT.render(Action(kind=kind, name=name, arguments=arguments))
  )


ASK = turn("call", "researcher", request="capital of Peru")
SEARCH = turn("tool", "search", query="Peru")
DONE = CHAT.write(COMPACT.render(answer("Lima")))


def setting(*, stuck, **limits):
  """A team that asks and searches; `stuck` hangs: a policy, or search."""
  generates = {
      "main": replaying([ASK, DONE]),
      "researcher": replaying([SEARCH, DONE]),
  }
  tools = small_tools()

  async def hang(*_, **__):
    await asyncio.sleep(LONG)

  if stuck == "search":
    tools["search"] = dataclasses.replace(tools["search"], run=hang, **limits)
    limits = {}
  else:
    generates[stuck] = hang
  return environment(
      generates, team=TEAM, protocol=COMPACT, tools=tools, **limits
  )


async def watched(work, seen, *, seconds=SOON):
  async with watch(seen.activity, seconds=seconds, tell=seen.lines.append):
    return await work


class Seen:
  """An environment's activity, and what was told of it."""

  def __init__(self, environment):
    self.activity, self.lines = environment.activity, []


def play(world, *, num_rollouts=1):
  return run_group(TASK, environment=world, num_rollouts=num_rollouts, seed=0)


@pytest.mark.parametrize(
    ("stuck", "where"),
    [
        ("main", "main 0 in turn 0 waits for policy 'main'"),
        (
            "researcher",
            "main 0 in turn 0 > researcher 0 in turn 0 waits for policy"
            " 'researcher'",
        ),
        (
            "search",
            "main 0 in turn 0 > researcher 0 in turn 0 waits for tool 'search'",
        ),
    ],
)
def test_what_hangs_is_named_once_and_let_go_of(stuck, where):
  limit = "deadline" if stuck == "search" else "turn_deadline"
  world = setting(stuck=stuck, **{limit: 8 * SOON})
  seen = Seen(world)
  group = asyncio.run(watched(play(world), seen))
  ends = Status.COMPLETED if stuck == "search" else Status.FAILED
  assert group.trajectories[0].status == ends  # a tool's hang is observed
  attempts = 1 if stuck == "search" else 2
  assert len(seen.lines) == attempts  # one wait each, told of once
  for line in seen.lines:
    assert re.fullmatch(
        rf"nothing new for 0\.05 s: task {TASK.id}, rollout 0: {where} since"
        r" \d+ s",
        line,
    )
  assert len(world.activity) == 0


def test_nothing_is_told_of_calls_that_go_on():
  world = setting(stuck="main", turn_deadline=5.0)
  generate = replaying([ASK, DONE])

  async def slow(*arguments, **named):
    await asyncio.sleep(SOON)
    return await generate(*arguments, **named)

  world = environment(
      {"main": slow, "researcher": replaying([SEARCH, SEARCH, DONE])},
      team=TEAM,
      protocol=COMPACT,
  )
  seen = Seen(world)
  asyncio.run(watched(play(world, num_rollouts=4), seen, seconds=100 * SOON))
  assert seen.lines == [] and len(world.activity) == 0


def test_many_are_counted_and_new_ones_told_of_later():
  activity, lines = Activity(), []

  async def wait(number, target, begins):
    await asyncio.sleep(begins)
    with activity.waiting("t", number, ("main 0 in turn 1",), target):
      await asyncio.sleep(0.5 - begins)

  async def main():
    async with watch(activity, seconds=0.1, tell=lines.append):
      await asyncio.gather(
          *(wait(n, "policy 'main'", 0.0) for n in range(5)),
          wait(5, "tool 'visit'", 0.0),
          wait(6, "tool 'search'", 0.2),
      )

  asyncio.run(main())
  first, second = lines
  assert first.count("waits for policy 'main'") == 3
  assert "2 more for policy 'main'; 1 more for tool 'visit'" in first
  assert "search" not in first
  assert "rollout 6" in second and "and 6 told of before" in second


def test_the_timer_rests_where_waits_are_short():
  looks, activity = [], Activity()
  inner = activity.since
  activity.since = lambda moment: looks.append(moment) or inner(moment)

  async def main():
    async with watch(activity, seconds=0.2, tell=looks.append):
      end = time.monotonic() + 0.5
      while time.monotonic() < end:
        with activity.waiting("t", 0, ("main 0 in turn 0",), "tool 'search'"):
          await asyncio.sleep(0.001)

  asyncio.run(main())
  assert 1 <= len(looks) <= 4


def test_the_error_of_a_missed_deadline_names_what_it_waited_for():
  world = setting(stuck="search", deadline=LONG)
  work = play(world, num_rollouts=5)
  with pytest.raises(StuckError) as caught:
    asyncio.run(all_within(0.3, work, activity=world.activity))
  text = str(caught.value)
  assert text.startswith("rollouts took longer than 0.3 s (rollout.deadline): ")
  assert text.count("researcher 0 in turn 0 waits for tool 'search'") == 3
  assert text.endswith("2 more for tool 'search'")
  assert len(world.activity) == 0  # cancelled


def test_what_is_done_in_time_is_returned_and_what_breaks_is_raised():
  async def good():
    return 3

  async def bad():
    raise TimeoutError("of something else")

  assert asyncio.run(all_within(5.0, good(), activity=Activity())) == 3
  with pytest.raises(TimeoutError, match="something else"):
    asyncio.run(all_within(5.0, bad(), activity=Activity()))


def test_nobody_waits():
  assert describe([], 0.0) == "no agent call waits"
