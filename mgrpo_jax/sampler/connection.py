"""HTTP to one server: bounded concurrency, bounded patience, clear errors.

What may pass (no connection, a deadline, 429, 5xx) is tried again with growing
pauses, or after as long as the server asks to wait; what will not (other 4xx)
is an `EngineError` at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx2

from mgrpo_jax.fields import check
from mgrpo_jax.report.live import printable
from mgrpo_jax.sampler.interface import EngineError

_FIRST_PAUSE = 0.5  # seconds; doubled from one attempt to the next
_LONGEST_PAUSE = 30.0  # seconds
_CONNECT = 10.0  # seconds until there is a connection
_PASSING = (408, 425, 429, 500, 502, 503, 504)
JOB_HEADER = "x-job"  # header of answers between the jobs of a run: the policy
_LONGEST_BODY = 64 * 2**20  # bytes of an answer
_SHOWN = 300  # characters of an error
_LINE = 32  # bytes of the first line of a message and the empty one, about
_NO_JSON = object()
_TOKEN = re.compile(r"[!-~]*")


class UnreachableError(ConnectionError):
  """The server gave no answer in the end; it may give one later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
  """Where a server is, and how it is asked.

  Attributes:
    url: of its interface, with the version: http://127.0.0.1:8000/v1.
    token: that it wants; empty for none.
    max_concurrent: requests at the same time.
    timeout: seconds that an answer may take.
    attempts: how often a request is made in all.
    name: that every answer bears in the header `JOB_HEADER`; what does not
      bear it is somebody else's, and no answer. Empty for whatever answers.

  Raises:
    ValueError: a field is out of range, naming it.
  """

  url: str
  token: str = dataclasses.field(repr=False)
  max_concurrent: int
  timeout: float
  attempts: int
  name: str = ""

  def __post_init__(self) -> None:
    """Checks every field."""
    try:
      parts = httpx2.URL(self.url)
    except httpx2.InvalidURL as error:
      raise ValueError(f"url: {error}, got {self.url!r}") from error
    if parts.scheme not in ("http", "https") or not parts.host:
      raise ValueError(f"url must be http:// or https://, got {self.url!r}")
    if not _TOKEN.fullmatch(self.token):  # which is not to be shown
      raise ValueError("token must be visible ASCII without spaces")
    for name in ("max_concurrent", "attempts"):
      value = getattr(self, name)
      check(name, value, value >= 1, ">= 1")
    check("timeout", self.timeout, 0 < self.timeout < math.inf, "finite, > 0")

  @property
  def root(self) -> str:
    """The url without its version, under which a server's own routes are."""
    return self.url.rstrip("/").removesuffix("/v1")


class Connection:
  """A pool of connections to one server, within `async with`.

  Attributes:
    address: of the server.
    opened: connections made so far; who restarts loses those it had.
    waiting: requests for which there is no connection yet.
    retries: requests that were made again.
    sent: bytes of requests that were granted, headers included; one that is
      refused, as by who is not ready yet, only asks whether to come again.
    received: bytes of the answers to them, likewise.
  """

  def __init__(self, address: Address) -> None:
    """Connects to nothing yet.

    Args:
      address: of the server.
    """
    self.address = address
    self.opened = 0
    self.waiting = 0
    self.retries = 0
    self.sent = 0
    self.received = 0
    self._room = asyncio.Semaphore(address.max_concurrent)
    limits = httpx2.Limits(
        max_connections=address.max_concurrent,
        max_keepalive_connections=address.max_concurrent,
    )
    wanted = {"Authorization": f"Bearer {address.token}"}
    self._client = httpx2.AsyncClient(
        headers=wanted if address.token else {},
        limits=limits,
        timeout=httpx2.Timeout(address.timeout, connect=_CONNECT),
        trust_env=False,  # no proxy, and no other's password
    )

  async def __aenter__(self) -> Self:
    """Opens the pool."""
    await self._client.__aenter__()
    return self

  async def __aexit__(self, *exception: object) -> None:
    """Closes every connection."""
    await self._client.aclose()

  async def get(self, path: str) -> Any:
    """The JSON at a path of the interface; see `ask`."""
    return await self.ask("GET", f"{self.address.url.rstrip('/')}/{path}")

  async def post(self, path: str, body: Mapping[str, Any]) -> Any:
    """The JSON that a path of the interface answers to JSON; see `ask`."""
    where = f"{self.address.url.rstrip('/')}/{path}"
    return await self.ask("POST", where, body)

  async def ask(
      self, method: str, url: str, body: Mapping[str, Any] | None = None
  ) -> Any:
    """Makes a request, again where that may help.

    Args:
      method: of HTTP.
      url: the whole of it.
      body: JSON, or None for none.

    Returns:
      The JSON answered.

    Raises:
      EngineError: the server refuses it.
      UnreachableError: there was no answer in all attempts, or the server asks
        to wait for too long.
    """
    problem = ""
    for attempt in range(self.address.attempts):
      if attempt:
        self.retries += 1
      pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
      pause *= random.uniform(0.5, 1.0)  # not all at the same time again
      try:
        response = await self._once(method, url, body)
      except (httpx2.RequestError, TimeoutError) as error:
        problem = f"{type(error).__name__} {error}".strip()
      else:
        known = self._knows(response)
        if (
            known
            and response.is_success
            and (found := _json(response)) is not _NO_JSON
        ):
          return found
        problem = f"status {response.status_code}: {_told(response)}"
        if not known:
          problem = f"another server answers there: {problem}"
        elif not response.is_success and response.status_code not in _PASSING:
          raise EngineError(f"{url}: {problem}")
        pause = max(pause, _retry_after(response))
        if pause > _LONGEST_PAUSE:
          raise UnreachableError(f"{url}: wants {pause:.0f} s to pass")
      if attempt + 1 < self.address.attempts:
        await asyncio.sleep(pause)
    attempts = self.address.attempts
    raise UnreachableError(
        f"{url}: no answer in {attempts} attempt{'s' * (attempts > 1)}, at last"
        f" {problem}"
    )

  def _knows(self, response: httpx2.Response) -> bool:
    """Whether it is who was asked that answers."""
    name = self.address.name
    return not name or response.headers.get(JOB_HEADER, "") == name

  async def _once(
      self, method: str, url: str, body: Mapping[str, Any] | None
  ) -> httpx2.Response:
    """Makes a request when there is room for it."""
    self.waiting += 1
    try:
      await self._room.acquire()
    finally:
      self.waiting -= 1
    try:
      async with asyncio.timeout(self.address.timeout):
        async with self._client.stream(
            method, url, json=body, extensions={"trace": self._trace}
        ) as response:
          whole = await _whole(response)
          if len(whole.content) > _LONGEST_BODY and self._knows(whole):
            raise EngineError(
                f"{url}: the answer has over {_LONGEST_BODY} bytes"
            )
          if whole.is_success:
            self.sent += _size(response.request.headers.raw, body)
            self.received += _size(response.headers.raw, None)
            self.received += len(whole.content)
          return whole
    finally:
      self._room.release()

  async def _trace(self, event: str, info: Mapping[str, Any]) -> None:
    """Counts new connections."""
    del info
    self.opened += event == "connection.connect_tcp.complete"


def _size(
    headers: Sequence[tuple[bytes, bytes]], body: Mapping[str, Any] | None
) -> int:
  """Bytes of a message: a line, its headers and what it announces."""
  size = _LINE + sum(len(name) + len(value) + 4 for name, value in headers)
  if body is not None:
    size += sum(
        int(value) for name, value in headers if name == b"Content-Length"
    )
  return size


async def _whole(response: httpx2.Response) -> httpx2.Response:
  """Reads a response until it has more bytes than it may have."""
  data = bytearray()
  async for part in response.aiter_bytes():
    data += part
    if len(data) > _LONGEST_BODY:
      break
  kept = {n: response.headers.get(n, "") for n in ("retry-after", JOB_HEADER)}
  return httpx2.Response(
      response.status_code, headers=kept, content=bytes(data)
  )


def _json(response: httpx2.Response) -> Any:
  """The JSON of a response; `_NO_JSON` where it is none, or was cut."""
  try:
    return response.json()
  except (ValueError, RecursionError):
    return _NO_JSON


def _told(response: httpx2.Response) -> str:
  """What a server says is wrong, in one line."""
  found = _json(response)
  error = found.get("error", found) if isinstance(found, dict) else None
  if isinstance(error, dict):
    error = error.get("message")
  text = error if isinstance(error, str) else response.text
  return printable(" ".join(text.split())[:_SHOWN])


def _retry_after(response: httpx2.Response) -> float:
  """Seconds that a server asks to wait; 0 where it does not, or in vain."""
  text = response.headers.get("retry-after", "")
  if text.isdecimal():
    return float(text)
  try:
    then = email.utils.parsedate_to_datetime(text)
  except ValueError:
    return 0.0
  return max(0.0, then.timestamp() - time.time())
