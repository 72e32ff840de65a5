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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mgrpo_jax.serving import response, service
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.limits import Limits, check_token
from mgrpo_jax.serving.lingering import Lingering
from mgrpo_jax.serving.listen import settings

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
_LAST = 2.0  # seconds in which requests that are cut short must end
_ENDS = RequestError(503, "this process ends", retry_after=1)


class Server(uvicorn.Server):
  """A server that leaves signals to the run."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Captures none."""
    yield


class _Requests:
  """The requests under way of an application, which can be cut short.

  uvicorn logs a request that ends by cancellation as it does a bug, with its
  traceback. Here none does: who is cut short is told 503.
  """

  def __init__(self, built: ASGIApp) -> None:
    """Has none."""
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
        with contextlib.suppress(asyncio.CancelledError):
          await self._built(scope, receive, tell)
      if not begun:
        await _told(_ENDS)(scope, receive, send)
    finally:
      self._tasks.discard(task)

  async def close(self) -> None:
    """Cuts short what is under way, and whatever comes later."""
    self._closed = True
    for task in self._tasks:
      task.cancel()
    if self._tasks:
      await asyncio.wait(self._tasks.copy(), timeout=_LAST)


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
      exception_handlers={RequestError: _refuse},
  )
  return Lingering(routes, _LIMITS)


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
  requests = _Requests(built)
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


def _json(body: bytes, **more: Any) -> Response:
  """A response of JSON."""
  return Response(body, media_type="application/json", **more)


async def _refuse(request: Request, error: Exception) -> Response:
  """Tells a caller what is wrong; not in a thread, as it would if it were def.

  A thread would be left behind where the request is cut short.
  """
  del request
  if not isinstance(error, RequestError):
    raise TypeError(f"no RequestError: {error!r}")
  return _told(error)


def _told(error: RequestError) -> Response:
  """An error as a response."""
  return _json(
      response.dump(error.body()),
      status_code=error.status,
      headers=error.headers,
  )
