"""Says which agent calls are stuck, while they are."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from mgrpo_jax.agents.activity import Activity, describe
from mgrpo_jax.agents.deadline import DeadlineExceededError, within

T = TypeVar("T")

_CLOSEST = 4  # looks in the time after which a call counts as stuck, at most


class StuckError(RuntimeError):
  """Rollouts took too long in all; says what they wait for."""


@contextlib.asynccontextmanager
async def watch(
    activity: Activity, *, seconds: float, tell: Callable[[str], None]
) -> AsyncIterator[None]:
  """Tells of every call to which nothing has happened for a while, once.

  The running event loop is woken at most four times in that while, and once
  where every wait is shorter.

  Args:
    activity: what is watched.
    seconds: the while, > 0.
    tell: takes a line.

  Yields:
    Nothing.
  """
  watchdog = _Watchdog(activity, seconds, tell)
  try:
    yield
  finally:
    watchdog.stop()


async def all_within(
    seconds: float, work: Coroutine[Any, Any, T], *, activity: Activity
) -> T:
  """Waits for rollouts, but no longer than a limit.

  Args:
    seconds: the limit, > 0.
    work: the rollouts; cancelled at the limit.
    activity: of their calls.

  Returns:
    What the rollouts came to.

  Raises:
    StuckError: the limit was reached; names what is still waited for.
  """
  try:
    return await within(seconds, work)
  except DeadlineExceededError as error:
    # Cancelled a moment ago, the calls have not run since: they still wait.
    now = time.monotonic()
    waits = describe(activity.since(now), now)
    raise StuckError(f"rollouts {error} (rollout.deadline): {waits}") from error


class _Watchdog:
  """A timer that looks at the waits."""

  def __init__(
      self, activity: Activity, seconds: float, tell: Callable[[str], None]
  ) -> None:
    """Sets the timer."""
    self._activity, self._seconds, self._tell = activity, seconds, tell
    self._loop = asyncio.get_running_loop()
    self._told = -float("inf")  # waits that began until then are known
    self._timer = self._loop.call_later(seconds, self._look)

  def stop(self) -> None:
    """Ends the timer."""
    self._timer.cancel()

  def _look(self) -> None:
    """Tells of new long waits, and comes back when there may be others."""
    now = time.monotonic()
    before = now - self._seconds
    stuck = self._activity.since(before)
    new = [wait for wait in stuck if wait.since > self._told]
    self._told = before
    following = self._activity.next_after(before)
    pause = self._seconds if following is None else following - before
    pause = max(pause, self._seconds / _CLOSEST)
    self._timer = self._loop.call_later(pause, self._look)
    if new:
      self._tell(
          f"nothing new for {self._seconds:g} s: {describe(new, now)}"
          + _known(len(stuck) - len(new))
      )


def _known(count: int) -> str:
  """Reminds of waits that were told of."""
  return f"; and {count} told of before" if count else ""
