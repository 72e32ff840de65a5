"""Who takes part in a run, where, and whether it is alive.

    <bucket>/members/<policy>/<process>.json

Clocks of different machines are never compared: a job lives while its record
changes. The record holds no secret.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import types
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any, Self

from mgrpo_jax import atomic, leaves
from mgrpo_jax.keys import check_name
from mgrpo_jax.store import Store

FORMAT = 1
NOT_READY = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
  """What a process says of itself.

  Attributes:
    policy: whose job it is of.
    process: its number in the job.
    address: http://host:port, where it answers calls.
    incarnation: another one whenever the process was started.
    beat: counts up while it lives.
    ready: the number of steps done for which it answers calls; NOT_READY for
      none.
    time: seconds since 1970 by its own clock, for people.
  """

  policy: str
  process: int
  address: str
  incarnation: str
  beat: int
  ready: int
  time: float


def key(policy: str, process: int = 0) -> str:
  """Where a member's record lies."""
  return f"members/{check_name(policy, 'policy')}/{process}.json"


def read(store: Store, policy: str, process: int = 0) -> Member | None:
  """Reads a member's record.

  Args:
    store: the bucket.
    policy: whose job it is of.
    process: its number.

  Returns:
    The member; None where there is none yet.

  Raises:
    CorruptError: the record is none.
    StorageError: it cannot be read.
  """
  where = key(policy, process)
  value = store.get(where)
  if value is None:
    return None
  try:
    body = leaves.check_seal(json.loads(value))
    if body.pop("format") != FORMAT:
      raise ValueError("another format")
    member = Member(**body)
    _check(member, policy)
  except (
      KeyError,
      TypeError,
      ValueError,
      RecursionError,
      atomic.CorruptError,
  ) as error:
    raise atomic.CorruptError(f"{store.url}/{where}: {error}") from error
  return member


def _check(member: Member, policy: str) -> None:
  """Raises ValueError unless a record is one of the policy's."""
  url = urllib.parse.urlsplit(member.address)
  if member.policy != policy or url.scheme != "http" or not url.hostname:
    raise ValueError("is not a record of that policy with an http address")
  if type(member.ready) is not int or type(member.beat) is not int:
    raise ValueError("ready and beat must be whole numbers")


class Heart:
  """Keeps this process's record alive, from a thread; a context manager.

  The thread goes on while the event loop computes, so that a long compilation
  is no sign of death.
  """

  def __init__(
      self,
      store: Store,
      *,
      policy: str,
      address: str,
      every: float,
      tell: Callable[[str], None],
  ) -> None:
    """Writes nothing yet.

    Args:
      store: the bucket.
      policy: of this job.
      address: http://host:port, as others reach it.
      every: seconds between beats, > 0.
      tell: takes a line about a beat that could not be written.
    """
    self._store = store
    self._every = every
    self._tell = tell
    self._member = Member(
        policy=policy,
        process=0,
        address=address,
        incarnation=uuid.uuid4().hex,
        beat=0,
        ready=NOT_READY,
        time=0.0,
    )
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> Self:
    """Writes the first record; raises StorageError where it cannot."""
    self._beat()
    self._thread.start()
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    """Stops; the record stays, and others see that it changes no more."""
    del kind, error, trace
    self._stop.set()
    self._thread.join()

  def ready(self, steps: int) -> None:
    """Says at once for how many steps done calls are answered.

    Args:
      steps: their number, or NOT_READY.

    Raises:
      StorageError: it cannot be written.
    """
    if steps != self._member.ready:
      self._beat(ready=steps)

  def _run(self) -> None:
    """Beats until told to stop; what cannot be written is tried again."""
    while not self._stop.wait(self._every):
      try:
        self._beat()
      except atomic.StorageError as error:
        self._tell(f"heartbeat: {error}")

  def _beat(self, **changes: Any) -> None:
    """Writes the record, one beat on."""
    with self._lock:
      self._member = dataclasses.replace(
          self._member, beat=self._member.beat + 1, time=time.time(), **changes
      )
      record = leaves.seal(
          {"format": FORMAT, **dataclasses.asdict(self._member)}
      )
      value = json.dumps(record).encode()
      self._store.put(key(self._member.policy), value)
