"""Ends a run at what happens beside it: in a thread, in a server's task."""

from __future__ import annotations

import asyncio
import types
from typing import Self


class Ending:
  """Within `async with`: the body ends with the first error that is told.

  It is made in the task that enters it, which awaits nothing in between.
  """

  def __init__(self) -> None:
    """Ends nothing yet."""
    self._error: BaseException | None = None
    self._loop = asyncio.get_running_loop()
    self._host: asyncio.Task[object] | None = None
    self._cancelled = False

  async def __aenter__(self) -> Self:
    """Takes the task that enters."""
    self._host = asyncio.current_task()
    return self

  async def __aexit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    """Raises what was told, in place of the cancellation that it caused."""
    del error, trace
    host, self._host = self._host, None
    if self._cancelled and host is not None:
      host.uncancel()
    if self._error is not None and (
        kind is None or issubclass(kind, asyncio.CancelledError)
    ):
      raise self._error

  def tell(self, error: BaseException) -> None:
    """Ends the body, from any thread; only the first error counts.

    Args:
      error: what the body is to end with.
    """
    if not self._loop.is_closed():
      self._loop.call_soon_threadsafe(self._end, error)

  def _end(self, error: BaseException) -> None:
    """Cancels the body."""
    if self._error is None:
      self._error = error
      if self._host is not None:
        self._cancelled = self._host.cancel()
