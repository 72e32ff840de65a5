"""What open agent calls wait for, so that what is stuck can be named."""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence

_NAMED = 3  # waits that a description names one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wait:
  """A call that cannot go on by itself.

  A caller that waits for its child has none: the child has, or is at work.

  Attributes:
    task_id: the task.
    rollout: as which of the task's rollouts it was begun.
    path: the call and its turn, its callers and theirs before it.
    target: what it waits for, `policy 'main'` or `tool 'search'`.
    since: when that began, `time.monotonic()`.
  """

  task_id: str
  rollout: int
  path: tuple[str, ...]
  target: str
  since: float


class Activity:
  """Every wait of the calls of an environment; costs nothing in between."""

  def __init__(self) -> None:
    """Starts with no call open."""
    self._waits: dict[int, Wait] = {}  # in order of their beginning
    self._numbers = itertools.count()

  def __len__(self) -> int:
    """Number of waits."""
    return len(self._waits)

  @contextlib.contextmanager
  def waiting(
      self, task_id: str, rollout: int, path: tuple[str, ...], target: str
  ) -> Iterator[None]:
    """Keeps a wait while it is entered; see `Wait`.

    Args:
      task_id: the task.
      rollout: its number.
      path: of the call.
      target: what it waits for.

    Yields:
      Nothing.
    """
    number = next(self._numbers)
    self._waits[number] = Wait(
        task_id=task_id,
        rollout=rollout,
        path=path,
        target=target,
        since=time.monotonic(),
    )
    try:
      yield
    finally:
      del self._waits[number]

  def since(self, moment: float) -> list[Wait]:
    """Lists the waits that began at a moment or before it.

    Args:
      moment: `time.monotonic()`.

    Returns:
      Waits, the longest first.
    """
    waits = self._waits.values()
    return list(itertools.takewhile(lambda w: w.since <= moment, waits))

  def next_after(self, moment: float) -> float | None:
    """When the first wait after a moment began; None where none did.

    Args:
      moment: `time.monotonic()`.

    Returns:
      The time.
    """
    later = (w.since for w in self._waits.values() if w.since > moment)
    return next(later, None)


def describe(waits: Sequence[Wait], now: float) -> str:
  """Names the longest waits, and counts the others by what they wait for.

  Args:
    waits: the longest first.
    now: `time.monotonic()`.

  Returns:
    A line; `no agent call waits` where there is none.
  """
  if not waits:
    return "no agent call waits"
  named = [
      f"task {wait.task_id}, rollout {wait.rollout}: {' > '.join(wait.path)}"
      f" waits for {wait.target} since {now - wait.since:.0f} s"
      for wait in waits[:_NAMED]
  ]
  counts = collections.Counter(wait.target for wait in waits[_NAMED:])
  others = [f"{count} more for {name}" for name, count in counts.most_common()]
  return "; ".join([*named, *others])
