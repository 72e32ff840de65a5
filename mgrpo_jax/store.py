"""One bucket: small keys that change atomically, and zarr3 arrays.

`open(url)` works on `file://`, `memory://`, `gs://` and `s3://` through
TensorStore. A key is a relative path; its value is written whole or not at
all. `swap` is compare-and-swap, for whoever shares a bucket with other writers;
no part of a run needs it yet. S3 promises none, so there it is refused rather
than imitated.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from mgrpo_jax import atomic, bucket
from mgrpo_jax.keys import check_key

MAX_CHUNK_BYTES = 64 << 20
_OUTSIDE = re.compile(  # failures that say nothing about what was stored
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|"
    "RESOURCE_EXHAUSTED|ABORTED|CANCELLED"
)


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
    can_swap: whether compare-and-swap is available (not on S3).
  """

  def __init__(
      self,
      kvstore: ts.KvStore,
      bulk: ts.KvStore,
      *,
      url: str,
      can_swap: bool,
  ) -> None:
    """Wraps open key-value stores, one for small keys and one for arrays."""
    self._kvstore = kvstore
    self._bulk = bulk
    self.url = url
    self.can_swap = can_swap
    self._discarded: list[tuple[str, ts.Future]] = []

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
    found = self._wait("read", key, self._kvstore.read(key))
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
    check_key(key)
    self._wait("write", key, self._kvstore.write(key, value))

  def delete(self, key: str) -> None:
    """Removes a key; one that does not exist is left so."""
    check_key(key)
    self._wait("delete", key, self._kvstore.write(key, None))

  def discard(self, prefix: str) -> None:
    """Starts removing every key below a folder and returns at once.

    Removing the sixty files of a small policy can take a quarter of a second;
    `settle` waits for it and says whether it worked.

    Args:
      prefix: folder without trailing slash.

    Raises:
      ValueError: the prefix is not a relative path.
    """
    check_key(prefix)
    below = ts.KvStore.KeyRange(f"{prefix}/", f"{prefix}0")  # '0' follows '/'
    self._discarded.append((prefix, self._bulk.delete_range(below)))

  def settle(self) -> None:
    """Waits until everything discarded is gone.

    Raises:
      StorageError: something cannot be removed.
    """
    while self._discarded:
      prefix, removal = self._discarded.pop(0)
      self._wait("delete", prefix, removal)
      if self.url.startswith("file://"):
        _remove_folders(pathlib.Path(self._kvstore.path) / prefix)

  def list(self, prefix: str = "") -> list[str]:
    """Returns the keys below a folder.

    Args:
      prefix: folder without trailing slash; empty for everything.

    Returns:
      Whole keys, sorted.

    Raises:
      StorageError: the store cannot be read.
      ValueError: the prefix is not a relative path.
    """
    everything = ts.KvStore.KeyRange()
    below = everything
    if prefix:
      check_key(prefix)
      below = ts.KvStore.KeyRange(f"{prefix}/", f"{prefix}0")
    found = self._wait("list", prefix, self._kvstore.list(below))
    return sorted(key.decode("utf-8") for key in found)

  def swap(self, record: Record, value: bytes | None) -> Record | None:
    """Changes a key only if it is still as it was read (compare-and-swap).

    Args:
      record: what `read` returned.
      value: new contents; None removes the key.

    Returns:
      The new record, or None where somebody else was faster.

    Raises:
      StorageError: the store cannot be written, or has no compare-and-swap.
    """
    if not self.can_swap:
      raise atomic.StorageError(
          f"cannot swap {self._where(record.key)}: S3 has no compare-and-swap"
      )
    write = self._kvstore.write(record.key, value, if_equal=record.generation)
    stamp = self._wait("write", record.key, write)
    if not stamp.generation:
      return None
    return Record(key=record.key, value=value, generation=stamp.generation)

  def write_arrays(self, prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as zarr3, all at the same time.

    Arrays appear one by one: write what makes them visible afterwards.

    Args:
      prefix: folder without trailing slash.
      arrays: by name; array `a/b` lies in the folder `prefix/a/b`. They must
        not change until this returns.

    Raises:
      StorageError: the store cannot be written.
      ValueError: a name is not a relative path.
    """
    keys = {name: check_key(f"{prefix}/{name}") for name in arrays}
    opened = {n: self._create(keys[n], array) for n, array in arrays.items()}
    writes = {
        name: self._wait("write", keys[name], target).write(
            arrays[name], can_reference_source_data_indefinitely=True
        )
        for name, target in opened.items()
    }
    for name, write in writes.items():
      self._wait("write", keys[name], write.commit)

  def read_arrays(
      self, prefix: str, names: Iterable[str]
  ) -> dict[str, np.ndarray]:
    """Reads named zarr3 arrays, all at the same time.

    Args:
      prefix: folder without trailing slash.
      names: as given to `write_arrays`.

    Returns:
      Arrays by name.

    Raises:
      CorruptError: an array is missing or cannot be decoded.
      StorageError: the store cannot be read.
      ValueError: a name is not a relative path.
    """
    keys = {name: check_key(f"{prefix}/{name}") for name in names}
    opened = {name: self._open_array(key) for name, key in keys.items()}
    reads = {
        name: self._decode(keys[name], future).read(order="C")
        for name, future in opened.items()
    }
    return {
        name: np.asarray(self._decode(keys[name], future))
        for name, future in reads.items()
    }

  def _create(self, key: str, array: np.ndarray) -> Any:
    """Starts making a zarr3 array."""
    return ts.open(
        {"driver": "zarr3", "metadata": {"codecs": ["bytes"]}},
        kvstore=self._bulk / f"{key}/",
        dtype=array.dtype,
        shape=array.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=_chunk_shape(array)),
        create=True,
        delete_existing=True,
    )

  def _open_array(self, key: str) -> Any:
    """Starts opening a zarr3 array."""
    spec = {"driver": "zarr3", "recheck_cached_data": "open"}
    return ts.open(spec, kvstore=self._bulk / f"{key}/", open=True)

  def _decode(self, key: str, future: ts.Future) -> Any:
    """Waits for a read of an array; what does not decode is corrupt."""
    try:
      return future.result()
    except (OSError, ValueError, RuntimeError) as error:
      outside = isinstance(error, OSError) or _OUTSIDE.match(str(error))
      kind = atomic.StorageError if outside else atomic.CorruptError
      raise kind(
          f"cannot read {self._where(key)}: {atomic.reason(error)}"
      ) from error

  def _wait(self, verb: str, key: str, future: ts.Future) -> Any:
    """Waits for an operation, and says what failed where."""
    try:
      return future.result()
    except (OSError, ValueError, RuntimeError) as error:
      raise atomic.StorageError(
          f"cannot {verb} {self._where(key)}: {atomic.reason(error)}"
      ) from error

  def _where(self, key: str) -> str:
    """Returns the full address of a key."""
    return f"{self.url}/{key}"


def open(url: str) -> Store:
  """Opens a bucket, or a folder of one.

  Args:
    url: `file:///absolute/folder`, `memory://name`, `gs://bucket/folder` or
      `s3://bucket/folder`; see `mgrpo_jax.bucket` for emulators.

  Returns:
    The store. Folders are made when something is written.

  Raises:
    StorageError: the address cannot be used.
    ValueError: the URL is not one of these.
  """
  spec = bucket.spec(url)
  context = _context()
  # Arrays are not flushed one by one: readers check their digests, and sixty
  # flushes take half a second on a busy disk.
  quick = ts.Context({"file_io_sync": False}, context)
  try:
    kvstore = ts.KvStore.open(spec, context=context).result()
    bulk = ts.KvStore.open(spec, context=quick).result()
  except (OSError, ValueError, RuntimeError) as error:
    raise atomic.StorageError(
        f"cannot open {url}: {atomic.reason(error)}"
    ) from error
  plain = url.split("?", 1)[0].rstrip("/")
  return Store(kvstore, bulk, url=plain, can_swap=spec["driver"] != "s3")


def open_folder(path: str | os.PathLike[str]) -> Store:
  """Opens a folder of the local disk, absolute or relative."""
  return open(pathlib.Path(path).absolute().as_uri())


@functools.cache
def _context() -> ts.Context:
  """Returns this process's context, where buckets in memory live."""
  return ts.Context()


def _chunk_shape(array: np.ndarray) -> list[int]:
  """Cuts the first dimension so that a chunk stays below its limit."""
  shape = [max(1, size) for size in array.shape]
  if array.nbytes > MAX_CHUNK_BYTES:
    row = max(1, array.nbytes // shape[0])
    shape[0] = max(1, MAX_CHUNK_BYTES // row)
  return shape


def _remove_folders(path: pathlib.Path) -> None:
  """Removes folders that deleting their files left empty."""
  for folder, _, _ in os.walk(path, topdown=False):
    try:
      os.rmdir(folder)
    except OSError:
      continue  # somebody writes there again
