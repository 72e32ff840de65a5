"""The requests under way of a server, which can be cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.refusing import told

_LAST = 2.0  # seconds in which requests that are cut short must end
_ENDS = RequestError(503, "this process ends", retry_after=1)


class UnderWay:
  """An application whose requests can be cut short.

  uvicorn logs a request that ends by cancellation as it does a bug, with its
  traceback. Here none does: who is cut short is told 503, unless an answer has
  begun.
  """

  def __init__(self, built: ASGIApp) -> None:
    """Wraps an application, asked for nothing yet."""
    self._built = built
    self._tasks: set[asyncio.Task[Any]] = set()
    self._closed = False

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers one, in the task that uvicorn made for it."""
    begun = False

    async def tell(message: Message) -> None:
      nonlocal begun
      begun = True
      await send(message)

    task = asyncio.current_task()
    assert task is not None
    self._tasks.add(task)
    try:
      if not self._closed:
        await self._until_closed(self._built(scope, receive, tell))
      if not begun:
        await told(_ENDS)(scope, receive, send)
    finally:
      self._tasks.discard(task)

  async def close(self, grace: float = 0.0) -> None:
    """Cuts short what is under way, and whatever comes later.

    Args:
      grace: seconds that what is under way may still take.
    """
    if self._tasks and grace:
      await asyncio.wait(self._tasks.copy(), timeout=grace)
    self._closed = True
    for task in self._tasks:
      task.cancel()
    if self._tasks:
      await asyncio.wait(self._tasks.copy(), timeout=_LAST)

  async def _until_closed(self, answering: Awaitable[None]) -> None:
    """Waits for an answer; it may be cancelled once all is closed."""
    try:
      await answering
    except asyncio.CancelledError:
      if not self._closed:
        raise
