"""Another job: finding it, waiting for it, asking it.

Every wait ends: with what was waited for, with `AbsentError` when the job has
given no sign of life for `patience` seconds, or with `StuckJobsError` when it
has waited for this one as long, and neither moved. In between it is told whom
this job waits for. Only time in which this job could look is counted: not that
in which its event loop computed or its process was stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

from mgrpo_jax.atomic import CorruptError, StorageError
from mgrpo_jax.decoupled import members
from mgrpo_jax.decoupled.errors import AbsentError, StuckJobsError
from mgrpo_jax.decoupled.members import Heart, Member
from mgrpo_jax.sampler.connection import Address, Connection, UnreachableError
from mgrpo_jax.store import Store

T = TypeVar("T")

_FIRST_PAUSE = 0.02  # seconds
_LONGEST_PAUSE = (
    0.1  # seconds between looks at the bucket: a step waits so long
)
_LONGEST_REST = 1.0  # seconds until a job that is not ready is asked again
_LOOK = 0.5  # seconds between looks at the record while a call is under way
_LATE = 2.0  # seconds between looks from which on this job was busy itself
_DAMAGED = (
    5  # looks in a row at a damaged record, before it counts as stored so
)
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
      heart: Heart | None = None,
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
      heart: of this job, which says whom it waits for; None for a process that
        nobody waits for.
    """
    self.policy = policy
    self._store = store
    self._patience = patience
    self._token = token
    self._timeout = timeout
    self._max_concurrent = max_concurrent
    self._tell = tell
    self._heart = heart
    self._member: Member | None = None
    self._away = 0.0  # seconds in which this job could not look
    self._changed = self._now()  # when the record last did
    self._told_at = _SILENT
    self._connections: dict[str, Connection] = {}
    self._stack = contextlib.AsyncExitStack()
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

  def expect(self) -> None:
    """Counts its silence from now on: it need not have been there before."""
    self._changed = self._now()
    self._told_at = _SILENT

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

    done = f"to have done {steps} step{'s' * (steps > 1)}"
    await self.wait(probe, done if steps else "to be ready")

  async def wait(self, probe: Callable[[], T | None], what: str) -> T:
    """Waits for something that the job brings about.

    Args:
      probe: gives it, or None; runs in a thread.
      what: it is, for the line that tells of the wait.

    Returns:
      What the probe found.

    Raises:
      AbsentError: the job gives no sign of life any more.
      CorruptError: what the probe reads is damaged.
      StorageError: the bucket could not be read for as long.
      StuckJobsError: the job waits for this one.
    """
    with self._waiting(what):
      return await self._wait(probe, what)

  async def _wait(self, probe: Callable[[], T | None], what: str) -> T:
    """See `wait`."""
    pause, started, told = _FIRST_PAUSE, time.monotonic(), _LONG
    standing, damaged = _Standing(), 0
    while True:
      found: T | None = None
      problem: StorageError | None = None
      try:
        found = await asyncio.to_thread(probe)
        damaged = 0
      except CorruptError as error:
        damaged += 1  # on its way perhaps, or by a bucket that is at fault
        if damaged == _DAMAGED:
          raise
        problem = error
      except StorageError as error:  # the bucket may be back in a while
        problem = error
      if found is not None:
        return found
      if problem and self._now() - self._changed > self._patience:
        raise problem
      await self._check(what)
      self._check_standing(standing, what)
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
      StorageError: its record cannot be read any more.
      StuckJobsError: it waits for this job.
    """
    pause, standing = _FIRST_PAUSE, _Standing()
    with contextlib.ExitStack() as stack:
      while True:
        member = self._member
        if member is not None:
          with contextlib.suppress(UnreachableError, _MovedError):
            return await self._once(member, path, body)
        if pause == _FIRST_PAUSE:
          stack.enter_context(self._waiting(what))
        await self._check(what)
        self._check_standing(standing, what)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_REST)

  @contextlib.contextmanager
  def _waiting(self, what: str) -> Iterator[None]:
    """Lets the job know, by this one's record, that it is waited for."""
    if not self._heart:
      yield
      return
    with self._heart.waiting(self.policy, what):
      yield

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
          await self._check("to answer")
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
      began = time.monotonic()
      await asyncio.sleep(_LOOK)
      looked = time.monotonic()
      if looked - began > _LATE:  # this job did not look: it was busy, stopped
        self._away += looked - began

  def _read(self) -> Member | None:
    """Reads the record; a changed one is a sign of life."""
    member, before = members.read(self._store, self.policy), self._member
    if member is not None and member != before:
      if before and member.incarnation != before.incarnation:
        self._tell(f"{self._name()} was started again, at {member.address}")
      elif self._told_at > _SILENT:
        self._tell(f"{self._name()} is back, at {member.address}")
      self._member = member
      self._changed = self._now()
      self._told_at = _SILENT
    return member

  async def _check(self, what: str) -> None:
    """Tells of a job that is silent; raises AbsentError when it is too long."""
    if self._now() - self._changed > self._patience:
      await asyncio.to_thread(self._read)  # it may have been us who were away
    silent = self._now() - self._changed
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

  def _check_standing(self, standing: _Standing, what: str) -> None:
    """Raises StuckJobsError when each has waited for the other too long."""
    member = self._member
    if not self._heart or not member or member.waits != self._heart.policy:
      standing.wait = None
      return
    wait = (member.incarnation, member.ready, member.wait)
    if wait != standing.wait:
      standing.wait, standing.since = wait, self._now()
    if self._now() - standing.since > self._patience:
      raise StuckJobsError(
          f"{self._name()} has waited for {self._patience:.0f} s"
          f" (jobs.patience) for this one {member.wanted}, and this one for it"
          f" {what}: their run directories are of different steps, or what one"
          " of them wrote into the bucket was lost"
      )

  def _now(self) -> float:
    """Seconds, those not counted in which this job could not look."""
    return time.monotonic() - self._away

  def _name(self) -> str:
    """The job, for people."""
    return f"job of policy {self.policy!r}"


@dataclasses.dataclass
class _Standing:
  """For which wait of the other job this one's has waited, and since when."""

  wait: tuple[str, int, int] | None = None
  since: float = 0.0


class _MovedError(Exception):
  """The job was started again while it was asked."""
