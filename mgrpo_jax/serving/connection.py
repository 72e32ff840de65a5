"""A connection that is closed where no request comes.

uvicorn waits for the head of a request for ever, and counts who sends none
among the connections that it may have: silent ones would keep all others out.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_LOOK = 10.0  # seconds between two looks; who is idle at both is cut off


class Connection(H11Protocol):
  """uvicorn's connection, closed after 10 to 20 seconds without a request."""

  def __init__(self, *args: Any, **kwargs: Any) -> None:
    """Makes one that is not connected yet; arguments are uvicorn's."""
    super().__init__(*args, **kwargs)
    self._idle: RequestResponseCycle | None = None  # after which it was
    self._looked = False  # and found it so
    self._look_task: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    """Begins to look."""
    super().connection_made(transport)
    self._look_task = self.loop.call_later(_LOOK, self._look)

  def connection_lost(self, exc: Exception | None) -> None:
    """Looks no more."""
    if self._look_task is not None:
      self._look_task.cancel()
    super().connection_lost(exc)

  def send_400_response(self, msg: str) -> None:
    """Tells of a malformed request, unless an answer to it is on its way."""
    if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
      super().send_400_response(msg)
    else:
      self.transport.close()

  def _look(self) -> None:
    """Closes it if no request has come since the last look."""
    idle = self.cycle is None or self.cycle.response_complete
    if idle and self._looked and self._idle is self.cycle:
      self.transport.close()
      return
    self._looked, self._idle = idle, self.cycle
    self._look_task = self.loop.call_later(_LOOK, self._look)
