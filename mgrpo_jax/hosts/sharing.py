"""Publishing by all processes of a job, each its own chunks.

    process 0                               every other process
    the order, to begin                     brings its chunks to its host
    reads their digests              <----  says their digests
    looks whether the version is there
    makes the arrays, says to write  ---->  writes its chunks, or how they
                                            differ from those of the base
    writes its own
    reads that all is written        <----  says how it went
    writes manifest and pointer

What is said lies in the key-value store of `jax.distributed`, and all of it is
done in threads beside the training.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mgrpo_jax import atomic, attempts, chunks, deltas, leaves
from mgrpo_jax import manifest as manifests
from mgrpo_jax.bases import Base
from mgrpo_jax.chunks import Parts
from mgrpo_jax.hosts import shards
from mgrpo_jax.hosts.channel import Channel
from mgrpo_jax.hosts.shards import Share
from mgrpo_jax.manifest import Contents
from mgrpo_jax.store import Store

_DESCRIBED, _WRITE, _WRITTEN = "described", "write", "written"
_LAST = 30.0  # seconds for what is under way when this process leaves


class Shared:
  """Weights of which every process writes its part: process 0's `Offer`."""

  def __init__(
      self, params: Any, *, channel: Channel, topic: str, short: bool
  ) -> None:
    """Offers what the others were ordered to share.

    Args:
      params: pytree of `jax.Array`s, which must not change.
      channel: to the other processes.
      topic: of what is said, another one each time.
      short: whether float32 is rounded to bfloat16.
    """
    leaves.list_shards(params)
    self._params = params
    self._channel = channel
    self._topic = topic
    self._short = short
    self._said = False  # whether to write

  def describe(self, store: Store) -> Contents:
    """Joins the digests of all processes.

    Raises:
      SilentError: one does not say them.
      StorageError: one cannot.
    """
    params, self._params = self._params, None  # devices are needed elsewhere
    self._shares = shared = shards.shares(params, short=self._short)
    dtypes = {name: leaf.dtype for name, leaf in leaves.named(params).items()}
    before = {n: dtypes[(*one.stack, n)[0]] for n, one in shared.items()}
    rounded = {
        name: dtype.name
        for name, dtype in sorted(before.items())
        if dtype != shared[name].grid.dtype
    }
    self._parts = shards.held(params, shared, self._channel.process)
    digests = {name: [""] * len(one.owners) for name, one in shared.items()}
    _enter(digests, shared, self._channel.process, _digests(self._parts))
    for process in self._channel.others:
      said = self._hear(_DESCRIBED, process, store)
      _enter(digests, shared, process, said["digests"])
    arrays = {
        name: manifests.describe(one.grid, digests[name])
        for name, one in shared.items()
    }
    laid = {name: one.stack for name, one in shared.items() if one.stack}
    return Contents(arrays=arrays, rounded=rounded, stacks=laid)

  def write(
      self, store: Store, folder: str, base: Base | None, *, keeps: bool
  ) -> Mapping[str, Parts]:
    """Has every process write its chunks, and waits for all.

    Args:
      store: the bucket.
      folder: of the version.
      base: of which every process has its own chunks, to write the difference
        to; None to write the version whole.
      keeps: whether differences to it may be written later.

    Returns:
      The chunks of this process.

    Raises:
      SilentError: one does not say how it went.
      StorageError: one, which is named, could not write.
    """
    grids = {name: one.grid for name, one in self._shares.items()}
    if base is not None:
      grids = {name: deltas.words(grid) for name, grid in grids.items()}
    store.arrays.create(folder, grids)
    self._say(write=True, base=base.version.path if base else None, keeps=keeps)
    problems = []
    try:
      _write(store, folder, self._parts, base.parts if base else None)
    except atomic.StorageError as error:
      problems.append(error)  # but the others write on
    for process in self._channel.others:
      size = shards.nbytes(self._shares, process)
      try:
        self._hear(_WRITTEN, process, store, size / attempts.SLOWEST)
      except atomic.StorageError as error:
        problems.append(error)
    self._channel.forget(f"{self._topic}/{_WRITE}")
    if problems:
      raise problems[0]
    return self._parts

  def close(self) -> None:
    """Has the others write nothing, unless they were told to."""
    if not self._said:
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # they are gone
        self._say(write=False)

  def _say(self, **word: Any) -> None:
    """Tells the others whether to write, and what."""
    self._said = True
    self._channel.say(f"{self._topic}/{_WRITE}", word)

  def _hear(
      self, what: str, process: int, store: Store, more: float = 0.0
  ) -> Mapping[str, Any]:
    """What another process says; raises StorageError where it failed."""
    said = self._channel.listen(
        f"{self._topic}/{what}", process, more=more, limit=store.limit
    )
    if "problem" in said:
      raise atomic.StorageError(
          f"process {process} of this job: {said['problem']}"
      )
    return said


class Helper:
  """Writes this process's part of what process 0 publishes, in a thread."""

  def __init__(self, store: Store, channel: Channel) -> None:
    """Starts with nothing to write.

    Args:
      store: where to.
      channel: from process 0.
    """
    self._store = store
    self._channel = channel
    self._left = threading.Event()
    self._error: BaseException | None = None  # that process 0 has not heard
    self._kept: tuple[str, Mapping[str, Parts]] = "", {}  # a base, and where
    self._thread = concurrent.futures.ThreadPoolExecutor(
        1, thread_name_prefix="publish"
    )

  def begin(self, params: Any, *, topic: str, folder: str, short: bool) -> None:
    """Takes part in a publication, and returns at once.

    Args:
      params: pytree of `jax.Array`s, which must not change.
      topic: of what is said.
      folder: of the version.
      short: whether float32 is rounded to bfloat16.
    """
    leaves.list_shards(params)
    future = self._thread.submit(self._share, [params], topic, folder, short)
    future.add_done_callback(self._end)

  def check(self) -> None:
    """Raises what ended a part in a publication, unless process 0 heard it."""
    if self._error is not None:
      raise self._error

  def _end(self, future: concurrent.futures.Future[None]) -> None:
    """Keeps an error, for nobody waits for the thread; not when it leaves."""
    if not future.cancelled() and not self._left.is_set():
      self._error = self._error or future.exception()

  def close(self) -> None:
    """Writes no more than what is under way, and not for ever."""
    self._left.set()
    self._store.hurry(_LAST)
    self._thread.shutdown(cancel_futures=True)

  def _share(
      self, given: list[Any], topic: str, folder: str, short: bool
  ) -> None:
    """Describes, waits for the word, writes; empties what is given."""
    parts: dict[str, Parts] = {}

    def describe() -> dict[str, Any]:
      params = given.pop()  # so that devices need not keep it meanwhile
      shared = shards.shares(params, short=short)
      parts.update(shards.held(params, shared, self._channel.process))
      return {"digests": _digests(parts)}

    def write() -> dict[str, Any]:
      self._write(folder, parts, word["base"], keeps=word["keeps"])
      return {}

    self._answer(f"{topic}/{_DESCRIBED}", describe)
    # The wait ends with process 0, whose end `jax.distributed` notices.
    word = self._channel.listen(
        f"{topic}/{_WRITE}",
        0,
        more=math.inf,
        limit=lambda: -math.inf if self._left.is_set() else math.inf,
        keeps=True,
    )
    if word["write"]:
      self._answer(f"{topic}/{_WRITTEN}", write)

  def _answer(self, topic: str, work: Callable[[], dict[str, Any]]) -> None:
    """Tells process 0 what work gives, or why it cannot be told."""
    word = _outcome(work)
    try:
      self._channel.say(topic, word)
    except Exception as error:  # too long perhaps, which the reason is not
      self._channel.say(topic, _problem(error))

  def _write(
      self,
      folder: str,
      parts: Mapping[str, Parts],
      base: str | None,
      *,
      keeps: bool,
  ) -> None:
    """Writes this process's chunks, and keeps them if they are a base."""
    if base is None:
      self._kept = (folder, parts) if keeps else ("", {})
    elif base != self._kept[0]:
      raise ValueError(
          f"base: {base} is not kept here, allowed: the last whole"
      )
    before = None if base is None else self._kept[1]
    _write(self._store, folder, parts, before)


def _write(
    store: Store,
    folder: str,
    parts: Mapping[str, Parts],
    base: Mapping[str, Parts] | None,
) -> None:
  """Writes chunks, or their differences to those of a base."""
  written = parts if base is None else deltas.between(parts, base)
  store.arrays.write_parts(folder, written)


def _digests(parts: Mapping[str, Parts]) -> list[str]:
  """Of all chunks that are here, in the order of names and numbers."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    pieces = [one for held in parts.values() for one in held.pieces.values()]
    return list(threads.map(chunks.digest, pieces))


def _enter(
    digests: Mapping[str, list[str]],
    shared: Mapping[str, Share],
    process: int,
    said: Sequence[str],
) -> None:
  """Enters the digests of the chunks that a process writes."""
  places = [(n, at) for n, one in shared.items() for at in one.of(process)]
  for (name, number), digest in zip(places, said, strict=True):
    digests[name][number] = digest


def _outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What work gives, or why it failed in one line: process 0 raises that."""
  try:
    return work()
  except atomic.StorageError as error:
    return {"problem": str(error)}
  except Exception as error:
    return _problem(error)


def _problem(error: Exception) -> dict[str, Any]:
  """What process 0 is told of an error."""
  return {"problem": f"{type(error).__name__}: {atomic.reason(error)}"}
