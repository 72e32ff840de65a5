"""Another job: finding it, waiting for it, asking it.

Every wait ends: with what was waited for, with `AbsentError` when the job has
given no sign of life for `patience` seconds (see `watch`), or with
`StuckJobsError` when it has waited for this one as long, and neither moved. In
between it is told whom this job waits for. A job that gives signs of life and
brings nothing about is waited for, and told of: nobody can tell it from one
that compiles.
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
from mgrpo_jax.decoupled.errors import StuckJobsError
from mgrpo_jax.decoupled.members import Heart, Member
from mgrpo_jax.decoupled.watch import LOOK, Watch
from mgrpo_jax.sampler.connection import Address, Connection, UnreachableError
from mgrpo_jax.store import Store

T = TypeVar("T")

_FIRST_PAUSE = 0.02  # seconds
_PAUSE = 0.1  # seconds between looks at the bucket: a step waits so long
# Or this share of what was waited: many jobs that wait for long ask seldom.
_SHARE = 0.02
LONGEST_PAUSE = 1.0  # seconds
_LONGEST_REST = 1.0  # seconds until a job that is not ready is asked again
_DAMAGED = (
    5  # looks in a row at a damaged record, before it counts as stored so
)
UNREACHABLE = 15.0  # seconds in which a job does not answer before that is told
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
    self._watch = Watch(store, policy, patience=patience, tell=tell)
    self._patience = patience
    self._token = token
    self._timeout = timeout
    self._max_concurrent = max_concurrent
    self._tell = tell
    self._heart = heart
    self._failing: float | None = None  # since when it does not answer
    self._told_at = UNREACHABLE
    self._connections: dict[str, Connection] = {}
    self._stack = contextlib.AsyncExitStack()

  async def __aenter__(self) -> Self:
    """Asks nothing yet."""
    await self._stack.__aenter__()
    return self

  async def __aexit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    """Closes every connection."""
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
    self._watch.expect()

  async def ready(self, steps: int) -> None:
    """Waits until the job answers calls of a team so many steps old.

    Args:
      steps: that are done.

    Raises:
      AbsentError: it is not there.
    """

    def probe() -> Member | None:
      member = self._watch.read()
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
    async with self._watch.watching():
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
      if problem and self._watch.silence > self._patience:
        raise problem
      await self._watch.check(what)
      self._check_standing(standing, what)
      waited = time.monotonic() - started
      if waited > told:
        told *= 2
        self._tell(
            f"has waited {waited:.0f} s for the {self._watch.name} {what}"
        )
      await asyncio.sleep(pause)
      longest = min(max(_PAUSE, _SHARE * waited), LONGEST_PAUSE)
      pause = min(pause * 1.5, longest)

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
    problem = ""
    async with contextlib.AsyncExitStack() as stack:
      await stack.enter_async_context(self._watch.watching())
      while True:
        member = await self._watch.found()
        if member is not None:
          try:
            found = await self._once(member, path, body)
            self._failing = None
            return found
          except UnreachableError as error:
            problem = str(error)
          except _MovedError:
            problem, self._failing = "", None
        if pause == _FIRST_PAUSE:
          stack.enter_context(self._waiting(what))
        await self._watch.check(what)
        self._check_standing(standing, what, problem)
        if problem:
          self._tell_problem(problem, what)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_REST)

  def _tell_problem(self, problem: str, what: str) -> None:
    """Tells, once for all who ask, why a living job does not answer."""
    now = self._watch.now()
    if self._failing is None:
      self._failing, self._told_at = now, UNREACHABLE
    waited = now - self._failing
    # One that was heard of before its trouble alone: the watch tells of that.
    if waited > self._told_at and self._watch.silence < waited / 2:
      self._told_at = 2 * waited
      self._tell(
          f"has waited {waited:.0f} s for the {self._watch.name} {what};"
          f" it gives signs of life, but: {problem}"
      )

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
        await asyncio.wait({request}, timeout=LOOK)
        now = self._watch.member
        if now is not None and now.incarnation != member.incarnation:
          raise _MovedError
        if not request.done():
          await self._watch.check("to answer")
      return request.result()
    finally:
      request.cancel()
      await asyncio.gather(request, return_exceptions=True)

  async def _connection(self, member: Member) -> Connection:
    """The connection to one incarnation."""
    found = self._connections.get(member.incarnation)
    if found is None:
      found = Connection(self._address(member))
      self._connections[member.incarnation] = found
      await self._stack.enter_async_context(found)
    return found

  def _address(self, member: Member) -> Address:
    """Where one incarnation is asked."""
    try:
      return Address(
          url=f"{member.address}/v1",
          token=self._token,
          max_concurrent=self._max_concurrent,
          timeout=self._timeout,
          attempts=1,  # `post` tries again, wherever the job is then
          name=self.policy,
      )
    except ValueError as error:
      raise UnreachableError(f"its record says {error}") from error

  def _check_standing(
      self, standing: _Standing, what: str, problem: str = ""
  ) -> None:
    """Raises StuckJobsError when each has waited for the other too long."""
    member = self._watch.member
    if not self._heart or not member or member.waits != self._heart.policy:
      standing.wait = None
      return
    wait = (member.incarnation, member.ready, member.wait)
    if wait != standing.wait:
      standing.wait, standing.since = wait, self._watch.now()
    if self._watch.now() - standing.since > self._patience:
      why = f"; or it cannot be asked: {problem}" if problem else ""
      raise StuckJobsError(
          f"{self._watch.name} has waited for {self._patience:.0f} s"
          f" (jobs.patience) for this one {member.wanted}, and this one for it"
          f" {what}: their run directories are of different steps, or what one"
          f" of them wrote into the bucket was lost{why}"
      )


@dataclasses.dataclass
class _Standing:
  """For which wait of the other job this one's has waited, and since when."""

  wait: tuple[str, int, int] | None = None
  since: float = 0.0


class _MovedError(Exception):
  """The job was started again while it was asked."""
