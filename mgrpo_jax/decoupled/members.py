"""Who takes part in a run, where, and whether it is alive.

    <bucket>/members/<policy>/<process>.json

Clocks of different machines are never compared: a job lives while its record
changes. The record is also the job's claim to its policy, see `claim`. It holds
no secret.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import threading
import time
import types
import typing
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Self

from mgrpo_jax import atomic, leaves
from mgrpo_jax.decoupled.claim import Claim, Home
from mgrpo_jax.decoupled.errors import ClaimedError
from mgrpo_jax.keys import check_name
from mgrpo_jax.store import Store

FORMAT = 2
NOT_READY = -1
_LAST = 10.0  # seconds for a beat that is under way when the job leaves


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
    home: id of the run directory that has the job.
    place: that directory's host and path, for people.
    waits: the policy whose job this one waits for; empty for none.
    wanted: what that one is to do, for people.
    wait: another number for every wait.
  """

  policy: str
  process: int
  address: str
  incarnation: str
  beat: int
  ready: int
  time: float
  home: str
  place: str
  waits: str
  wanted: str
  wait: int


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
  for name, kind in typing.get_type_hints(Member).items():
    found = type(getattr(member, name))
    if found is not kind and (kind, found) != (float, int):
      raise ValueError(f"{name} must be of type {kind.__name__}")
  url = urllib.parse.urlsplit(member.address)
  _ = url.port  # raises ValueError where it is none
  if member.policy != policy or url.scheme != "http" or not url.hostname:
    raise ValueError("is not a record of that policy with an http address")


class Heart:
  """Keeps this process's record alive, from a thread; a context manager.

  The thread goes on while the event loop computes, so that a long compilation
  is no sign of death.

  Attributes:
    policy: of this job.
  """

  def __init__(
      self,
      store: Store,
      *,
      policy: str,
      address: str,
      home: Home,
      every: float,
      patience: float,
      tell: Callable[[str], None],
      lost: Callable[[BaseException], None],
  ) -> None:
    """Writes nothing yet.

    Args:
      store: the bucket.
      policy: of this job.
      address: http://host:port, as others reach it.
      home: this job's run directory.
      every: seconds between beats, > 0.
      patience: seconds without a sign of life after which the job of another
        run directory is believed to be gone.
      tell: takes a line about a beat that could not be written.
      lost: is told, once and from the thread, that another process has the
        job, or what else ended the thread.
    """
    self.policy = policy
    self._store = store
    self._every = every
    self._tell = tell
    self._lost = lost
    self._error: ClaimedError | None = None
    self._sure = time.monotonic()  # when the claim was ours for certain
    self._waits: dict[int, tuple[str, str]] = {}
    self._numbers = itertools.count(1)  # of waits
    self._waiting = threading.Lock()
    self._member = Member(
        policy=policy,
        process=0,
        address=address,
        incarnation=uuid.uuid4().hex,
        beat=0,
        ready=NOT_READY,
        time=0.0,
        home=home.id,
        place=home.place,
        waits="",
        wanted="",
        wait=0,
    )
    self._claim = Claim(
        store,
        policy=policy,
        key=key(policy),
        home=home,
        incarnation=self._member.incarnation,
        every=every,
        patience=patience,
        tell=tell,
    )
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> Self:
    """Writes the first record.

    Raises:
      ClaimedError: another run directory has the job.
      StorageError: it cannot be written.
    """
    self._claim.take(self._next())
    self._sure = time.monotonic()
    self._thread.start()
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    """Stops; the record stays, and others see that it changes no more.

    Raises:
      ClaimedError: another process has the job, which comes before any other
        error: whoever sees that one would start this process again.
    """
    del kind, trace
    self._stop.set()
    self._thread.join(_LAST)
    if self._thread.is_alive():
      self._tell(
          f"{self._store.url} does not answer a last heartbeat: this job leaves"
          f" in {_LAST:.0f} s"
      )
      self._store.hurry(_LAST)
      self._thread.join()
    if isinstance(error, Exception):
      self._store.hurry(_LAST)
      with contextlib.suppress(atomic.StorageError):
        self.sure()

  def ready(self, steps: int) -> None:
    """Says at once for how many steps done calls are answered.

    Args:
      steps: their number, or NOT_READY.

    Raises:
      ClaimedError: another process has the job.
      StorageError: it cannot be written.
    """
    if steps != self._member.ready:
      self._beat(ready=steps)

  def sure(self) -> None:
    """Sees that the job is still this process's, before it writes for it.

    Raises:
      ClaimedError: another process has it.
      StorageError: that cannot be found out.
    """
    if self._error is not None:
      raise self._error
    if time.monotonic() - self._sure > 2 * self._every:  # stopped, or cut off
      self._beat()

  @contextlib.contextmanager
  def waiting(self, policy: str, wanted: str) -> Iterator[None]:
    """Says, with the next beat, whom this job waits for.

    Args:
      policy: whose job it waits for.
      wanted: what that one is to do.

    Yields:
      Nothing.
    """
    number = next(self._numbers)
    with self._waiting:
      self._waits[number] = (policy, wanted)
    try:
      yield
    finally:
      with self._waiting:
        del self._waits[number]

  def _run(self) -> None:
    """Beats until told to stop; what cannot be written is tried again."""
    while self._error is None and not self._stop.wait(self._every):
      try:
        self._beat()
      except ClaimedError:
        return
      except atomic.StorageError as error:
        self._tell(f"heartbeat: {error}")
      except Exception as error:  # nobody joins a thread to hear of it
        self._lost(error)
        return

  def _beat(self, **changes: Any) -> None:
    """Writes the record, one beat on."""
    with self._lock:
      began = time.monotonic()
      try:
        self._claim.renew(self._next(**changes))
      except ClaimedError as error:
        if self._error is None:
          self._error = error
          self._lost(error)
        raise
      self._sure = began

  def _next(self, **changes: Any) -> bytes:
    """The record, one beat on."""
    with self._waiting:
      wait = min(self._waits, default=0)
      waits, wanted = self._waits.get(wait, ("", ""))
    self._member = dataclasses.replace(
        self._member,
        beat=self._member.beat + 1,
        time=time.time(),
        waits=waits,
        wanted=wanted,
        wait=wait,
        **changes,
    )
    record = leaves.seal({"format": FORMAT, **dataclasses.asdict(self._member)})
    return json.dumps(record).encode()
