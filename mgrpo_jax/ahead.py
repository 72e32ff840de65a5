"""Steps whose rollouts run ahead of what is trained, and how far they may.

    begun ─▶ rolled out, one step after the other ─▶ waiting ─▶ trained on

A step that is begun takes its tasks at once, and steps are begun by who trains:
so the order of tasks does not depend on how fast either side is. With nothing
ahead (`max_staleness` 0) a step is begun when the one before has been trained
on, and all is in step.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar

from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.tasks import curriculum
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.types import Task

T = TypeVar("T")


def furthest(
    done: int, *, max_staleness: int, evaluate_every: int, total: int
) -> int:
  r"""Computes the last step that may be rolled out.

  $$\min(n + S,\ e - 1,\ N - 1)$$

  with n steps done, S the allowed staleness, N all steps, and e the next number
  of steps after which held-out questions are asked: those are asked of one
  version of the weights, with nobody else at the samplers.

  Args:
    done: n, steps that were trained on; what was due after them is evaluated.
    max_staleness: S, updates between sampling and training, >= 0.
    evaluate_every: steps between evaluations, >= 1.
    total: N.

  Returns:
    The step's number; below `done` where no step is left.
  """
  following = (done // evaluate_every + 1) * evaluate_every
  return min(done + max_staleness, following - 1, total - 1)


class Ahead(Generic[T]):
  """Rolls steps out in turn, and keeps what waits; within `async with`.

  At most `max_staleness` + 1 steps are kept: rollouts pause where that many
  wait. A step is rolled out alone, so that what is measured of it is its own.
  """

  def __init__(
      self,
      draw: Callable[[int, tuple[Task, ...]], Coroutine[Any, Any, T]],
      *,
      take: Callable[[int], tuple[Task, ...]],
      furthest: Callable[[int], int],
  ) -> None:
    """Begins nothing yet.

    Args:
      draw: step, its tasks -> what rolling them out came to.
      take: step -> its tasks, which nobody else gets.
      furthest: steps done -> the last step that may be begun, see `furthest`.
    """
    self._draw = draw
    self._take = take
    self._furthest = furthest
    self._turn = asyncio.Lock()  # first come, first served
    self._tasks: dict[int, tuple[Task, ...]] = {}  # of steps not collected
    self._begun: dict[int, asyncio.Task[T]] = {}

  async def __aenter__(self) -> Self:
    """Enters."""
    return self

  async def __aexit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    """Ends what is under way."""
    await self.close()

  async def close(self) -> None:
    """Ends what is under way, and waits for its end; nobody collects it."""
    for one in self._begun.values():
      one.cancel()
    await asyncio.gather(*self._begun.values(), return_exceptions=True)

  @property
  def waiting(self) -> int:
    """Steps that are rolled out and not collected."""
    return sum(one.done() for one in self._begun.values())

  def begin(self, done: int) -> None:
    """Begins every step that may be by now.

    Args:
      done: steps that were trained on, and evaluated where that was due.
    """
    first = max(self._begun, default=done - 1) + 1
    for step in range(first, self._furthest(done) + 1):
      self._start(step, self._take(step))

  def get_state(self) -> list[list[str]]:
    """Returns the ids of the tasks of every step begun, in order, as JSON."""
    return [[task.id for task in tasks] for tasks in self._tasks.values()]

  def set_state(
      self,
      done: int,
      state: Sequence[Sequence[str]],
      stages: Sequence[Stage],
      tasks: Mapping[str, Sequence[Task]],
  ) -> None:
    """Begins the steps anew that had been begun.

    Args:
      done: steps that were trained on.
      state: what `get_state` returned then.
      stages: the curriculum.
      tasks: by name of stage.

    Raises:
      MismatchError: a task is not among those.
    """
    for step, ids in enumerate(state, done):
      stage, _ = curriculum.stage_at(stages, step)
      known = {task.id: task for task in tasks[stage.name]}
      if unknown := sorted(set(ids) - known.keys()):
        raise MismatchError(f"stage {stage.name!r}: no task {unknown[0]!r}")
      self._start(step, tuple(known[name] for name in ids))

  async def collect(self, step: int) -> T:
    """Waits for a step, which makes room for another one.

    Args:
      step: the first one that was not collected.

    Returns:
      What `draw` came to; raises what it raised.

    Raises:
      ValueError: it is another step's turn.
    """
    first = min(self._begun, default=None)
    if step != first:
      raise ValueError(f"step: {step}, allowed: {first}, the next")
    found = await self._begun[step]
    del self._begun[step], self._tasks[step]
    return found

  def _start(self, step: int, tasks: tuple[Task, ...]) -> None:
    """Begins a step."""
    self._tasks[step] = tasks
    self._begun[step] = asyncio.create_task(
        self._drawn(step, tasks), name=f"rollouts of step {step}"
    )

  async def _drawn(self, step: int, tasks: tuple[Task, ...]) -> T:
    """Rolls a step out when it is its turn."""
    async with self._turn:
      return await self._draw(step, tasks)


async def inline(work: Callable[[], T]) -> T:
  """Does work at once: nobody rolls anything out meanwhile.

  Args:
    work: what to do.

  Returns:
    What it returned.
  """
  return work()


async def beside(work: Callable[[], T]) -> T:
  """Does work in a thread, so that rollouts go on meanwhile.

  Args:
    work: touches nothing that the event loop changes; also where this call is
      cancelled its end is waited for.

  Returns:
    What it returned.
  """
  future = asyncio.get_running_loop().run_in_executor(None, work)
  try:
    return await asyncio.shield(future)
  finally:
    if not future.done():
      await asyncio.wait({future})
