"""An array of the store: a folder in the zarr3 format, in chunks.

They are raw, or packed: compressed by blosc, which lays bytes of equal
significance side by side and has zstd at its quickest squeeze them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from mgrpo_jax.chunks import Grid

MOST_PACKED = 2**31 - 17  # bytes of a chunk; blosc counts with 32 bits
_ALIGNED = 64  # bytes


def create(kvstore: ts.KvStore, key: str, grid: Grid) -> ts.Future:
  """Starts making the place for an array, or opens it where it is made.

  An array of another shape or dtype must be removed before. `delete_existing`
  would have TensorStore remove whatever the server lists, which with servers
  that ignore the bounds of a listing is everything.
  """
  codecs: list[Any] = ["bytes"]
  if grid.packed:
    codecs.append({"name": "blosc", "configuration": _blosc(grid)})
  return ts.open(
      {"driver": "zarr3", "metadata": {"codecs": codecs}},
      kvstore=kvstore / f"{key}/",
      dtype=grid.dtype,
      shape=grid.shape,
      chunk_layout=ts.ChunkLayout(chunk_shape=grid.chunk),
      open=True,
      create=True,
  )


def open(kvstore: ts.KvStore, key: str) -> ts.Future:
  """Starts opening an array."""
  spec = {"driver": "zarr3", "recheck_cached_data": "open"}
  return ts.open(spec, kvstore=kvstore / f"{key}/", open=True)


def write(target: Any, array: np.ndarray) -> ts.Future:
  """Starts writing all of an array, which must not change until it is done."""
  return target.write(array, can_reference_source_data_indefinitely=True).commit


def region(source: Any, where: Sequence[slice]) -> Any:
  """A part of an open array."""
  return source[tuple(where)][ts.d[:].translate_to[0]] if where else source


def nbytes(source: Any) -> int:
  """Returns the size in bytes of an open array."""
  return source.size * source.dtype.numpy_dtype.itemsize


class Room:
  """Memory for readings, in one piece, which is faster to get than many.

  Numpy asks for huge pages where a piece is large; most arrays are not. Each
  reading has a part for itself, for one that was given up may write there
  later; so aligned that jax need not copy it.
  """

  def __init__(self, sources: Iterable[Any]) -> None:
    """Makes room to read each of some open arrays once."""
    self._left = _aligned(sum(_padded(nbytes(one)) for one in sources))

  def take(self, size: int) -> np.ndarray:
    """Gives so many bytes away; others than planned come from elsewhere."""
    if _padded(size) > self._left.size:
      return _aligned(size)
    part, self._left = self._left[:size], self._left[_padded(size) :]
    return part


class Reading:
  """A read of all of an array, as a future."""

  def __init__(self, source: Any, room: Room) -> None:
    """Starts reading an open array."""
    part = room.take(nbytes(source))
    self._into = part.view(source.dtype.numpy_dtype).reshape(source.shape)
    self._future = ts.array(self._into).write(source).commit

  def result(self, timeout: float) -> np.ndarray:
    """Waits so many seconds for the array."""
    self._future.result(timeout=timeout)
    return self._into

  def cancel(self) -> None:
    """Gives it up."""
    self._future.cancel()


def _aligned(size: int) -> np.ndarray:
  """So many bytes, from an address that is aligned."""
  room = np.empty(size + _ALIGNED, np.uint8)
  start = -room.ctypes.data % _ALIGNED
  return room[start : start + size]


def _padded(size: int) -> int:
  """Bytes up to the next address that is aligned."""
  return -(-size // _ALIGNED) * _ALIGNED


def _blosc(grid: Grid) -> dict[str, Any]:
  """How an array's chunks are compressed."""
  return {
      "cname": "zstd",
      "clevel": 1,
      "shuffle": "shuffle",
      "typesize": grid.dtype.itemsize,
      "blocksize": 0,  # blosc's own choice
  }
