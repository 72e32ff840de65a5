"""K trees of agent calls per task."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from mgrpo_jax.agents.call import call_with_retries, turn_seed
from mgrpo_jax.agents.context import CallContext, Environment, Ledger
from mgrpo_jax.spares import Spares, seat, together
from mgrpo_jax.types import (
    NO_PARENT,
    RolloutGroup,
    Seating,
    Status,
    Task,
    Trajectory,
)

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


async def run_group(
    task: Task,
    *,
    environment: Environment,
    num_rollouts: int,
    seed: int,
    spares: Spares | None = None,
) -> RolloutGroup:
  """Executes the team K times on one task, all at once.

  Args:
    task: what the root is asked.
    environment: team, actors, tools and limits.
    num_rollouts: K.
    seed: with the task's id and each turn's place in the group it
      determines every random number, whatever else is running.
    spares: rollouts that are begun beyond the K; None for none.

  Returns:
    All trajectories of K rollouts. Those of status FAILED, repeated in vain,
    are kept: a rollout whose root is FAILED must be neither scored nor trained
    on. Of a spare, the number in the group is that of the rollout it stands in
    for; its seeds are those of its own, which `seating` tells.

  Raises:
    ValueError: `num_rollouts` is below 1.
  """
  if num_rollouts < 1:
    raise ValueError(f"num_rollouts: is {num_rollouts}, must be >= 1")
  begin = functools.partial(_run_rollout, task, environment, seed)
  if spares is None or not spares.count:
    rollouts = await _all(begin(number) for number in range(num_rollouts))
    return group_of(task, rollouts, environment=environment)
  seated = await seat(
      begin,
      name=f"task {task.id}",
      num_places=num_rollouts,
      spares=spares,
      failed=_has_failed,
  )
  rollouts = [
      tuple(dataclasses.replace(t, rollout=place) for t in calls)
      for place, calls in enumerate(seated.results)
  ]
  group = group_of(task, rollouts, environment=environment)
  seating = Seating(
      origin=seated.origin,
      rescued=seated.rescued,
      late=seated.late,
      surplus=spares.count,
  )
  return dataclasses.replace(group, seating=seating)


async def run_groups(
    tasks: Sequence[Task],
    *,
    environment: Environment,
    num_rollouts: int,
    seed: int,
    max_concurrent: int,
    spares: Spares | None = None,
) -> list[RolloutGroup]:
  """Executes the team on many tasks.

  A task that occurs again gets other seeds than at its first occurrence.

  Args:
    tasks: what the root is asked.
    environment: team, actors, tools and limits.
    num_rollouts: K, for each task.
    seed: see `run_group`.
    max_concurrent: tasks in progress at the same time.
    spares: see `run_group`.

  Returns:
    One group a task, in the order of the tasks.

  Raises:
    ValueError: `max_concurrent` is below 1.
  """
  if max_concurrent < 1:
    raise ValueError(f"max_concurrent: is {max_concurrent}, must be >= 1")
  gate = asyncio.Semaphore(max_concurrent)
  ids = [task.id for task in tasks]

  async def run(position: int) -> RolloutGroup:
    repetition = ids[:position].count(ids[position])
    own_seed = turn_seed(seed, repetition) if repetition else seed
    async with gate:
      return await run_group(
          tasks[position],
          environment=environment,
          num_rollouts=num_rollouts,
          seed=own_seed,
          spares=spares,
      )

  with telling_late_turns(environment):
    return await _all(run(position) for position in range(len(tasks)))


@contextlib.contextmanager
def telling_late_turns(environment: Environment) -> Iterator[None]:
  """Logs how many turns came too late while it was entered, if any did.

  Args:
    environment: what counts them.

  Yields:
    Nothing.
  """
  counters = environment.counters
  before = counters["late_turns"]
  try:
    yield
  finally:
    if late := counters["late_turns"] - before:
      _LOG.warning(
          "%d turns took longer than rollout.turn_deadline (%g s), and their"
          " calls failed",
          late,
          environment.turn_deadline,
      )


def group_of(
    task: Task,
    rollouts: Sequence[Sequence[Trajectory]],
    *,
    environment: Environment,
) -> RolloutGroup:
  """Flattens the trees of a task.

  Args:
    task: the task.
    rollouts: the trajectories of each rollout, callers first.
    environment: for the order of the roles.

  Returns:
    The group, its integer arrays filled in.
  """
  flat = [trajectory for rollout in rollouts for trajectory in rollout]
  starts = np.cumsum([0, *map(len, rollouts)])
  parents = [
      NO_PARENT if t.parent == NO_PARENT else int(starts[t.rollout]) + t.parent
      for t in flat
  ]
  roles = [environment.team.index(t.role) for t in flat]
  return RolloutGroup(
      task=task,
      num_rollouts=len(rollouts),
      trajectories=tuple(flat),
      rollout=np.asarray([t.rollout for t in flat], np.int32),
      parent=np.asarray(parents, np.int32),
      role=np.asarray(roles, np.int32),
      call=np.asarray([t.call for t in flat], np.int32),
  )


async def _run_rollout(
    task: Task, environment: Environment, seed: int, rollout: int
) -> tuple[Trajectory, ...]:
  """One execution of the team."""
  context = CallContext(
      environment=environment,
      task_id=task.id,
      rollout=rollout,
      seed=seed,
      ledger=Ledger(),
      parent=NO_PARENT,
  )
  team = environment.team
  await call_with_retries(team[team.root], task.question, context)
  return context.ledger.trajectories()


def _has_failed(calls: Sequence[Trajectory]) -> bool:
  """Whether a machine failed on one of a rollout's calls for good."""
  return any(call.status == Status.FAILED for call in calls)


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
  """Results in order; the first exception cancels the rest and is raised."""
  async with together() as group:
    tasks = [group.create_task(one) for one in work]
  return [task.result() for task in tasks]
