"""Servers between the processes of a run: JSON in, JSON out, one token.

Plain HTTP with a bearer token: between machines it belongs on a network that
nobody else is on, or into a tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import types
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
)
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mgrpo_jax.serving import response, service
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.limits import Limits, check_token
from mgrpo_jax.serving.lingering import Lingering
from mgrpo_jax.serving.listen import settings
from mgrpo_jax.serving.refusing import refuse
from mgrpo_jax.serving.under_way import UnderWay

Answer = Callable[[bytes], Coroutine[Any, Any, bytes]]

_LIMITS = Limits(
    max_body_bytes=8 << 20,
    max_concurrent=1,  # the caller's rollouts bound what comes at once
    max_choices=1,
    requests_per_minute=1,
    deadline=1.0,
    read_deadline=60.0,
    write_deadline=60.0,
)
_MAX_CONNECTIONS = 8192


class Server(uvicorn.Server):
  """A server that leaves signals to the run."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Captures none."""
    yield


def build(answers: Mapping[str, Answer], token: str) -> ASGIApp:
  """Builds the web application: GET /healthz, and what is answered.

  Args:
    answers: by path, makes of the body of a POST the JSON that it is answered;
      cancelled when the caller is gone, raises `RequestError` to refuse it.
    token: that callers must show; empty for none.

  Returns:
    The ASGI application.
  """

  async def health(request: Request) -> Response:
    del request
    return _json(response.dump({"status": "ok"}))

  routes = Starlette(
      routes=[
          Route("/healthz", health),
          *(
              Route(path, _endpoint(answer, token), methods=["POST"])
              for path, answer in answers.items()
          ),
      ],
      exception_handlers={RequestError: refuse},
  )
  return Lingering(routes)


@contextlib.asynccontextmanager
async def serving(
    built: ASGIApp,
    where: socket.socket,
    *,
    failed: Callable[[], Coroutine[Any, Any, BaseException]],
    ended: Callable[[str], BaseException],
    broken: Callable[[BaseException], None],
    headers: Mapping[str, str] = types.MappingProxyType({}),
) -> AsyncIterator[None]:
  """Answers requests while it is entered.

  Those that are under way when it is left get 503, and have ended before
  whatever was entered earlier is left.

  Args:
    built: the application.
    where: socket, listening.
    failed: waits until what answers cannot go on, and gives the reason.
    ended: makes an error of why the server ended by itself.
    broken: is told, once, that nothing is answered any more and why.
    headers: of every answer, those of errors included.

  Yields:
    Nothing.
  """
  requests = UnderWay(built)
  server = Server(settings(requests, _MAX_CONNECTIONS, headers))
  task = asyncio.create_task(server.serve(sockets=[where]))

  async def watch() -> None:
    failing = asyncio.create_task(failed())
    try:
      await asyncio.wait({task, failing}, return_when=asyncio.FIRST_COMPLETED)
      if failing.done():
        broken(failing.result())
        return
      why = "told to stop" if task.cancelled() else task.exception()
      broken(ended(f"server ended, nobody told it to: {why}"))
    finally:
      failing.cancel()

  watching = asyncio.create_task(watch())
  try:
    yield
  finally:
    watching.cancel()
    server.should_exit = True
    server.force_exit = True
    await requests.close()  # while what they ask is still there
    await asyncio.gather(task, watching, return_exceptions=True)


def _endpoint(
    answer: Answer, token: str
) -> Callable[[Request], Awaitable[Response]]:
  """Checks who asks, and answers while somebody is there to hear it."""

  async def endpoint(request: Request) -> Response:
    check_token(request.headers.get("authorization", ""), token)
    found: list[bytes] = []
    try:
      body = await service.read_body(request, _LIMITS)

      async def work() -> None:
        found.append(await answer(body))

      await service.while_there(work(), request.receive)
    except service.LeftError:
      return Response(status_code=service.LEFT)
    return _json(found[0])

  return endpoint


def _json(body: bytes) -> Response:
  """A response of JSON."""
  return Response(body, media_type="application/json")
