"""Readings of a store's arrays: into what memory, and from where.

Of a local disk, chunks that lie there as they are go straight to their place,
for TensorStore reads a file into memory of its own, which it finds anew for
many, and copies it from there. It reads whatever else there is, and says what a
chunk means that is not there.
"""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from mgrpo_jax import chunks, disk, zarr
from mgrpo_jax.chunks import Grid

_RAW = (  # codecs of elements as they are; the second, of single bytes
    [{"name": "bytes", "configuration": {"endian": "little"}}],
    [{"name": "bytes"}],
)
_KEYS = {"name": "default"}  # of chunks: `Grid.key`
_MOST = 1 << 16  # files of an array; each is an object here until it is read


class Room:
  """Memory for readings, in one piece, which is faster to get than many.

  Numpy asks for huge pages where a piece is large; most arrays are not. Each
  reading has a part for itself, for one that was given up may write there
  later; so aligned that jax need not copy it, nor a disk's driver.
  """

  def __init__(self, sources: Iterable[Any]) -> None:
    """Makes room to read each of some open arrays once."""
    self._left = _aligned(sum(_padded(zarr.nbytes(one)) for one in sources))

  def take(self, size: int) -> np.ndarray:
    """Gives so many bytes away; others than planned come from elsewhere."""
    if _padded(size) > self._left.size:
      return _aligned(size)
    part, self._left = self._left[:size], self._left[_padded(size) :]
    return part


class Reading:
  """A read of all of an array, or of a region of one, as a future."""

  def __init__(self, source: Any, room: Room) -> None:
    """Starts reading an open array."""
    part = room.take(zarr.nbytes(source))
    self._into = part.view(source.dtype.numpy_dtype).reshape(source.shape)
    files = _files(source, self._into)
    self._left: list[Any] = [
        disk.threads("read").submit(_read_file, file) for file in files or ()
    ]
    if files is None:
      self._left = [_copy(source, self._into)]

  def result(self, timeout: float) -> np.ndarray:
    """Waits so many seconds for the array."""
    end = time.monotonic() + timeout
    while self._left:
      self._left[-1].result(timeout=max(0.0, end - time.monotonic()))
      self._left.pop()
    return self._into

  def cancel(self) -> None:
    """Gives it up."""
    for one in self._left:
      one.cancel()


class _File(NamedTuple):
  """A file that begins with what is wanted.

  Attributes:
    path: of the file.
    size: its bytes.
    into: where its beginning goes.
    source: the same in TensorStore.
  """

  path: str
  size: int
  into: np.ndarray
  source: Any


def _copy(source: Any, into: np.ndarray) -> ts.Future:
  """Starts reading an open array by TensorStore."""
  return ts.array(into).write(source).commit


def _read_file(file: _File) -> None:
  """Reads a file straight, or as TensorStore does."""
  straight = file.into.reshape(-1).view(np.uint8)
  try:
    disk.read(file.path, straight, size=file.size)
  except OSError:
    _copy(file.source, file.into).result()


def _files(source: Any, into: np.ndarray) -> list[_File] | None:
  """Finds the files of an array's chunks.

  Args:
    source: an open array, or a region of one.
    into: memory for it, of its shape.

  Returns:
    A file for each chunk; None where there are no files, or one does not hold,
    byte after byte, what goes to one place.
  """
  spec = source.spec().to_json()
  said, where = spec["metadata"], spec["kvstore"]
  if (
      where["driver"] != "file"
      or said["codecs"] not in _RAW
      or said["chunk_key_encoding"] != _KEYS
  ):
    return None
  chunk = tuple(said["chunk_grid"]["configuration"]["chunk_shape"])
  grid = Grid(shape=tuple(said["shape"]), dtype=into.dtype, chunk=chunk)
  if len(grid) > _MOST:
    return None
  size = chunks.nbytes(grid)
  domain = source.domain
  bounds = [*zip(domain.inclusive_min, domain.exclusive_max, strict=True)]
  files = []
  for number in grid.within([slice(*one) for one in bounds]):
    box = grid.where(number)
    pairs = [*zip(box, bounds, strict=True)]
    place: Any = (slice(b.start - low, b.stop - low) for b, (low, _) in pairs)
    part = into[*place, ...]  # a view, also of a single number
    if (
        any(b.start < low or b.stop > high for b, (low, high) in pairs)
        or part.shape[1:] != chunk[1:]
        or not part.flags.c_contiguous
    ):
      return None
    path = where["path"] + grid.key(number)
    files.append(_File(path, size, part, source[box]))
  return files


def _aligned(size: int) -> np.ndarray:
  """So many bytes, from an address that is aligned."""
  room = np.empty(size + disk.PAGE, np.uint8)
  start = -room.ctypes.data % disk.PAGE
  return room[start : start + size]


def _padded(size: int) -> int:
  """Bytes up to the next address that is aligned."""
  return -(-size // disk.PAGE) * disk.PAGE
