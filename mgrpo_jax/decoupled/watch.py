"""What another job's record says of it, while somebody waits for that job.

Only time in which this job looked is counted as the other's silence: not that
in which nobody waited, this job's event loop computed or its process was
stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable

from mgrpo_jax.atomic import StorageError
from mgrpo_jax.decoupled import members
from mgrpo_jax.decoupled.errors import AbsentError
from mgrpo_jax.decoupled.members import Member
from mgrpo_jax.store import Store

LOOK = 0.5  # seconds between looks at the record
_LATE = 2.0  # seconds between looks from which on this job was busy, stopped
_SILENT = 15.0  # seconds without a sign of life before that is told


class Watch:
  """Looks at a job's record.

  Attributes:
    member: the record as it was read last; None before there was one.
    name: of the job, for people.
  """

  def __init__(
      self,
      store: Store,
      policy: str,
      *,
      patience: float,
      tell: Callable[[str], None],
  ) -> None:
    """Looks at nothing yet.

    Args:
      store: the bucket, where the record is.
      policy: whose job it is of.
      patience: seconds without a sign of life that are borne, > 0.
      tell: takes a line about the job.
    """
    self.member: Member | None = None
    self.name = f"job of policy {policy!r}"
    self._store = store
    self._policy = policy
    self._patience = patience
    self._tell = tell
    self._away = 0.0  # seconds in which this job did not look
    self._changed = self.now()  # when the record last did
    self._told_at = _SILENT
    self._watchers = 0
    self._unwatched = time.monotonic()  # since when there are none
    self._looked = -math.inf  # when the record was read last
    self._tasks: list[asyncio.Task[None]] = []

  @contextlib.asynccontextmanager
  async def watching(self) -> AsyncIterator[None]:
    """Looks again and again, however many have entered this.

    Yields:
      Nothing.
    """
    self._watchers += 1
    if self._watchers == 1:
      self._away += time.monotonic() - self._unwatched
      self._tasks = [
          asyncio.create_task(self._look_always()),
          asyncio.create_task(self._notice_absences()),
      ]
    try:
      yield
    finally:
      self._watchers -= 1
      if not self._watchers:
        self._unwatched = time.monotonic()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
          task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

  def expect(self) -> None:
    """Counts silence from now on: the job need not have been there before."""
    self._changed = self.now()
    self._told_at = _SILENT

  @property
  def silence(self) -> float:
    """Seconds without a sign of life."""
    return self.now() - self._changed

  def now(self) -> float:
    """Seconds, those not counted in which this job did not look."""
    return time.monotonic() - self._away

  def read(self) -> Member | None:
    """Reads the record; a changed one is a sign of life.

    Returns:
      The record; None where there is none.

    Raises:
      CorruptError: it is damaged.
      StorageError: it cannot be read.
    """
    member, before = members.read(self._store, self._policy), self.member
    if member is not None and member != before:
      if before and member.incarnation != before.incarnation:
        self._tell(f"{self.name} was started again, at {member.address}")
      elif self._told_at > _SILENT:
        self._tell(f"{self.name} is back, at {member.address}")
      self.member = member
      self._changed = self.now()
      self._told_at = _SILENT
    self._looked = time.monotonic()
    return member

  async def found(self) -> Member | None:
    """Says where the job was a moment ago, as far as it can be read.

    Returns:
      Its record; None where there is none.
    """
    if time.monotonic() - self._looked > 2 * LOOK:
      with contextlib.suppress(StorageError):
        await asyncio.to_thread(self.read)
    return self.member

  async def check(self, what: str) -> None:
    """Tells of silence.

    Args:
      what: is waited for.

    Raises:
      AbsentError: it lasts longer than patience.
      StorageError: the record cannot be read by now.
    """
    for task in self._tasks:
      if task.done():
        task.result()  # it never ends but by an error
    if self.silence > self._patience:
      await asyncio.to_thread(self.read)  # it may have been us who were away
    silent = self.silence
    if silent > self._patience:
      raise AbsentError(
          f"{self.name}: no sign of life for {silent:.0f} s"
          f" (jobs.patience), while this job waited for it {what}; start it"
          " and this one again: they go on"
      )
    if silent > self._told_at:
      self._told_at = 2 * silent
      self._tell(
          f"no sign of life from the {self.name} for {silent:.0f} s, while this"
          f" one waits for it {what}; gives it up after {self._patience:.0f} s"
          " (jobs.patience)"
      )

  async def _look_always(self) -> None:
    """Follows the record."""
    while True:
      with contextlib.suppress(StorageError):  # `check` limits how long
        await asyncio.to_thread(self.read)
      await asyncio.sleep(LOOK)

  async def _notice_absences(self) -> None:
    """Counts the time in which this job could do nothing at all.

    Reading is another task's, so that a bucket that does not answer is not
    taken for that.
    """
    while True:
      began = time.monotonic()
      await asyncio.sleep(LOOK)
      passed = time.monotonic() - began
      if passed > _LATE:
        self._away += passed
