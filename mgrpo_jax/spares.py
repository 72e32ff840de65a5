"""Which rollouts make a group of K, where K + m were begun.

Rollouts 0 to K - 1 have the places of the group before any has begun. A spare
takes the place of one that a machine failed on or, beyond `patience`, of one
that is late. Each place that changes hands to a rollout because it was faster
bends the group towards short rollouts. How far is bounded, whatever depends on
duration: let X be the K rollouts whose places they were and Y the group. They
differ in the places that a spare took, so for a function f of a rollout

    |E mean f(Y) - E mean f(X)| <= (max f - min f) E[share of places taken]

which is why the shares are metrics (`late`, `rescued`). Without patience only
failures change the group, and it is unbiased if they do not depend on what the
rollout does; docs/practice.md says what that takes.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spares:
  """Rollouts of a task that are begun beyond the K of its group.

  Attributes:
    count: m, >= 0.
    patience: seconds after which a place whose rollout is not done goes to a
      spare that is, >= 0; 0 for never: only to replace what failed.

  Raises:
    ValueError: naming the number that is out of range.
  """

  count: int
  patience: float

  def __post_init__(self) -> None:
    """Checks both numbers."""
    if self.count < 0:
      raise ValueError(f"spare: {self.count} must be at least 0")
    if self.patience < 0:
      raise ValueError(f"patience: {self.patience} must be at least 0")
    if self.patience and not self.count:
      raise ValueError(
          f"patience: {self.patience} must be 0 where there is no spare"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seated(Generic[T]):
  """Who has the places of a group, and why.

  Attributes:
    results: of the K rollouts that have them.
    origin: the numbers under which these were begun.
    rescued: places of a spare because a machine failed on a rollout.
    late: places of a spare that was done when another rollout was not.
  """

  results: Sequence[T]
  origin: tuple[int, ...]
  rescued: int
  late: int


@contextlib.asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
  """A task group that raises the first exception as itself.

  Yields:
    The task group; leaving waits for its tasks.
  """
  try:
    async with asyncio.TaskGroup() as group:
      yield group
  except ExceptionGroup as errors:
    raise errors.exceptions[0] from None


async def seat(
    begin: Callable[[int], Coroutine[Any, Any, T]],
    *,
    name: str,
    num_places: int,
    spares: Spares,
    failed: Callable[[T], bool],
) -> Seated[T]:
  """Begins K + m rollouts, and ends those that the group does not need.

  Args:
    begin: number to rollout; all are begun at once.
    name: of the group, for the log.
    num_places: K.
    spares: how many more, and when they may stand in.
    failed: whether a machine failed on a rollout that has ended.

  Returns:
    Who has the places. One stays with a rollout that failed only where every
    spare is seated or failed as well. What was not seated is cancelled, and
    has ended.
  """
  total = num_places + spares.count
  async with together() as group:
    tasks = [group.create_task(begin(number)) for number in range(total)]
    table = _Table(tasks, name=name, num_places=num_places, failed=failed)
    await table.settle(spares.patience)
    for task in tasks:
      task.cancel()  # one that is done stays as it is
  return Seated(
      results=[tasks[number].result() for number in table.places],
      origin=tuple(table.places),
      rescued=sum(n >= num_places for n in table.places) - table.late,
      late=table.late,
  )


class _Table(Generic[T]):
  """The places of a group while its rollouts run."""

  def __init__(
      self,
      tasks: Sequence[asyncio.Task[T]],
      *,
      name: str,
      num_places: int,
      failed: Callable[[T], bool],
  ) -> None:
    """Gives the first rollouts the places."""
    self.places = list(range(num_places))
    self.late = 0  # places that went to a faster rollout
    self._tasks, self._name, self._failed = tasks, name, failed
    self._spares = list(range(num_places, len(tasks)))

  async def settle(self, patience: float) -> None:
    """Waits until every place has a rollout that is done."""
    loop = asyncio.get_running_loop()
    end = loop.time() + patience if patience else None
    while True:
      left = None if end is None else end - loop.time()
      self._rescue()
      if left is not None and left <= 0:
        self._hurry()
      if all(self._tasks[number].done() for number in self.places):
        return
      running = [task for task in self._tasks if not task.done()]
      await asyncio.wait(
          running,
          timeout=left if left and left > 0 else None,
          return_when=asyncio.FIRST_COMPLETED,
      )

  def _rescue(self) -> None:
    """Gives places of failed rollouts to spares, whether done or not."""
    self._spares = [s for s in self._spares if not self._has_failed(s)]
    for place, number in enumerate(self.places):
      if self._spares and self._has_failed(number):
        self._move(place, self._spares[0], "failed")

  def _hurry(self) -> None:
    """Gives places of rollouts that are not done to spares that are."""
    for place, number in enumerate(self.places):
      ready = [s for s in self._spares if self._tasks[s].done()]
      if ready and not self._tasks[number].done():
        self._move(place, ready[0], "was late")
        self._tasks[number].cancel()
        self.late += 1

  def _move(self, place: int, spare: int, why: str) -> None:
    """Seats a spare."""
    number = self.places[place]
    _LOG.info(
        "%s: rollout %d stands in for %d, which %s",
        self._name,
        spare,
        number,
        why,
    )
    self.places[place] = spare
    self._spares.remove(spare)

  def _has_failed(self, number: int) -> bool:
    """Whether a rollout has ended, a machine having failed on it."""
    task = self._tasks[number]
    return task.done() and not task.cancelled() and self._failed(task.result())
