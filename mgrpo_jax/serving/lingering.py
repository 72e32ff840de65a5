"""Who is refused may go on sending for a while, and so learns why.

Closed while it sends, a connection is reset, and what was answered is lost.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_AT_HAND = 0.1  # seconds in which a small body is there
_LONGEST = 5.0  # seconds for which more of it is read
_DISCARDED = 64 << 20  # bytes that are read from who sends too much
_CLOSE = (b"connection", b"close")


class Lingering:
  """An application that goes on reading from whom it does not serve.

  What it answers with a status of 300 up is sent at once, or a moment later to
  who is about to finish. Who is not is told that the connection will be closed,
  and is read for five seconds more, or until 64 MiB have come; nothing of that
  is kept.
  """

  def __init__(self, built: ASGIApp) -> None:
    """Wraps an application."""
    self._built = built

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers one request."""
    if scope["type"] != "http":
      await self._built(scope, receive, send)
      return
    body = _Body(scope, receive)
    lingers = False

    async def tell(message: Message) -> None:
      nonlocal lingers
      if message.get("status", 0) >= 300:
        if not body.asks:
          await self._discard(body, _AT_HAND)
        lingers = body.coming
        if lingers:
          headers = [*message.get("headers", ()), _CLOSE]
          message = {**message, "headers": headers}
      last = "body" in message and not message.get("more_body")
      if not (lingers and last):
        await send(message)
        return
      await send({**message, "more_body": True})
      invited = body.size > 0 or not body.asks
      try:
        await self._discard(body, _LONGEST if invited else _AT_HAND)
      finally:
        await send({"type": "http.response.body"})

    await self._built(scope, body.receive, tell)

  async def _discard(self, body: _Body, within: float) -> None:
    """Reads what is left of a body, for no more than some seconds."""
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(within):
        while body.coming and body.size <= _DISCARDED:
          await body.receive()


class _Body:
  """What a client sends.

  Attributes:
    asks: whether it waits for a word before it sends (Expect: 100-continue).
    coming: whether there is more of it.
    size: bytes that have come.
  """

  def __init__(self, scope: Scope, receive: Receive) -> None:
    """Has received nothing yet."""
    headers = Headers(scope=scope)
    expected = ",".join(headers.getlist("expect")).lower().split(",")
    self.asks = "100-continue" in (word.strip() for word in expected)
    length = headers.get("content-length", "0")
    self.coming = length != "0" or "transfer-encoding" in headers
    self.size = 0
    self._receive = receive

  async def receive(self) -> Message:
    """The next message, as ASGI has it."""
    message = await self._receive()
    self.coming = bool(message.get("more_body"))
    self.size += len(message.get("body", b""))
    return message
