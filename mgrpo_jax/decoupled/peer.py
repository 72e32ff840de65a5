"""Another job: finding it, waiting for it, asking it.

Every wait ends: with what was waited for, or with `AbsentError` when the job
has given no sign of life for `patience` seconds. In between it is told whom
this job waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

from mgrpo_jax.atomic import CorruptError, StorageError
from mgrpo_jax.decoupled import members
from mgrpo_jax.decoupled.errors import AbsentError
from mgrpo_jax.decoupled.members import Member
from mgrpo_jax.sampler.connection import Address, Connection, UnreachableError
from mgrpo_jax.store import Store

T = TypeVar("T")

_FIRST_PAUSE = 0.02  # seconds
_LONGEST_PAUSE = (
    0.1  # seconds between looks at the bucket: a step waits so long
)
_LONGEST_REST = 1.0  # seconds until a job that is not ready is asked again
_LOOK = 0.5  # seconds between looks at the record while a call is under way
_SILENT = 15.0  # seconds without a sign of life before that is told
_LONG = 60.0  # seconds of a wait before it is told, the job being alive


class Peer:
  """One other job, within `async with`.

  Attributes:
    policy: whose job it is.
    sent: bytes of requests that were granted, headers included.
    received: bytes of the answers to them, headers included.
  """

  def __init__(
      self,
      store: Store,
      policy: str,
      *,
      token: str,
      patience: float,
      timeout: float,
      max_concurrent: int,
      tell: Callable[[str], None],
  ) -> None:
    """Connects to nothing yet.

    Args:
      store: the bucket, where the job says where it is.
      policy: whose job it is.
      token: that jobs show each other; empty for none.
      patience: seconds without a sign of life that are borne, > 0.
      timeout: seconds that an answer may take, > 0.
      max_concurrent: requests at the same time, >= 1.
      tell: takes a line about a wait.
    """
    self.policy = policy
    self._store = store
    self._patience = patience
    self._token = token
    self._timeout = timeout
    self._max_concurrent = max_concurrent
    self._tell = tell
    self._member: Member | None = None
    self._changed = time.monotonic()  # when the record last did
    self._told_at = _SILENT
    self._connections: dict[str, Connection] = {}
    self._stack = contextlib.AsyncExitStack()
    self._asking = 0
    self._looker: asyncio.Task[None] | None = None

  async def __aenter__(self) -> Self:
    """Begins to look at the job's record."""
    await self._stack.__aenter__()
    self._looker = asyncio.create_task(self._look_always())
    return self

  async def __aexit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    """Closes every connection."""
    if self._looker is not None:
      self._looker.cancel()
      await asyncio.gather(self._looker, return_exceptions=True)
    await self._stack.__aexit__(kind, error, trace)

  @property
  def sent(self) -> int:
    """Bytes of requests."""
    return sum(one.sent for one in self._connections.values())

  @property
  def received(self) -> int:
    """Bytes of answers."""
    return sum(one.received for one in self._connections.values())

  async def ready(self, steps: int) -> None:
    """Waits until the job answers calls of a team so many steps old.

    Args:
      steps: that are done.

    Raises:
      AbsentError: it is not there.
    """

    def probe() -> Member | None:
      member = self._read()
      return member if member and member.ready == steps else None

    await self.wait(probe, f"to have done {steps} steps")

  async def wait(self, probe: Callable[[], T | None], what: str) -> T:
    """Waits for something that the job brings about.

    Args:
      probe: gives it, or None; runs in a thread.
      what: it is, for the line that tells of the wait.

    Returns:
      What the probe found.

    Raises:
      AbsentError: the job gives no sign of life any more.
      StorageError: the bucket could not be read for as long.
    """
    pause, started, told = _FIRST_PAUSE, time.monotonic(), _LONG
    while True:
      found: T | None = None
      problem: StorageError | None = None
      try:
        found = await asyncio.to_thread(probe)
      except CorruptError:
        raise
      except StorageError as error:  # the bucket may be back in a while
        problem = error
      if found is not None:
        return found
      if problem and time.monotonic() - self._changed > self._patience:
        raise problem
      self._check(what)
      waited = time.monotonic() - started
      if waited > told:
        told *= 2
        self._tell(f"{self._name()}: waits {waited:.0f} s for it {what}")
      await asyncio.sleep(pause)
      pause = min(pause * 1.5, _LONGEST_PAUSE)

  async def post(self, path: str, body: Mapping[str, Any], what: str) -> Any:
    """Asks the job, again while it is away, wherever it comes back.

    Args:
      path: below its address.
      body: JSON values.
      what: is asked, for the line that tells of the wait.

    Returns:
      The JSON that it answers.

    Raises:
      AbsentError: it gives no sign of life any more.
      EngineError: it refuses.
    """
    pause = _FIRST_PAUSE
    self._asking += 1
    try:
      while True:
        member = self._member
        if member is not None:
          with contextlib.suppress(UnreachableError, _MovedError):
            return await self._once(member, path, body)
        self._check(what)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_REST)
    finally:
      self._asking -= 1

  async def _once(
      self, member: Member, path: str, body: Mapping[str, Any]
  ) -> Any:
    """Asks one incarnation; raises _MovedError when there is another."""
    connection = await self._connection(member)
    request = asyncio.create_task(connection.post(path, body))
    try:
      while not request.done():
        await asyncio.wait({request}, timeout=_LOOK)
        now = self._member
        if now is not None and now.incarnation != member.incarnation:
          raise _MovedError
        if not request.done():
          self._check("to answer")
      return request.result()
    finally:
      request.cancel()
      await asyncio.gather(request, return_exceptions=True)

  async def _connection(self, member: Member) -> Connection:
    """The connection to one incarnation."""
    found = self._connections.get(member.incarnation)
    if found is None:
      found = Connection(
          Address(
              url=f"{member.address}/v1",
              token=self._token,
              max_concurrent=self._max_concurrent,
              timeout=self._timeout,
              attempts=1,  # `post` tries again, wherever the job is then
          )
      )
      self._connections[member.incarnation] = found
      await self._stack.enter_async_context(found)
    return found

  async def _look_always(self) -> None:
    """Follows the job's record."""
    while True:
      with contextlib.suppress(StorageError):  # `_check` limits how long
        await asyncio.to_thread(self._read)
      await asyncio.sleep(_LOOK)

  def _read(self) -> Member | None:
    """Reads the record; a changed one is a sign of life."""
    member, before = members.read(self._store, self.policy), self._member
    if member is not None and member != before:
      if before and member.incarnation != before.incarnation:
        self._tell(f"{self._name()} was started again, at {member.address}")
      elif self._told_at > _SILENT:
        self._tell(f"{self._name()} is back, at {member.address}")
      self._member = member
      self._changed = time.monotonic()
      self._told_at = _SILENT
    return member

  def _check(self, what: str) -> None:
    """Tells of a job that is silent; raises AbsentError when it is too long."""
    silent = time.monotonic() - self._changed
    if silent > self._patience:
      raise AbsentError(
          f"{self._name()}: no sign of life for {silent:.0f} s"
          f" (jobs.patience), while this job waited for it {what}; start it"
          " and this one again: they go on"
      )
    if silent > self._told_at:
      self._told_at = 2 * silent
      self._tell(
          f"{self._name()}: no sign of life for {silent:.0f} s, waits for it"
          f" {what}"
      )

  def _name(self) -> str:
    """The job, for people."""
    return f"job of policy {self.policy!r}"


class _MovedError(Exception):
  """The job was started again while it was asked."""
