"""An array of the store: a folder in the zarr3 format, in chunks.

They are raw, or packed: compressed by blosc, which lays bytes of equal
significance side by side and has zstd at its quickest squeeze them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from mgrpo_jax.chunks import Grid, Pile

MOST_PACKED = 2**31 - 17  # bytes of a chunk; blosc counts with 32 bits


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


def write(target: Any, array: np.ndarray | Pile) -> ts.Future:
  """Starts writing all of an array, which must not change until it is done."""
  return target.write(
      np.asarray(array), can_reference_source_data_indefinitely=True
  ).commit


def region(source: Any, where: Sequence[slice]) -> Any:
  """A part of an open array."""
  return source[tuple(where)] if where else source


def nbytes(source: Any) -> int:
  """Returns the size in bytes of an open array."""
  return source.size * source.dtype.numpy_dtype.itemsize


def _blosc(grid: Grid) -> dict[str, Any]:
  """How an array's chunks are compressed."""
  return {
      "cname": "zstd",
      "clevel": 1,
      "shuffle": "shuffle",
      "typesize": grid.dtype.itemsize,
      "blocksize": 0,  # blosc's own choice
  }
