"""How an array is cut into chunks, and what some of them hold.

A grid of equal boxes covers an array; those at its ends may reach beyond it and
are cut off there. Chunks are numbered in C order of the grid.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import blake3
import numpy as np

from mgrpo_jax.disk import PAGE

MAX_BYTES = 16 << 20  # of a chunk
_FINER = 4  # times as many chunks as MAX_BYTES asks for, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """An array's form, and how it is cut.

  Attributes:
    shape: of the array.
    dtype: of the array.
    chunk: shape of a chunk, every size at least 1.
    packed: whether chunks are compressed where they are stored.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  chunk: tuple[int, ...]
  packed: bool = False

  @functools.cached_property
  def counts(self) -> tuple[int, ...]:
    """Chunks along each dimension."""
    pairs = zip(self.shape, self.chunk, strict=True)
    return tuple(-(-size // step) for size, step in pairs)

  def __len__(self) -> int:
    """How many chunks there are."""
    return math.prod(self.counts)

  def index(self, number: int) -> tuple[int, ...]:
    """Where a chunk stands in the grid."""
    found = []
    for count in reversed(self.counts):
      number, one = divmod(number, count)
      found.append(one)
    return tuple(reversed(found))

  def where(self, number: int) -> tuple[slice, ...]:
    """What a chunk covers of the array."""
    return tuple(
        slice(at * step, min((at + 1) * step, size))
        for at, step, size in zip(
            self.index(number), self.chunk, self.shape, strict=True
        )
    )

  def within(self, region: Sequence[slice]) -> list[int]:
    """Numbers of the chunks that a region touches, ascending.

    Args:
      region: a slice for each dimension, without steps.

    Returns:
      Their numbers.
    """
    bounds = zip(region, self.shape, self.chunk, strict=True)
    spans = []
    for one, size, step in bounds:
      start, end, _ = one.indices(size)
      spans.append(range(start // step, -(-end // step)))
    strides = [math.prod(self.counts[axis + 1 :]) for axis in range(len(spans))]
    return [
        sum(at * stride for at, stride in zip(index, strides, strict=True))
        for index in itertools.product(*spans)
    ]

  def key(self, number: int) -> str:
    """The key of a chunk below its array's, as zarr3 has it."""
    return "/".join(["c", *map(str, self.index(number))])


class Pile:
  """Equal arrays that are one upon another, without a copy; numpy makes it."""

  def __init__(self, layers: Sequence[np.ndarray]) -> None:
    """Piles arrays up, one at least."""
    self.layers = layers

  @property
  def nbytes(self) -> int:
    """Of all arrays."""
    return sum(one.nbytes for one in self.layers)

  def __array__(
      self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    """Copies them into one array, along a new first axis."""
    if copy is False:
      raise ValueError("copy: a pile is copied")
    return np.stack(self.layers, dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """Some chunks of an array, on this host; read like an array.

  Attributes:
    grid: of the array.
    pieces: what chunks hold, by number; piles only where they are written.
  """

  grid: Grid
  pieces: Mapping[int, np.ndarray | Pile]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array."""
    return self.grid.shape

  @property
  def dtype(self) -> np.dtype:
    """Of the array."""
    return self.grid.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of these chunks."""
    return sum(piece.nbytes for piece in self.pieces.values())

  def astype(self, dtype: Any) -> Parts:
    """The same chunks in another dtype."""
    return Parts(
        grid=dataclasses.replace(self.grid, dtype=np.dtype(dtype)),
        pieces={n: np.asarray(p).astype(dtype) for n, p in self.pieces.items()},
    )

  def __getitem__(self, region: Sequence[slice]) -> np.ndarray:
    """Puts a region together.

    Args:
      region: a slice for each dimension, without steps; its chunks are here.

    Returns:
      The region, a copy unless it is one chunk.

    Raises:
      KeyError: a chunk that it touches is not here.
    """
    bounds = [
        one.indices(size)[:2]
        for one, size in zip(region, self.shape, strict=True)
    ]
    numbers = self.grid.within(region)
    if len(numbers) == 1 and _bounds(self.grid, numbers[0]) == bounds:
      return np.asarray(self.pieces[numbers[0]])
    found = np.empty([end - start for start, end in bounds], self.dtype)
    for number in numbers:
      into, out = [], []
      for (start, end), (low, high) in zip(
          bounds, _bounds(self.grid, number), strict=True
      ):
        first, last = max(start, low), min(end, high)
        into.append(slice(first - start, last - start))
        out.append(slice(first - low, last - low))
      found[tuple(into)] = np.asarray(self.pieces[number])[tuple(out)]
    return found


def grid(array: Any) -> Grid:
  """Cuts an array along its first dimension, into chunks below `MAX_BYTES`.

  Args:
    array: what has a shape and a dtype.

  Returns:
    The grid; one chunk where that is enough.
  """
  shape, dtype = tuple(array.shape), np.dtype(array.dtype)
  chunk = [max(1, size) for size in shape]
  size = math.prod(shape) * dtype.itemsize
  if size > MAX_BYTES:
    chunk[0] = rows(chunk[0], max(1, size // chunk[0]))
  return Grid(shape=shape, dtype=dtype, chunk=tuple(chunk))


def rows(count: int, nbytes: int) -> int:
  """How many rows a chunk has, at least 1 and at most `MAX_BYTES`.

  All if they fit. Else whole pages, so that a disk can be read into place, and
  equal chunks, for the last is stored as large as the others; where that takes
  half as many more, pages, if no more than an eighth is stored for nothing,
  then whatever is equal.

  Args:
    count: rows of the array.
    nbytes: of a row.
  """
  most = max(1, MAX_BYTES // nbytes)
  if count <= most:
    return count
  least = -(-count // most)
  pages = PAGE // math.gcd(PAGE, nbytes)  # rows that end where a page does
  equal = [
      count // number
      for number in range(least, min(3 * least // 2, count) + 1)
      if count % number == 0
  ]
  whole = [one for one in equal if one % pages == 0]
  even = -(-count // least)
  paged = min(most - most % pages, even + -even % pages)
  if paged and -(-count // paged) * paged <= 1.125 * count:
    whole.append(paged)
  return (whole or equal or [even])[0]


def nbytes(cut: Grid) -> int:
  """Bytes of a chunk."""
  return math.prod(cut.chunk) * cut.dtype.itemsize


def finer(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
  """Cuts a shard along its first dimension, into equal chunks.

  Args:
    shape: of the shard.
    itemsize: bytes of an element.

  Returns:
    The shape of a chunk below `MAX_BYTES`; the shard's where only many more
    chunks than that takes would be equal.
  """
  chunk = [max(1, size) for size in shape]
  least = -(-math.prod(chunk) * itemsize // MAX_BYTES)
  for count in range(least, min(_FINER * least, chunk[0]) + 1 if chunk else 0):
    if chunk[0] % count == 0:
      chunk[0] //= count
      break
  return tuple(chunk)


def touched(cut: Grid, where: Any) -> list[int]:
  """Numbers of the chunks that this process's devices need.

  Args:
    cut: of the array.
    where: its `jax.sharding.Sharding`.

  Returns:
    Ascending.
  """
  regions = where.addressable_devices_indices_map(cut.shape).values()
  return sorted({n for region in regions for n in cut.within(region)})


def parts(array: np.ndarray, cut: Grid) -> Parts:
  """All chunks of an array, without copying it."""
  return Parts(
      grid=cut, pieces={n: array[cut.where(n)] for n in range(len(cut))}
  )


def digest(piece: np.ndarray | Pile) -> str:
  """The BLAKE3 of what a chunk covers, in C order; several GB/s a core."""
  found = blake3.blake3()
  for one in piece.layers if isinstance(piece, Pile) else [piece]:
    found.update(_bytes(one))
  return found.hexdigest()


def sha256(piece: np.ndarray | Pile) -> str:
  """The sha256 of what a chunk covers, in C order, as it once was digested."""
  return hashlib.sha256(_bytes(np.asarray(piece))).hexdigest()


def _bytes(piece: np.ndarray) -> memoryview:
  """The bytes of what a chunk covers, in C order."""
  return np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data


def _bounds(cut: Grid, number: int) -> list[tuple[int, int]]:
  """What a chunk covers, as starts and ends."""
  return [(one.start, one.stop) for one in cut.where(number)]
