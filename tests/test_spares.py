"""Spare rollouts: who makes a group, and what that does to its rewards."""

import asyncio
import dataclasses
import functools
import logging
import math

import numpy as np
import pytest
import virtual_time

from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.protocol import Action, answer
from mgrpo_jax.rollout import run_group, run_groups
from mgrpo_jax.spares import Spares, seat
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.generate import complete
from mgrpo_jax.testing.team import chat_of, environment, small_team

TASK = corpus.task()
TEAM = small_team(max_turns=3)
CHAT = chat_of(COMPACT, TEAM)
ASK = CHAT.write(
    COMPACT.render(
        Action(kind="call", name="researcher", arguments={"request": "?"})
    )
)
K = 4
Z_LIMIT = 4.0  # standard errors; chance passes it once in 16,000 tests


def play(seconds, *, count, patience=0.0, broken=()):
  """Seats rollouts that take so long; what became of the cancelled, too."""
  cancelled = []

  async def begin(number):
    try:
      await asyncio.sleep(seconds[number])
    except asyncio.CancelledError:
      cancelled.append(number)
      raise
    return number

  async def main():
    found = await seat(
        begin,
        name="group",
        num_places=len(seconds) - count,
        spares=Spares(count=count, patience=patience),
        failed=lambda number: number in broken,
    )
    return found, asyncio.get_running_loop().time()

  found, spent = virtual_time.run(main())
  assert found.origin == tuple(found.results)
  return found, spent, cancelled


def test_spares_that_nobody_needs_change_nothing():
  found, spent, cancelled = play([3, 1, 2, 0.5, 9], count=2)
  assert found.origin == (0, 1, 2) and spent == 3
  assert (found.rescued, found.late) == (0, 0)
  assert cancelled == [4]  # 3 was done, in vain


def test_a_spare_takes_the_place_of_what_failed_by_number_not_by_speed():
  found, spent, cancelled = play([1, 2, 5, 1], count=2, broken={0})
  assert found.origin == (2, 1) and spent == 5
  assert (found.rescued, found.late) == (1, 0)
  assert cancelled == []
  found, spent, cancelled = play([1, 2, 5, 3, 9], count=3, broken={0, 2})
  assert found.origin == (3, 1) and spent == 5
  assert (found.rescued, found.late) == (1, 0) and cancelled == [4]


def test_what_nothing_is_left_for_keeps_its_place():
  found, spent, _ = play([3, 2, 1], count=1, broken={0, 2})
  assert found.origin == (0, 1) and spent == 3 and found.rescued == 0
  found, spent, _ = play([1, 2, 3], count=1, broken={0, 2})
  assert found.origin == (2, 1) and spent == 3 and found.rescued == 1


def test_patience_ends_with_spares_that_are_done():
  found, spent, cancelled = play([90, 1, 80, 2, 1], count=2, patience=5)
  assert found.origin == (3, 1, 4) and spent == 5
  assert (found.rescued, found.late) == (0, 2)
  assert sorted(cancelled) == [0, 2]


def test_after_patience_the_first_to_be_done_has_the_place():
  found, spent, cancelled = play([90, 1, 20], count=1, patience=5)
  assert found.origin == (2, 1) and spent == 20 and cancelled == [0]
  found, spent, cancelled = play([20, 1, 90], count=1, patience=5)
  assert found.origin == (0, 1) and spent == 20 and cancelled == [2]


def test_a_spare_may_be_late_itself():
  found, spent, cancelled = play([1, 1, 90, 2], count=2, patience=5, broken={0})
  assert found.origin == (3, 1) and spent == 5 and cancelled == [2]
  assert (found.rescued, found.late) == (0, 1)


def test_every_move_is_told(caplog):
  with caplog.at_level(logging.INFO, logger="mgrpo_jax.spares"):
    play([90, 1, 9, 1, 1], count=2, patience=5, broken={1})
  assert [record.getMessage() for record in caplog.records] == [
      "group: rollout 3 stands in for 1, which failed",
      "group: rollout 4 stands in for 0, which was late",
  ]


def test_the_first_exception_is_raised_as_itself():
  ended = []

  async def begin(number):
    try:
      await asyncio.sleep(number)
      raise ZeroDivisionError("bug")
    finally:
      ended.append(number)

  work = seat(
      begin,
      name="group",
      num_places=2,
      spares=Spares(count=1, patience=0.0),
      failed=lambda result: False,
  )
  with pytest.raises(ZeroDivisionError, match="bug"):
    virtual_time.run(work)
  assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize(
    ("count", "patience", "message"),
    [
        (-1, 0.0, "spare: -1"),
        (1, -1.0, "patience: -1.0"),
        (0, 1.0, "patience: 1.0 must be 0"),
    ],
)
def test_wrong_numbers_are_refused(count, patience, message):
  with pytest.raises(ValueError, match=message):
    Spares(count=count, patience=patience)


# --- what it does to rewards ---

NUM_GROUPS = 500
PATIENT = Spares(count=2, patience=0.0)
FIRST_DONE = Spares(count=2, patience=1e-6)  # the K fastest of K + m
SOMEWHAT = Spares(count=2, patience=4.0)


_RNG = np.random.default_rng(0)
RIGHT = _RNG.random((NUM_GROUPS, K + 2)) < 0.5
SECONDS = (1 + 2 * RIGHT) * _RNG.uniform(0.5, 1.5, RIGHT.shape)
LUCK = _RNG.random(RIGHT.shape)


@functools.cache
def played(spares, *, broken=0.0):
  """Seats groups whose right rollouts take three times as long as wrong ones.

  A machine fails on a share of them, whatever they are.

  Returns:
    [groups, K] rewards, NaN where a rollout failed, and the places taken.
  """

  async def begin(group, number):
    await asyncio.sleep(SECONDS[group, number])
    failed = LUCK[group, number] < broken
    return math.nan if failed else float(RIGHT[group, number])

  async def one(group):
    return await seat(
        functools.partial(begin, group),
        name=str(group),
        num_places=K,
        spares=spares,
        failed=math.isnan,
    )

  async def main():
    return await asyncio.gather(*map(one, range(NUM_GROUPS)))

  seated = virtual_time.run(main())
  return np.asarray([s.results for s in seated]), seated


def z_of(found):
  """How far mean rewards are off the true 1/2, in standard errors."""
  kept = found[~np.isnan(found)]
  return (kept.mean() - 0.5) / (0.5 / math.sqrt(len(kept)))


def test_spares_for_failures_leave_the_rewards_as_they_are():
  found, seated = played(PATIENT, broken=0.3)
  assert abs(z_of(found)) < Z_LIMIT
  assert sum(one.rescued for one in seated) > 0.2 * K * NUM_GROUPS
  assert all(one.late == 0 for one in seated)


def test_the_fastest_of_more_are_not_the_same_rewards():
  """What the test above must be able to see: here it is off by far."""
  found, _ = played(FIRST_DONE)
  assert z_of(found) < -3 * Z_LIMIT


@pytest.mark.parametrize("spares", [FIRST_DONE, SOMEWHAT])
def test_the_bias_is_within_what_the_share_of_late_ones_allows(spares):
  found, seated = played(spares)
  late = sum(one.late for one in seated) / found.size
  bias = found.mean() - RIGHT[:, :K].mean()
  assert 0 < -bias <= late < 1  # rewards range over 1


def test_patience_costs_less_bias():
  hasty, calm = (played(spares)[0].mean() for spares in (FIRST_DONE, SOMEWHAT))
  assert hasty < calm - 0.1 and calm < 0.5


# --- groups of a team ---


def setting(*, open_sessions=None, stuck=()):
  """A team that answers after a while; some rollouts take very long."""
  sessions = set() if open_sessions is None else open_sessions

  async def generate(tokens, sampling, seed, *, session):
    del tokens
    sessions.add(session)
    rng = np.random.default_rng(seed)
    await asyncio.sleep(rng.uniform(0.5, 1.5))
    if session.split("/")[1] in stuck:
      await asyncio.sleep(1000)
    delegates = session.split("/")[2] == "main" and rng.random() < 0.3
    turn = answer(str(seed))
    ids = ASK if delegates else CHAT.write(COMPACT.render(turn))
    return complete(ids, sampling, seed=seed, version=0)

  return environment(
      {"main": generate, "researcher": generate},
      team=TEAM,
      protocol=COMPACT,
      turn_deadline=5000.0,
      release=sessions.discard,
  )


def test_who_is_not_replaced_is_as_without_spares():
  tasks = [dataclasses.replace(TASK, id=f"task-{i}") for i in range(9)]
  plain, spared = (
      virtual_time.run(
          run_groups(
              tasks,
              environment=setting(),
              num_rollouts=K,
              seed=5,
              max_concurrent=3,
              spares=spares,
          )
      )
      for spares in (None, PATIENT)
  )
  for one, two in zip(plain, spared, strict=True):
    assert two.seating.origin == (0, 1, 2, 3) and two.seating.surplus == 2
    assert [t.tokens.tobytes() for t in one.trajectories] == [
        t.tokens.tobytes() for t in two.trajectories
    ]
    np.testing.assert_array_equal(one.rollout, two.rollout)


def test_a_stand_in_has_the_number_of_its_place_and_the_seeds_of_its_own():
  sessions = set()
  spares = Spares(count=2, patience=50.0)
  group = virtual_time.run(
      run_group(
          TASK,
          environment=setting(open_sessions=sessions, stuck=("1", "4")),
          num_rollouts=K,
          seed=5,
          spares=spares,
      )
  )
  assert group.seating.origin == (0, 5, 2, 3)
  assert group.seating.late == 1 and group.seating.surplus == 2
  assert sorted(set(group.rollout)) == [0, 1, 2, 3]
  assert not sessions  # of those that were cancelled as well
  six = virtual_time.run(
      run_group(TASK, environment=setting(), num_rollouts=6, seed=5)
  )
  for place, origin in enumerate(group.seating.origin):
    assert [
        t.tokens.tobytes() for t in group.trajectories if t.rollout == place
    ] == [t.tokens.tobytes() for t in six.trajectories if t.rollout == origin]
