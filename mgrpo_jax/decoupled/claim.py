"""Which run directory has a policy's job: one at a time.

The member record is the claim. It is written by compare-and-swap, so of two
that take it one is told, and whoever finds another's in its place writes no
more. Where the store has no compare-and-swap it is read back instead.

    the record is of       it may be taken
    nobody                 at once; by a new run directory not where a trained
                           version stands in the bucket
    this run directory     at once: its lock says that the process is gone
    another one            when it has not changed for `patience` seconds; never
                           where a trained version stands in the bucket, which
                           a directory without its checkpoints would replace
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

from mgrpo_jax import atomic, leaves, publish
from mgrpo_jax.decoupled.errors import ClaimedError
from mgrpo_jax.store import Record, Store

_ID_FILE = "job_id.json"
_LOOK = 0.5  # seconds between looks at another's record, at most
_TOLD = 15.0  # seconds of a wait before it is told, then twice as long
_TRIES = 5  # at a record that changes under our hands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Home:
  """A run directory.

  Attributes:
    id: of the directory, wherever it is mounted.
    place: host and path, for people.
  """

  id: str
  place: str


def home_of(path: pathlib.Path) -> Home:
  """Reads which run directory this is; a new one gets an id.

  Args:
    path: of the directory, held by this process.

  Returns:
    The directory.

  Raises:
    StorageError: its id cannot be read or written.
  """
  file = path / _ID_FILE
  if not file.exists():
    atomic.write_json(file, {"home": uuid.uuid4().hex})
  found = atomic.read_json(file)
  if not isinstance(found, dict) or not isinstance(found.get("home"), str):
    raise atomic.CorruptError(f"{file}: no id of a job's run directory")
  return Home(id=found["home"], place=_place_of(path))


def check_new(
    store: Store, *, policy: str, key: str, path: pathlib.Path
) -> None:
  """Sees that a new run directory may train a policy, and changes nothing.

  Records are no proof that nobody has: runs in one process leave none.

  Args:
    store: the bucket.
    policy: that it would train.
    key: of the record.
    path: of the directory that is to be made.

  Raises:
    ClaimedError: another run directory has trained the policy.
    StorageError: the bucket cannot be read.
  """
  _check_untrained(store, policy, store.read(key), _place_of(path))


class Claim:
  """One policy's claim, by one incarnation of its job."""

  def __init__(
      self,
      store: Store,
      *,
      policy: str,
      key: str,
      home: Home,
      incarnation: str,
      every: float,
      patience: float,
      tell: Callable[[str], None],
  ) -> None:
    """Takes nothing yet.

    Args:
      store: the bucket.
      policy: that is claimed.
      key: of the record.
      home: this job's run directory.
      incarnation: of this job's process.
      every: seconds between two beats.
      patience: seconds without a change after which another's claim is void.
      tell: takes a line about a wait.
    """
    self._store = store
    self._policy = policy
    self._key = key
    self._home = home
    self._incarnation = incarnation
    self._every = every
    self._patience = patience
    self._tell = tell

  def take(self, value: bytes) -> None:
    """Writes this job's first record.

    Args:
      value: the record.

    Raises:
      ClaimedError: another run directory has the job.
      StorageError: the bucket cannot be read or written.
    """
    while not self._store.replace(self._free(), value):
      pass  # another one came first: look whose it is now
    if not self._store.can_swap:  # who came at the same moment has written, too
      time.sleep(self._every)
      found = self._store.read(self._key)
      if _told(found.value).get("incarnation") != self._incarnation:
        raise self._lost(found)

  def renew(self, value: bytes) -> None:
    """Writes a later record over this job's own.

    Args:
      value: the record.

    Raises:
      ClaimedError: another process has taken the claim.
      StorageError: the bucket cannot be read or written.
    """
    for left in reversed(range(_TRIES)):
      found = self._store.read(self._key)
      told = _told(found.value)
      if found.value and not told and left:
        continue  # damaged, on its way perhaps
      if told and told["incarnation"] != self._incarnation:
        raise self._lost(found)
      if self._store.replace(found, value):
        return  # else a beat that was given up came late
    raise self._lost(self._store.read(self._key))

  def _free(self) -> Record:
    """The record, once it may be taken."""
    beat = None
    since, tell_at = time.monotonic(), _TOLD
    while True:
      found = self._store.read(self._key)
      told = _told(found.value)
      if found.value is None or told.get("home") == self._home.id:
        return found
      before, beat = beat, (told["incarnation"], told["beat"]) if told else beat
      if before is None:
        _check_untrained(self._store, self._policy, found, self._home.place)
      if before is not None and beat != before:
        raise ClaimedError(
            f"the job of policy {self._policy!r} runs already, from"
            f" {_place(found)}; this run directory is {self._home.place}: give"
            " that one, or another bucket"
        )
      silent = time.monotonic() - since
      if silent > self._patience:
        _check_untrained(self._store, self._policy, found, self._home.place)
        return found  # unless it changes before ours is written
      if silent > tell_at:
        tell_at *= 2
        self._tell(
            f"the job of policy {self._policy!r} was last run from"
            f" {_place(found)}: waits until that has given no sign of life for"
            f" {self._patience:.0f} s (jobs.patience), {silent:.0f} s so far"
        )
      time.sleep(min(self._every, _LOOK))

  def _lost(self, found: Record) -> ClaimedError:
    """What is told when another process has taken the claim."""
    return ClaimedError(
        f"the job of policy {self._policy!r} was taken over by a process that"
        f" runs from {_place(found)}; this one, from {self._home.place}, ends"
        " and publishes nothing more"
    )


def _check_untrained(
    store: Store, policy: str, found: Record, place: str
) -> None:
  """Raises where a directory would replace what another one trained."""
  latest = publish.latest(store, policy)
  if latest is None:  # removed by hand; what it pointed to may be there
    newest = max(publish.versions(store, policy), default=0)
  else:
    newest = latest.number
  if newest > 0:
    where = "" if found.value is None else f" from {_place(found)}"
    raise ClaimedError(
        f"policy {policy!r} was trained to version {newest} in {store.url}"
        f"{where}, which this run directory, {place}, cannot continue:"
        " give that one, or another bucket"
    )


def _place_of(path: pathlib.Path) -> str:
  """A run directory's host and path, for people."""
  return f"{socket.gethostname()}:{path.absolute()}"


def _told(value: bytes | None) -> dict[str, Any]:
  """What a record says; nothing where there is none, or a damaged one."""
  try:
    found = leaves.check_seal(json.loads(value or b"{}"))
  except (KeyError, ValueError, TypeError, RecursionError, atomic.CorruptError):
    return {}
  return found if {"incarnation", "beat"} <= found.keys() else {}


def _place(found: Record) -> str:
  """Where a record says that its job runs."""
  told = _told(found.value)
  return f"{told.get('place', 'an unknown place')!s:.200}"
