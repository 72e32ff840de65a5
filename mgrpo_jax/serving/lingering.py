"""Who is refused may finish sending, and so learns why.

Closed while it sends, a connection is reset, and what was answered is lost.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mgrpo_jax.serving.limits import Limits

_DISCARDED = 64  # bodies' worth that are read from who sends too much


class Lingering:
  """An application that reads a body to its end before it answers an error.

  It waits for no more than the limit of a body's time, from the request's
  beginning, and for 64 times that of its bytes. Who asks whether to send
  (Expect: 100-continue) is told at once.
  """

  def __init__(self, built: ASGIApp, limits: Limits) -> None:
    """Wraps an application.

    Args:
      built: the application.
      limits: on a body's size and time.
    """
    self._built = built
    self._limits = limits

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers one request."""
    if scope["type"] != "http":
      await self._built(scope, receive, send)
      return
    body = _Body(scope, receive)
    end = asyncio.get_running_loop().time() + self._limits.read_deadline

    async def tell(message: Message) -> None:
      if message.get("status", 0) >= 400:
        await self._discard(body, end)
      await send(message)

    await self._built(scope, body.receive, tell)

  async def _discard(self, body: _Body, end: float) -> None:
    """Reads what is left of a body, until a moment of the loop's time."""
    most = self._limits.max_body_bytes * _DISCARDED
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout_at(end):
        while body.coming and body.size <= most:
          await body.receive()


class _Body:
  """What a client sends.

  Attributes:
    coming: whether there is more, which it sends unasked.
    size: bytes that have come.
  """

  def __init__(self, scope: Scope, receive: Receive) -> None:
    """Has received nothing yet."""
    expected = Headers(scope=scope).get("expect", "")
    self.coming = expected.lower() != "100-continue"
    self.size = 0
    self._receive = receive

  async def receive(self) -> Message:
    """The next message, as ASGI has it."""
    message = await self._receive()
    self.coming = bool(message.get("more_body"))
    self.size += len(message.get("body", b""))
    return message
