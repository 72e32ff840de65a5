"""The server's process: from a socket to a shutdown that drops nobody."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import types
from collections.abc import Callable, Mapping

import uvicorn
from starlette.types import ASGIApp

from mgrpo_jax.serving import app
from mgrpo_jax.serving.connection import Connection
from mgrpo_jax.serving.limits import Gate
from mgrpo_jax.serving.service import Service
from mgrpo_jax.serving.under_way import UnderWay

_LOOK = 0.05  # seconds between two looks at who is still being served
_KEEP_ALIVE = 5  # seconds that an idle connection stays open
_GRACE = 1.0  # seconds for who is refused or reads the end of an answer
_LAST_WORDS = 2  # seconds in which answers must be out, sampling being over
_BACKLOG = 256


class _Server(uvicorn.Server):
  """A server that asks what to do about signals."""

  def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
    """Listens to nothing yet."""
    super().__init__(config)
    self._stop = stop

  def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
    """Stops gracefully; asked again, at once."""
    del sig, frame
    self._stop()


def bind(host: str, port: int) -> socket.socket:
  """Takes a port.

  Args:
    host: name or address.
    port: 0 for any.

  Returns:
    The socket, listening.

  Raises:
    OSError: it cannot be had.
    ValueError: there is no such port.
  """
  if not 0 <= port < 2**16:
    raise ValueError(f"--port={port}: allowed: 0 to 65535")
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def settings(
    built: ASGIApp,
    max_connections: int,
    headers: Mapping[str, str] = types.MappingProxyType({}),
) -> uvicorn.Config:
  """How every server here behaves.

  Args:
    built: the application.
    max_connections: more get 503.
    headers: of every answer.

  Returns:
    The settings.
  """
  return uvicorn.Config(
      built,
      lifespan="off",
      http=Connection,
      ws="none",
      log_config=None,
      log_level="warning",
      access_log=False,
      proxy_headers=False,
      server_header=False,
      headers=list(headers.items()),
      limit_concurrency=max_connections,
      timeout_keep_alive=_KEEP_ALIVE,
      timeout_graceful_shutdown=_LAST_WORDS,
  )


async def listen(
    service: Service,
    where: socket.socket,
    *,
    stopping: asyncio.Event,
    drain: float,
    max_connections: int,
) -> None:
  """Serves until told to stop, by SIGTERM, SIGINT or the event.

  Then new requests get 503, and those under way are finished within a limit;
  what is left is cancelled. A second signal cancels at once.

  Args:
    service: what requests share.
    where: socket, listening.
    stopping: set to stop.
    drain: seconds that requests under way may take after that.
    max_connections: more get 503.
  """
  loop = asyncio.get_running_loop()
  hurry = asyncio.Event()

  def stop() -> None:
    event = hurry if stopping.is_set() else stopping
    loop.call_soon_threadsafe(event.set)

  requests = UnderWay(app.build(service))
  server = _Server(settings(requests, max_connections), stop)
  serving = asyncio.create_task(server.serve(sockets=[where]))
  told = asyncio.create_task(stopping.wait())
  try:
    await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
    service.gate.close()
    await _drained(service.gate, hurry, drain)
    server.should_exit = True
    await requests.close(0.0 if hurry.is_set() else _GRACE)
    await serving
  finally:
    told.cancel()
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await serving


async def _drained(gate: Gate, hurry: asyncio.Event, limit: float) -> None:
  """Waits until nobody is served any more, but not for ever."""
  end = time.monotonic() + limit
  while gate.inside and time.monotonic() < end and not hurry.is_set():
    await asyncio.sleep(_LOOK)
