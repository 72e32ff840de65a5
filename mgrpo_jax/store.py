"""One bucket: small keys that change atomically, and zarr3 arrays.

`open(url)` takes `file://`, `memory://`, `gs://` and `s3://` (TensorStore). A
key is a relative path; its value is written whole or not at all. `swap` is
compare-and-swap, for whoever shares a bucket with other writers: a file's lock,
a generation on GCS, a conditional PUT on S3. Servers that ignore conditions
(some emulators) are found out by asking; there it is refused, not imitated.

Operations end: failures of a server are retried for as long as `open` is told
(`attempts`), then named. Several threads may use a store at a time.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from mgrpo_jax import atomic, attempts, bucket, locks, removal
from mgrpo_jax.arrays import Arrays
from mgrpo_jax.chunks import Grid, Parts
from mgrpo_jax.keys import check_key, is_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """A key as it was read.

  Attributes:
    key: the key.
    value: its bytes; None where the key does not exist.
    generation: opaque mark of this very state, for `Store.swap`.
  """

  key: str
  value: bytes | None
  generation: bytes


class Store:
  """A bucket, or a folder of one. Made by `open`.

  Attributes:
    url: where it is, without a trailing slash.
    arrays: its arrays, also in parts.
  """

  def __init__(
      self,
      kvstore: ts.KvStore,
      bulk: ts.KvStore,
      whole: ts.KvStore | None,
      url: str,
      patience: float,
  ) -> None:
    """Wraps open key-value stores.

    Args:
      kvstore: for small keys.
      bulk: for arrays.
      whole: all of the bucket that `kvstore` is a folder of, where it is a
        server's; None for a disk or memory.
      url: where it is.
      patience: seconds that an operation may take.
    """
    self._kvstore, self._whole = kvstore, whole
    self.url = url
    self._patience, self._limit = patience, math.inf
    self._local: pathlib.Path | None = None
    if url.startswith("file://"):
      self._local = pathlib.Path(kvstore.path)
    self._removal = removal.Removal(bulk, self._local)
    self.arrays = Arrays(bulk, self._wait, self._clear, self._local)
    self._asking = threading.Lock()
    self._can_swap: bool | None = whole is None or None  # None: not asked yet

  @property
  def can_swap(self) -> bool:
    """Whether compare-and-swap is available; a server is asked once.

    Raises:
      StorageError: the store cannot be written.
    """
    with self._asking:
      if self._can_swap is None:
        self._can_swap = self._keeps_conditions()
    return self._can_swap

  def limit(self) -> float:
    """When every operation ends at the latest, by `time.monotonic`."""
    return self._limit

  def hurry(self, seconds: float) -> None:
    """Has every operation end so many seconds from now; for who leaves."""
    self._limit = min(self._limit, time.monotonic() + seconds)

  def read(self, key: str) -> Record:
    """Reads a key and the generation it is at.

    Args:
      key: relative path.

    Returns:
      The record; its value is None where the key does not exist.

    Raises:
      StorageError: the store cannot be read.
      ValueError: the key is not a relative path.
    """
    check_key(key)
    found = self._wait("read", key, lambda: self._kvstore.read(key))
    value = bytes(found.value) if found.state == "value" else None
    return Record(key=key, value=value, generation=found.stamp.generation)

  def get(self, key: str) -> bytes | None:
    """Returns the value of a key, None where it does not exist."""
    return self.read(key).value

  def put(self, key: str, value: bytes) -> None:
    """Writes a key, whole or not at all.

    Args:
      key: relative path.
      value: its new contents.

    Raises:
      StorageError: the store cannot be written.
      ValueError: the key is not a relative path.
    """
    locks.empty(self._local, check_key(key))
    self._wait("write", key, lambda: self._kvstore.write(key, value))

  def delete(self, key: str) -> None:
    """Removes a key, if there is such a key."""
    check_key(key)
    self._wait("delete", key, lambda: self._kvstore.write(key, None))

  def discard(self, prefix: str) -> None:
    """Starts removing every key below a folder; `settle` waits for it.

    Args:
      prefix: folder without trailing slash.

    Raises:
      StorageError: the store cannot be read.
      ValueError: the prefix is not a relative path.
    """
    self._removal.begin(self._listed(check_key(prefix)), [prefix])

  def settle(self) -> None:
    """Waits until everything discarded is gone.

    Raises:
      StorageError: something cannot be removed.
    """
    self._removal.settle(self._wait)

  def list(self, prefix: str = "") -> list[str]:
    """Returns the keys below a folder.

    Args:
      prefix: folder without trailing slash; empty for everything.

    Returns:
      Whole keys, sorted. What other programs keep there under names that are no
      keys, as `.nfs0001`, is not among them.

    Raises:
      StorageError: the store cannot be read.
      ValueError: the prefix is not a relative path.
    """
    return [key for key in self._listed(prefix) if is_key(key)]

  def _listed(self, prefix: str) -> Sequence[str]:
    """Whatever lies below a folder; bytes that are no text are escaped."""
    folder = f"{check_key(prefix)}/" if prefix else ""
    # TensorStore strips its own folder from whatever a server lists, and some
    # servers list more than they were asked for: so whole keys are asked for.
    where, root = self._kvstore, ""
    if self._whole is not None:
      where, root = self._whole, self._kvstore.path
    start = f"{root}{folder}"
    below = ts.KvStore.KeyRange()
    if start:  # ending with '/', which '0' follows
      below = ts.KvStore.KeyRange(start, f"{start[:-1]}0")
    found = self._wait("list", prefix, lambda: where.list(below))
    keys = (os.fsdecode(key) for key in found)
    return sorted(k.removeprefix(root) for k in keys if k.startswith(start))

  def taken(self, prefix: str) -> int | None:
    """Returns the bytes that a folder of the local disk takes.

    Args:
      prefix: folder without trailing slash.

    Returns:
      The sum of what files hold that do not vanish meanwhile; None for
      servers and memory, whose listings tell no sizes.

    Raises:
      ValueError: the prefix is not a relative path.
    """
    if self._local is None:
      return None
    total = 0
    for folder, _, names in os.walk(self._local / check_key(prefix)):
      for name in names:
        with contextlib.suppress(OSError):
          total += os.stat(os.path.join(folder, name)).st_size
    return total

  def swap(self, record: Record, value: bytes | None) -> Record | None:
    """Changes a key only if it is still as it was read (compare-and-swap).

    A server's answer can be lost after it did what it was asked, and the
    retry then finds the key changed. So on a server, a key that holds `value`
    counts as changed by us: writers that compete must write different values.

    Args:
      record: what `read` returned.
      value: new contents; None removes the key, which S3 does not do
        conditionally.

    Returns:
      The new record, or None where somebody else was faster.

    Raises:
      StorageError: the store cannot be written, or has no compare-and-swap.
    """
    if not self.can_swap or (value is None and self.url.startswith("s3://")):
      raise atomic.StorageError(
          f"cannot swap {self.url}/{record.key}: there is no"
          " compare-and-swap here"
      )
    stamp = self._write_if(record, value)
    if stamp.generation:
      return Record(key=record.key, value=value, generation=stamp.generation)
    if self._whole is None or value == record.value:
      return None
    found = self.read(record.key)
    return found if found.value == value else None

  def replace(self, record: Record, value: bytes) -> bool:
    """Writes a key that nobody else should have changed since it was read.

    Where there is compare-and-swap, neither does a write that was given up
    and arrives late undo a later one. Elsewhere this is `put`.

    Args:
      record: what `read` returned.
      value: new contents.

    Returns:
      Whether it was as it was read; one with the value is not looked at again.

    Raises:
      StorageError: the store cannot be written.
    """
    if self.can_swap:
      return value == record.value or self.swap(record, value) is not None
    self.put(record.key, value)
    return True

  def write_arrays(
      self, prefix: str, arrays: Mapping[str, np.ndarray | Parts]
  ) -> None:
    """Writes named arrays as zarr3, all at the same time.

    Arrays appear one by one: write what makes them visible afterwards.

    Args:
      prefix: folder without trailing slash.
      arrays: by name, or all chunks; array `a/b` lies in `prefix/a/b`. They
        must not change until this returns.

    Raises:
      StorageError: the store cannot be written.
      ValueError: a name is not a relative path.
    """
    self.arrays.write(prefix, arrays)

  def read_arrays(
      self,
      prefix: str,
      names: Iterable[str],
      seen: Callable[[str, np.ndarray], object] = lambda *_: None,
      forms: Mapping[str, Grid] | None = None,
  ) -> dict[str, np.ndarray]:
    """Reads named zarr3 arrays, all at the same time.

    Args:
      prefix: folder without trailing slash.
      names: as given to `write_arrays`.
      seen: is told of each array while others are being read.
      forms: what some of them must be; nothing is read where one is not.

    Returns:
      Arrays by name.

    Raises:
      CorruptError: an array is missing, another, or cannot be decoded.
      StorageError: the store cannot be read.
      ValueError: a name is not a relative path.
    """
    return self.arrays.read(prefix, names, seen, forms or {})

  def _clear(self, prefix: str, folders: Iterable[str]) -> None:
    """Removes what lies in folders below a prefix."""
    self._removal.begin(removal.below(self._listed(prefix), folders), folders)
    self.settle()

  def _keeps_conditions(self) -> bool:
    """Asks the server whether it minds a condition that does not hold."""
    key = f"conditions/{uuid.uuid4().hex}"
    self.put(key, b"1")
    absent = self.read(f"{key}.not").generation
    other = Record(key=key, value=None, generation=absent)
    try:
      return not self._write_if(other, b"2").generation
    finally:
      self.delete(key)

  def _write_if(self, record: Record, value: bytes | None) -> Any:
    """Writes on the condition that a key is as it was read."""
    key, mark = record.key, record.generation
    locks.empty(self._local, key)
    return self._wait(
        "write", key, lambda: self._kvstore.write(key, value, if_equal=mark)
    )

  def _wait(
      self,
      verb: str,
      key: str,
      start: Callable[[], attempts.Pending],
      *,
      started: attempts.Pending | None = None,
      nbytes: int = 0,
  ) -> Any:
    """Waits for an operation, and says what failed where."""
    return attempts.wait(
        start,
        what=f"{verb} {self.url}/{key}",
        patience=self._patience,
        nbytes=nbytes,
        started=started,
        limit=self.limit,
    )


def open(url: str, *, patience: float = attempts.PATIENCE) -> Store:
  """Opens a bucket, or a folder of one.

  Args:
    url: `file:///absolute/folder`, `memory://name`, `gs://bucket/folder` or
      `s3://bucket/folder`; see `mgrpo_jax.bucket` for emulators.
    patience: seconds that an operation of a server may take, retries included
      (and a second more for every MiB of an array).

  Returns:
    The store. Folders are made when something is written.

  Raises:
    StorageError: the address cannot be used.
    ValueError: the URL is not one of these.
  """
  spec = bucket.spec(url)
  context = attempts.context()
  # Arrays are not flushed one by one: readers check their digests, and sixty
  # flushes take half a second on a busy disk. Nor are they locked (`locks`).
  unlocked = {"file_io_sync": False, "file_io_locking": {"mode": "none"}}
  quick = ts.Context(unlocked, context)
  try:
    kvstore = ts.KvStore.open(spec, context=context).result()
    bulk = ts.KvStore.open(spec, context=quick).result()
    whole = None
    if spec["driver"] in ("gcs", "s3"):
      whole = ts.KvStore.open(spec | {"path": ""}, context=context).result()
  except (OSError, ValueError, RuntimeError) as error:
    raise atomic.StorageError(
        f"cannot open {url}: {atomic.reason(error)}"
    ) from error
  plain = url.split("?", 1)[0].rstrip("/")
  return Store(kvstore, bulk, whole, plain, patience)


def open_folder(path: str | os.PathLike[str]) -> Store:
  """Opens a folder of the local disk."""
  return open(pathlib.Path(path).absolute().as_uri())
