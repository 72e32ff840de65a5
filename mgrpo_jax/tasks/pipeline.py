"""Tasks as an endless, shuffled, checkpointable stream (grain) and a queue."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import grain

from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.types import Task

_STATE_KEYS = frozenset({"grain", "tasks"})


def select(
    tasks: Sequence[Task],
    *,
    stages: Sequence[str],
    kinds: Sequence[str],
    families: Sequence[str],
) -> tuple[Task, ...]:
  """Keeps the tasks of some stages, kinds and families.

  Args:
    tasks: to choose from.
    stages: wanted stages (`easy`, `hard`); empty for all.
    kinds: wanted beginnings of `meta['kind']`, for example `1hop` or
      `2hop:compare`; empty for all.
    families: wanted values of `meta['family']`, for example `place>attribute`;
      empty for all.

  Returns:
    The tasks in the order given.

  Raises:
    ValueError: where nothing is left, naming what was asked for and what there
      is.
  """
  kept = tuple(
      task
      for task in tasks
      if (not stages or task.stage in stages)
      and (not kinds or str(task.meta.get("kind", "")).startswith((*kinds,)))
      and (not families or task.meta.get("family") in families)
  )
  if kept:
    return kept
  have = sorted({task.stage for task in tasks})
  begin = sorted({str(t.meta.get("kind", "")).split(":")[0] for t in tasks})
  known = sorted({str(task.meta.get("family", "")) for task in tasks})
  raise ValueError(
      f"no task has a stage in {list(stages)}, a kind beginning with one of"
      f" {list(kinds)} and a family in {list(families)}; among {len(tasks)}"
      f" tasks there are stages {have}, kinds {begin} and families {known}"
  )


class TaskStream(Iterator[Task]):
  """Tasks in an order that the seed decides, anew in every epoch.

  The position is a small dict of JSON values; a stream over the same tasks
  with the same seed continues from it exactly.
  """

  def __init__(self, tasks: Sequence[Task], *, seed: int):
    """Starts at the first task of the first epoch.

    Args:
      tasks: at least one, with distinct ids.
      seed: of the shuffle, 0 .. 2**32 - 1.

    Raises:
      ValueError: where there is no task, an id occurs twice, or the seed is
        out of range.
    """
    ids = [task.id for task in tasks]
    if not ids:
      raise ValueError("tasks: a stream needs at least one")
    if len(set(ids)) != len(ids):
      double = next(i for i in ids if ids.count(i) > 1)
      raise ValueError(f"tasks: the id {double!r} occurs twice")
    if not 0 <= seed < 2**32:
      raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    self._size = len(ids)
    self._tasks = hashlib.sha256(json.dumps([seed, ids]).encode()).hexdigest()[
        :16
    ]
    shuffled = grain.MapDataset.source(list(tasks)).shuffle(seed=seed)
    # No threads: tasks are in memory already, and a read-ahead would only
    # move the position that a checkpoint stores.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    self._iterator = iter(shuffled.repeat().to_iter_dataset(options))

  def __iter__(self) -> Self:
    """Returns the stream itself."""
    return self

  def __next__(self) -> Task:
    """Returns the next task; never ends."""
    return next(self._iterator)

  def take(self, count: int) -> tuple[Task, ...]:
    """Returns the next `count` tasks."""
    return tuple(next(self._iterator) for _ in range(count))

  @property
  def size(self) -> int:
    """Number of tasks in an epoch."""
    return self._size

  def get_state(self) -> dict[str, Any]:
    """Returns the position, as JSON values."""
    return {"grain": self._iterator.get_state(), "tasks": self._tasks}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from a position.

    Args:
      state: what `get_state` returned for the same tasks and seed.

    Raises:
      MismatchError: where it is the position of another stream.
    """
    if set(state) != _STATE_KEYS:
      raise MismatchError(
          f"state has the keys {sorted(state)}, expected {sorted(_STATE_KEYS)}"
      )
    if state["tasks"] != self._tasks:
      raise MismatchError(
          "the position belongs to other tasks or another seed: fingerprint"
          f" {state['tasks']}, this stream has {self._tasks}"
      )
    self._iterator.set_state(state["grain"])


class TaskQueue:
  """A stream whose tasks may be put back, to be taken again first."""

  def __init__(self, tasks: Sequence[Task], *, seed: int, max_retries: int):
    """Starts at the first task of the first epoch.

    Args:
      tasks: at least one, with distinct ids.
      seed: of the shuffle, 0 .. 2**32 - 1.
      max_retries: how often in a row a task may be put back, 0 or more.

    Raises:
      ValueError: see `TaskStream`.
    """
    self._stream = TaskStream(tasks, seed=seed)
    self._by_id = {task.id: task for task in tasks}
    self._max_retries = max_retries
    self._waiting: list[str] = []
    self._retries: dict[str, int] = {}

  def take(self, count: int) -> tuple[Task, ...]:
    """Returns `count` tasks, those that were put back first."""
    again, self._waiting = self._waiting[:count], self._waiting[count:]
    fresh = self._stream.take(count - len(again))
    return (*(self._by_id[name] for name in again), *fresh)

  def put_back(self, task_id: str) -> bool:
    """Has a task taken again, unless it was put back too often.

    Args:
      task_id: of a task that was taken.

    Returns:
      Whether it will be taken again.
    """
    retries = self._retries.pop(task_id, 0)
    if retries == self._max_retries:
      return False  # in a later epoch it starts anew
    self._retries[task_id] = retries + 1
    self._waiting.append(task_id)
    return True

  def settle(self, task_id: str) -> None:
    """Forgets a task's retries, because this time nothing failed.

    Args:
      task_id: of a task that was taken.
    """
    self._retries.pop(task_id, None)

  @property
  def waiting(self) -> int:
    """Number of tasks that were put back and not yet taken again."""
    return len(self._waiting)

  def get_state(self) -> dict[str, Any]:
    """Returns the position, as JSON values."""
    return {
        "stream": self._stream.get_state(),
        "waiting": list(self._waiting),
        "retries": dict(self._retries),
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues from a position.

    Args:
      state: what `get_state` returned for the same tasks and seed.

    Raises:
      MismatchError: where it is the position of another stream.
    """
    self._stream.set_state(state["stream"])
    self._waiting = list(state["waiting"])
    self._retries = dict(state["retries"])
