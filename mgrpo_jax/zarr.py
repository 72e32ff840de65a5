"""An array of the store: a folder in the zarr3 format, raw and in chunks."""

from typing import Any

import numpy as np
import tensorstore as ts

MAX_CHUNK_BYTES = 64 << 20


def create(kvstore: ts.KvStore, key: str, array: np.ndarray) -> ts.Future:
  """Starts making the place for an array, or opens it where it is made.

  An array of another shape or dtype must be removed before. `delete_existing`
  would have TensorStore remove whatever the server lists, which with servers
  that ignore the bounds of a listing is everything.
  """
  return ts.open(
      {"driver": "zarr3", "metadata": {"codecs": ["bytes"]}},
      kvstore=kvstore / f"{key}/",
      dtype=array.dtype,
      shape=array.shape,
      chunk_layout=ts.ChunkLayout(chunk_shape=_chunk_shape(array)),
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


def nbytes(target: Any) -> int:
  """Returns the size in bytes of an open array."""
  return target.size * target.dtype.numpy_dtype.itemsize


def _chunk_shape(array: np.ndarray) -> list[int]:
  """Cuts the first dimension so that a chunk stays below its limit."""
  shape = [max(1, size) for size in array.shape]
  if array.nbytes > MAX_CHUNK_BYTES:
    row = max(1, array.nbytes // shape[0])
    shape[0] = max(1, MAX_CHUNK_BYTES // row)
  return shape
