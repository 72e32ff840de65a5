"""What the requests of a server share, and how one of them is answered.

Knows ASGI's messages, but neither routes nor sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from mgrpo_jax.metrics import resident_bytes
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.serving import limits as limiting
from mgrpo_jax.serving import response
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.jobs import Look, Order
from mgrpo_jax.serving.limits import Gate, Limits, Rate
from mgrpo_jax.serving.metrics import Metrics
from mgrpo_jax.serving.models import Model, Piece
from mgrpo_jax.serving.response import Reply, Usage
from mgrpo_jax.serving.weights import Weights

_LOG = logging.getLogger(__name__)
LEFT = 499  # status, in metrics only
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]


class Service:
  """What requests share.

  Attributes:
    models: by name.
    limits: that it keeps.
    gate: to the models; closed, nobody new is served.
    metrics: of what was served.
    failure: why the sampler cannot go on; empty as long as it can.
    created: seconds since 1970.
    weights: loads others; None where nobody may have that done.
  """

  def __init__(
      self,
      models: Mapping[str, Model],
      *,
      stats: Callable[[], Mapping[str, Mapping[str, Any]]],
      limits: Limits,
      token: str,
      weights: Weights | None = None,
  ) -> None:
    """Opens the gate.

    Args:
      models: by name.
      stats: `Engine.stats()` by policy.
      limits: to keep.
      token: that clients must send; empty for none.
      weights: loads others; None to let nobody.
    """
    self.models = models
    self.limits = limits
    self.gate = Gate(limits.max_concurrent)
    self.metrics = Metrics()
    self.failure = ""
    self.created = int(time.time())
    self.weights = weights
    self._stats = stats
    self._token = token
    self._rate = Rate(limits.requests_per_minute, time.monotonic)

  def check_client(self, request: Request) -> None:
    """Raises `RequestError` unless the client has sent the token."""
    limiting.check_token(request.headers.get("authorization", ""), self._token)

  def admit(self, request: Request) -> str:
    """Raises `RequestError` unless a request may be looked at now.

    Args:
      request: its headers are there.

    Returns:
      A word for the token that it has, which tells nothing of it.
    """
    self.gate.check_open()
    self.check_client(request)
    self._rate.take()
    sent = request.headers.get("authorization", "")
    return hashlib.blake2b(sent.encode(), digest_size=16).hexdigest()

  def model(self, name: str) -> Model:
    """Looks a model up; raises `RequestError` where there is none."""
    if name not in self.models:
      raise RequestError(
          404,
          f"model: there is no {name[:80]!r}, allowed:"
          f" {', '.join(self.models)}",
          param="model",
          code="model_not_found",
      )
    return self.models[name]

  def metrics_text(self) -> str:
    """Everything that Prometheus wants to know."""
    return self.metrics.text(
        inside=self.gate.inside,
        engines=self._stats(),
        resident=resident_bytes(),
    )

  def error(self, error: Exception) -> RequestError:
    """What a client is told of an error; keeps in mind what broke."""
    if isinstance(error, RequestError):
      return error
    if isinstance(error, EngineError):
      self.failure = str(error)
      return RequestError(503, f"the sampler stopped: {error}")
    if isinstance(error, TimeoutError):
      return RequestError(
          504,
          f"the request took longer than {self.limits.deadline:g} s",
          code="deadline",
      )
    _LOG.error("a request failed", exc_info=error)
    return RequestError(500, "internal error")


class LeftError(Exception):
  """The client is gone, or takes nothing any more."""


@dataclasses.dataclass(kw_only=True)
class _Seen:
  """What is known of a request so far, for the metrics."""

  started: float
  client: str = ""
  model: str = ""
  status: int = 200
  usage: Usage = dataclasses.field(default_factory=Usage)

  def take(self, piece: Piece, metrics: Metrics) -> None:
    """Counts a piece."""
    if piece.sampled_tokens and not self.usage.sampled:
      metrics.first_piece(self.model, time.monotonic() - self.started)
    self.usage = self.usage.plus(piece)


class Endpoint:
  """The ASGI application that answers requests for completions."""

  def __init__(
      self, service: Service, read: Callable[[bytes, Look, int], Order]
  ) -> None:
    """Answers for a service.

    Args:
      service: what its requests share.
      read: `jobs.chat` or `jobs.tokens`, what they are.
    """
    self._service = service
    self._read = read

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers one request, or raises `RequestError` before it said anything."""
    seen, metrics = _Seen(started=time.monotonic()), self._service.metrics
    try:
      await self._answer(Request(scope, receive), send, seen)
    except LeftError:
      seen.status = LEFT
    except asyncio.CancelledError:  # the server ends
      seen.status = 503
      raise
    except Exception as error:
      told = self._service.error(error)
      seen.status = told.status
      raise told from error
    finally:
      metrics.request(seen.model, seen.status, time.monotonic() - seen.started)
      metrics.tokens(seen.model, seen.usage.prompt, seen.usage.sampled)

  async def _answer(self, request: Request, send: Send, seen: _Seen) -> None:
    """Checks everything, then works while the client is there."""
    service = self._service
    seen.client = service.admit(request)
    body = await read_body(request, service.limits)
    order = self._read(body, service.model, service.limits.max_choices)
    seen.model = order.model
    with contextlib.ExitStack() as place:
      place.enter_context(service.gate.enter(order.choices))
      work = (
          self._whole(order, send, seen, place.close)
          if order.stream is None
          else self._stream(order.stream, send, seen, place.close)
      )
      await while_there(work, request.receive)

  async def _whole(
      self, order: Order, send: Send, seen: _Seen, leave: Callable[[], None]
  ) -> None:
    """Sends the answer once it is there; who has it may find room again."""
    pieces: list[Piece] = []
    async with asyncio.timeout(self._service.limits.deadline):
      async with contextlib.aclosing(order.job.pieces(seen.client)) as source:
        async for piece in source:
          seen.take(piece, self._service.metrics)
          pieces.append(piece)
    body = response.dump(order.whole(pieces))
    leave()
    await self._open(send, _JSON)
    await self._push(send, body, more=False)

  async def _stream(
      self, reply: Reply, send: Send, seen: _Seen, leave: Callable[[], None]
  ) -> None:
    """Sends the answer as it comes; an error is the last event."""
    await self._open(send, _EVENTS)
    await self._push(send, response.event(reply.first()), more=True)
    try:
      async with asyncio.timeout(self._service.limits.deadline):
        await self._pour(reply, send, seen)
    except LeftError:
      raise
    except asyncio.CancelledError:  # the server ends, or the client is gone
      told = RequestError(503, "the server is shutting down")
      await self._push(send, response.event(told.body()), more=False)
      raise
    except Exception as error:
      told = self._service.error(error)
      seen.status = told.status
      await self._push(send, response.event(told.body()), more=True)
    leave()
    await self._push(send, response.DONE, more=False)

  async def _pour(self, reply: Reply, send: Send, seen: _Seen) -> None:
    """Sends piece after piece."""
    async with contextlib.aclosing(reply.job.pieces(seen.client)) as source:
      async for piece in source:
        seen.take(piece, self._service.metrics)
        chunk = reply.chunk(piece)
        if chunk is not None:
          await self._push(send, response.event(chunk), more=True)
    if reply.request.include_usage:
      last = response.event(reply.last(seen.usage))
      await self._push(send, last, more=True)

  async def _open(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
    """Begins the response."""
    await send(
        {"type": "http.response.start", "status": 200, "headers": headers}
    )

  async def _push(self, send: Send, body: bytes, *, more: bool) -> None:
    """Sends some of the response, unless the client takes nothing."""
    try:
      async with asyncio.timeout(self._service.limits.write_deadline):
        await send(
            {"type": "http.response.body", "body": body, "more_body": more}
        )
    except OSError as error:  # TimeoutError is one
      raise LeftError from error


async def read_body(request: Request, limits: Limits) -> bytes:
  """Reads a body of JSON, but not for ever and not all of any size.

  Args:
    request: whose body it is.
    limits: on its size and time.

  Returns:
    The body.

  Raises:
    RequestError: it is too large, too slow or of another type.
  """
  kind = request.headers.get("content-type", "")
  if kind.partition(";")[0].strip().lower() != "application/json":
    raise RequestError(
        415, f"content-type: {kind[:80]!r}, allowed: application/json"
    )
  limit, size, parts = limits.max_body_bytes, 0, []
  try:
    async with asyncio.timeout(limits.read_deadline):
      async for part in request.stream():
        size += len(part)
        if size > limit:
          raise RequestError(
              413,
              f"the body has more bytes than are allowed: {limit}",
              code="body_too_large",
          )
        parts.append(part)
  except TimeoutError as error:
    raise RequestError(408, "the body took too long to come") from error
  except ClientDisconnect as error:
    raise LeftError from error
  return b"".join(parts)


async def while_there(
    work: Coroutine[Any, Any, None], receive: Receive
) -> None:
  """Works until done, or until the client has left; then work is cancelled.

  Args:
    work: what the client waits for.
    receive: of its request.

  Raises:
    LeftError: it has left.
  """

  async def leave() -> None:
    while (await receive())["type"] != "http.disconnect":
      pass

  job, gone = asyncio.create_task(work), asyncio.create_task(leave())
  try:
    await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not job.done():
      raise LeftError
    job.result()
  finally:
    job.cancel()
    gone.cancel()
    await asyncio.gather(job, gone, return_exceptions=True)
