"""The routes by which other jobs call this one: POST /v1/calls, GET /healthz.

Plain HTTP with a bearer token: between machines it belongs on a network that
nobody else is on, or into a tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mgrpo_jax.decoupled import wire
from mgrpo_jax.decoupled.desk import Desk
from mgrpo_jax.decoupled.errors import ServerError
from mgrpo_jax.serving import service
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.limits import Limits, check_token
from mgrpo_jax.serving.listen import settings

_LIMITS = Limits(
    max_body_bytes=8 * wire.LONGEST_TEXT,
    max_concurrent=1,  # the caller's rollouts bound what comes at once
    max_choices=1,
    requests_per_minute=1,
    deadline=1.0,
    read_deadline=60.0,
    write_deadline=60.0,
)
_MAX_CONNECTIONS = 8192


class _Server(uvicorn.Server):
  """A server that leaves signals to the run."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Captures none."""
    yield


def build(desk: Desk, token: str) -> Starlette:
  """Builds the web application.

  Args:
    desk: answers the calls.
    token: that callers must show; empty for none.

  Returns:
    The ASGI application.
  """

  async def calls(request: Request) -> Response:
    check_token(request.headers.get("authorization", ""), token)
    try:
      body = await service.read_body(request, _LIMITS)
    except service.LeftError:
      return Response(status_code=service.LEFT)
    call = wire.read_call(body)
    found: list[dict[str, Any]] = []

    async def work() -> None:
      found.append(await desk.answer(call))

    try:
      await service.while_there(work(), request.receive)
    except service.LeftError:
      return Response(status_code=service.LEFT)
    return _json(found[0])

  async def health(request: Request) -> Response:
    del request
    return _json({"status": "ok"})

  return Starlette(
      routes=[
          Route("/healthz", health),
          Route("/v1/calls", calls, methods=["POST"]),
      ],
      exception_handlers={RequestError: _refuse},
  )


@contextlib.asynccontextmanager
async def serving(
    desk: Desk,
    where: socket.socket,
    token: str,
    *,
    broken: Callable[[BaseException], None],
) -> AsyncIterator[None]:
  """Answers calls while it is entered.

  Args:
    desk: answers them.
    where: socket, listening.
    token: that callers must show; empty for none.
    broken: is told, once, that no calls are answered any more and why.

  Yields:
    Nothing.
  """
  server = _Server(settings(build(desk, token), _MAX_CONNECTIONS))
  task = asyncio.create_task(server.serve(sockets=[where]))
  watching = asyncio.create_task(_watch(task, desk, broken))
  try:
    yield
  finally:
    watching.cancel()
    server.should_exit = True
    server.force_exit = True
    await asyncio.gather(task, watching, return_exceptions=True)


async def _watch(
    task: asyncio.Task[None],
    desk: Desk,
    broken: Callable[[BaseException], None],
) -> None:
  """Tells when the server ends, or a call has broken this job."""
  failed = asyncio.create_task(desk.failed())
  try:
    await asyncio.wait({task, failed}, return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
      broken(failed.result())
      return
    why = "told to stop" if task.cancelled() else task.exception()
    broken(ServerError(f"this job's server ended, nobody told it to: {why}"))
  finally:
    failed.cancel()


def _json(value: Any) -> Response:
  """A value as a response."""
  return Response(wire.dump(value), media_type="application/json")


def _refuse(request: Request, error: Exception) -> Response:
  """Tells a caller what is wrong."""
  del request
  if not isinstance(error, RequestError):
    raise TypeError(f"no RequestError: {error!r}")
  return Response(
      wire.dump(error.body()),
      status_code=error.status,
      headers=error.headers,
      media_type="application/json",
  )
