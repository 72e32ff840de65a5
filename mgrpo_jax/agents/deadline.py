"""Waiting with a limit that holds even where cancellation is ignored."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlineExceededError(TimeoutError):
  """Raised where the limit was reached; other timeouts look different."""


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
  """Waits for a coroutine, but no longer than the limit.

  Unlike `asyncio.wait_for` it does not wait for the end of work that does
  not heed its cancellation; such work is left behind.

  Args:
    seconds: the limit.
    work: what to wait for.

  Returns:
    Its result.

  Raises:
    DeadlineExceededError: the limit was reached.
  """
  task = asyncio.ensure_future(work)
  try:
    done, _ = await asyncio.wait({task}, timeout=seconds)
  finally:
    if not task.done():
      task.cancel()
      task.add_done_callback(_forget)
  if not done:
    raise DeadlineExceededError(f"took longer than {seconds:g} s")
  return task.result()


def _forget(task: asyncio.Future[Any]) -> None:
  """Takes note of how abandoned work ended, so that nobody warns of it."""
  if not task.cancelled():
    task.exception()
