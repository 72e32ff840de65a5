"""Who may ask, how much and how often."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import ipaddress
import math
from collections.abc import Callable, Iterator

from mgrpo_jax.fields import check
from mgrpo_jax.serving.errors import RequestError

SHORTEST_TOKEN = 16  # characters; what can be guessed protects nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a server bears; nothing waits longer than these say.

  Attributes:
    max_body_bytes: of a request.
    max_concurrent: choices in progress at the same time.
    max_choices: n of a request.
    requests_per_minute: of all clients together; a minute's worth may come at
      once.
    deadline: seconds that a request may take.
    read_deadline: seconds in which its body must have come.
    write_deadline: seconds in which a client must take what it is sent.
  """

  max_body_bytes: int
  max_concurrent: int
  max_choices: int
  requests_per_minute: int
  deadline: float
  read_deadline: float
  write_deadline: float

  def __post_init__(self) -> None:
    """Checks every field."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == "int":
        check(field.name, value, value >= 1, ">= 1")
      else:
        check(field.name, value, 0 < value < math.inf, "finite and > 0")
    check(
        "max_choices",
        self.max_choices,
        self.max_choices <= self.max_concurrent,
        f"at most max_concurrent, {self.max_concurrent}",
    )


class Gate:
  """Lets a limited number of choices be in progress; can be closed.

  Attributes:
    inside: choices in progress.
    closed: whether the server ends.
    warming: whether it has yet to begin.
  """

  def __init__(self, limit: int) -> None:
    """Opens with nobody inside.

    Args:
      limit: choices.
    """
    self._limit = limit
    self.inside = 0
    self.closed = False
    self.warming = False

  def close(self) -> None:
    """Lets nobody in any more; who is inside may finish."""
    self.closed = True

  def check_open(self) -> None:
    """Raises `RequestError`, status 503, unless requests may come in."""
    if self.closed:
      raise RequestError(
          503, "the server is shutting down", code="shutting_down"
      )
    if self.warming:
      raise RequestError(
          503,
          "the server is warming up; try again",
          code="warming_up",
          retry_after=1,
      )

  @contextlib.contextmanager
  def enter(self, count: int) -> Iterator[None]:
    """Counts choices in, and out again.

    Args:
      count: choices.

    Yields:
      Nothing.

    Raises:
      RequestError: they do not fit, status 429, or the gate is closed.
    """
    self.check_open()
    if self.inside + count > self._limit:
      raise RequestError(
          429,
          f"{self.inside} of {self._limit} choices are in progress, and"
          f" {count} more do not fit; try again",
          code="server_full",
          retry_after=1,
      )
    self.inside += count
    try:
      yield
    finally:
      self.inside -= count


class Rate:
  """Lets so many requests pass in a minute, as many at once after a pause."""

  def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
    """Starts after a pause.

    Args:
      per_minute: requests.
      clock: seconds, never going back.
    """
    self._per_minute = per_minute
    self._clock = clock
    self._left = float(per_minute)
    self._then = clock()

  def take(self) -> None:
    """Counts one request.

    Raises:
      RequestError: there were too many, status 429.
    """
    now = self._clock()
    gained = (now - self._then) * self._per_minute / 60
    self._left = min(float(self._per_minute), self._left + gained)
    self._then = now
    if self._left < 1:
      wait = (1 - self._left) * 60 / self._per_minute
      raise RequestError(
          429,
          f"more than {self._per_minute} requests in a minute; try again in"
          f" {wait:.1f} s",
          code="rate_limit_exceeded",
          retry_after=math.ceil(wait),
      )
    self._left -= 1


def check_token(header: str, token: str) -> None:
  """Checks a client's token in a time that does not depend on its letters.

  Args:
    header: `Authorization` of the request, empty where it has none.
    token: that is wanted; empty for none.

  Raises:
    RequestError: it is another, status 401.
  """
  if not token:
    return
  scheme, _, given = header.partition(" ")
  same = hmac.compare_digest(given.strip().encode(), token.encode())
  if scheme.lower() != "bearer" or not same:
    raise RequestError(
        401,
        "a bearer token is needed, and this is not it"
        if header
        else "a bearer token is needed: Authorization: Bearer TOKEN",
        code="invalid_api_key",
    )


def check_exposure(host: str, token: str) -> None:
  """Checks that nobody but this machine is served without a token.

  Args:
    host: address or name that is listened at.
    token: that clients must send; empty for none.

  Raises:
    ValueError: others can reach it and there is no token, or it is too short.
  """
  if token and (len(token) < SHORTEST_TOKEN or not token.isascii()):
    raise ValueError(
        f"token: has {len(token)} characters, must have at least"
        f" {SHORTEST_TOKEN}, all of them ASCII"
    )
  if not token and not _is_loopback(host):
    raise ValueError(
        f"host: {host!r} can be reached from other machines, which needs a"
        " token; or listen at 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
  """Whether a host is certainly this machine alone."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"
