"""The arrays of a store: many of them, or parts of them, at the same time."""

from __future__ import annotations

import collections
import contextlib
import functools
import pathlib
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from mgrpo_jax import atomic, attempts, chunks, disk, readings, zarr
from mgrpo_jax.chunks import Grid, Parts, Pile
from mgrpo_jax.keys import check_key

_COPIED = 64 << 20  # bytes of chunks that are put together to be written
_MOMENT = 5.0  # seconds for other writes, where one has failed


class Wait(Protocol):
  """`Store`'s way to wait for an operation on a key."""

  def __call__(
      self,
      verb: str,
      key: str,
      start: Callable[[], attempts.Pending],
      *,
      started: attempts.Pending | None = None,
      nbytes: int = 0,
  ) -> Any:
    """Waits, and says what failed where."""


class Arrays:
  """The zarr3 arrays of one store, in folders, by name.

  Array `a/b` of the folder `f` lies in `f/a/b`. What is written appears one by
  one: write what makes it visible afterwards.
  """

  def __init__(
      self,
      kvstore: ts.KvStore,
      wait: Wait,
      clear: Callable[[str, Iterable[str]], object],
      root: pathlib.Path | None,
  ) -> None:
    """Begins with nothing open.

    Args:
      kvstore: where they lie.
      wait: for every operation.
      clear: removes what lies in some folders of a folder.
      root: its folder, where it is one of the local disk.
    """
    self._kvstore = kvstore
    self._wait = wait
    self._clear = clear
    self._root = root

  def write(
      self, folder: str, arrays: Mapping[str, np.ndarray | Parts]
  ) -> None:
    """Writes arrays; see `Store.write_arrays`."""
    parts = {
        name: held
        if isinstance(held, Parts)
        else chunks.parts(held, chunks.grid(held))
        for name, held in arrays.items()
    }
    grids = {name: held.grid for name, held in parts.items()}
    self._write(folder, self.create(folder, grids), parts)

  def create(self, folder: str, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """Makes empty arrays in the place of what lies there.

    Args:
      folder: without trailing slash.
      grids: by name.

    Returns:
      Open arrays by name.

    Raises:
      StorageError: the store cannot be written.
      ValueError: a name is not a relative path.
    """
    self._clear(folder, [_key(folder, name) for name in grids])
    return self._create(folder, grids)

  def write_parts(self, folder: str, parts: Mapping[str, Parts]) -> None:
    """Writes chunks of arrays that were made by `create`, maybe elsewhere.

    Args:
      folder: without trailing slash.
      parts: by name; they must not change until this returns.

    Raises:
      StorageError: the store cannot be written.
      ValueError: a name is not a relative path.
    """
    grids = {name: held.grid for name, held in parts.items() if held.pieces}
    self._write(folder, self._create(folder, grids), parts)

  def _write(
      self,
      folder: str,
      opened: Mapping[str, Any],
      parts: Mapping[str, Parts],
  ) -> None:
    """Writes chunks of open arrays."""
    starts: dict[str, Callable[[], attempts.Pending]] = {}
    sizes: dict[str, int] = {}
    copies: dict[str, int] = {}
    for name, held in parts.items():
      for number, piece in held.pieces.items():
        key = f"{_key(folder, name)}/{held.grid.key(number)}"
        target = zarr.region(opened[name], held.grid.where(number))
        starts[key] = functools.partial(zarr.write, target, piece)
        sizes[key] = piece.nbytes
        copies[key] = piece.nbytes if isinstance(piece, Pile) else 0
    self._all("write", starts, sizes, self._hasten, copies)

  def read(
      self,
      folder: str,
      names: Iterable[str],
      seen: Callable[[str, np.ndarray], object],
      forms: Mapping[str, Grid],
  ) -> dict[str, np.ndarray]:
    """Reads all of some arrays; see `Store.read_arrays`."""
    with _corrupt():
      opened = self._open(folder, names, forms)
      named = {_key(folder, name): name for name in opened}
      found = self._fetch(
          {key: opened[name] for key, name in named.items()},
          lambda key, array: seen(named[key], array),
      )
    return {named[key]: array for key, array in found.items()}

  def read_parts(
      self,
      folder: str,
      wanted: Mapping[str, tuple[Grid, Sequence[int]]],
      seen: Callable[[str, Parts], object],
  ) -> dict[str, Parts]:
    """Reads chunks of arrays.

    Args:
      folder: without trailing slash.
      wanted: by name, what the array must be and the numbers of its chunks.
      seen: is told of each array whose chunks are here.

    Returns:
      Those chunks of each array, by name.

    Raises:
      CorruptError: an array is missing, another, or cannot be decoded.
      StorageError: the store cannot be read.
      ValueError: a name is not a relative path.
    """
    found = {}
    with _corrupt():
      forms = {name: grid for name, (grid, _) in wanted.items()}
      opened = self._open(folder, wanted, forms)
      places = {
          f"{_key(folder, name)}/{grid.key(number)}": zarr.region(
              opened[name], grid.where(number)
          )
          for name, (grid, numbers) in wanted.items()
          for number in numbers
      }
      pieces = self._fetch(places)
    for name, (grid, numbers) in wanted.items():
      key = _key(folder, name)
      mine = {n: pieces[f"{key}/{grid.key(n)}"] for n in numbers}
      found[name] = Parts(grid=grid, pieces=mine)
      seen(name, found[name])
    return found

  def _hasten(self, key: str, _: None) -> None:
    """Has a chunk that is written go on to the disk, where there is one."""
    if self._root is not None:
      disk.hasten(str(self._root / key))

  def _create(self, folder: str, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """Makes arrays, or opens them where they are made."""
    starts = {
        _key(folder, name): functools.partial(
            zarr.create, self._kvstore, _key(folder, name), grid
        )
        for name, grid in grids.items()
    }
    found = self._all("write", starts, {})
    return {name: found[_key(folder, name)] for name in grids}

  def _open(
      self, folder: str, names: Iterable[str], forms: Mapping[str, Grid]
  ) -> dict[str, Any]:
    """Opens arrays that are there; raises where one has another form."""
    keys = {name: _key(folder, name) for name in names}
    starts = {
        key: functools.partial(zarr.open, self._kvstore, key)
        for key in keys.values()
    }
    found = self._all("read", starts, {})
    opened = {name: found[key] for name, key in keys.items()}
    for name, form in forms.items():
      one = opened[name]
      if (one.shape, one.dtype.numpy_dtype) != (form.shape, form.dtype):
        raise atomic.CorruptError(f"{folder}/{name} is another array")
      cut = one.chunk_layout.write_chunk.shape or ()
      if any(n > most for n, most in zip(cut, form.chunk, strict=True)):
        raise atomic.CorruptError(f"{folder}/{name} is cut otherwise")
    return opened

  def _fetch(
      self,
      sources: Mapping[str, Any],
      done: Callable[[str, np.ndarray], object] = lambda *_: None,
  ) -> dict[str, np.ndarray]:
    """Reads open arrays, or regions of them, by key."""
    try:
      room = readings.Room(sources.values())
    except MemoryError as error:  # of numpy, which says how much it is
      more = f"{next(iter(sources))} and {len(sources) - 1} more"
      raise atomic.StorageError(f"cannot read {more}: {error}") from error
    return self._all(
        "read",
        {
            k: functools.partial(readings.Reading, o, room)
            for k, o in sources.items()
        },
        {k: zarr.nbytes(one) for k, one in sources.items()},
        done,
    )

  def _all(
      self,
      verb: str,
      starts: Mapping[str, Callable[[], attempts.Pending]],
      sizes: Mapping[str, int],
      done: Callable[[str, Any], object] = lambda *_: None,
      copies: Mapping[str, int] = types.MappingProxyType({}),
  ) -> dict[str, Any]:
    """Does something to many keys at the same time, and waits for all.

    Args:
      verb: what, for errors.
      starts: begins it, by key.
      sizes: bytes that are moved, by key.
      done: is told of each.
      copies: bytes of memory that some take until they are done, by key; not
        many more than `_COPIED` are taken.

    Returns:
      What came of it, by key.
    """
    found, begun = {}, dict[str, attempts.Pending]()
    left, taken = collections.deque(starts), 0
    try:
      for key, start in starts.items():
        while left and taken < _COPIED:
          begun[left[0]] = starts[left[0]]()
          taken += copies.get(left.popleft(), 0)
        found[key] = self._wait(
            verb, key, start, started=begun[key], nbytes=sizes.get(key, 0)
        )
        del begun[key]
        taken -= copies.get(key, 0)
        done(key, found[key])
    except atomic.StorageError:
      if verb == "write":
        _finish(begun.values())
      raise
    finally:
      for one in begun.values():
        one.cancel()  # nobody waits for it any more
    return found


def _key(folder: str, name: str) -> str:
  """Where an array lies."""
  return check_key(f"{folder}/{name}")


def _finish(begun: Iterable[attempts.Pending]) -> None:
  """Waits a moment for what is under way, so that it can be removed."""
  end = time.monotonic() + _MOMENT
  for one in begun:
    with contextlib.suppress(OSError, RuntimeError, ValueError):
      one.result(timeout=max(0.0, end - time.monotonic()))


@contextlib.contextmanager
def _corrupt() -> Iterator[None]:
  """Says that what cannot be decoded is corrupt."""
  try:
    yield
  except attempts.UndecodedError as error:
    raise atomic.CorruptError(str(error)) from error
