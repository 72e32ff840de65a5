"""How arrays are cut, and put together from some of their chunks."""

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import time

import blake3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo_jax import atomic, chunks, publish, store, zarr
from mgrpo_jax.chunks import Grid, Parts

SIZES = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), max_size=3)


def cut(sizes) -> tuple[np.ndarray, Grid]:
  """An array of different values, and a grid of it."""
  shape = tuple(size for size, _ in sizes)
  array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  chunk = tuple(step for _, step in sizes)
  return array, Grid(shape=shape, dtype=array.dtype, chunk=chunk)


@given(SIZES)
def test_chunks_cover_an_array_once_in_c_order(sizes):
  array, grid = cut(sizes)
  seen = np.zeros(array.shape, int)
  steps = itertools.product(
      *(range(0, size, step) for size, step in sizes)  # their first elements
  )
  for number, corner in zip(range(len(grid)), steps, strict=True):
    where = grid.where(number)
    assert tuple(one.start for one in where) == corner
    seen[where] += 1
  assert np.all(seen == 1)


@given(SIZES, st.data())
def test_a_region_is_put_together_from_the_chunks_that_it_touches(sizes, data):
  array, grid = cut(sizes)
  region = []
  for size, _ in sizes:
    start = data.draw(st.integers(0, size))
    region.append(slice(start, data.draw(st.integers(start, size))))
  whole = chunks.parts(array, grid)
  numbers = grid.within(region)
  expected = array[tuple(region)]
  if expected.size:
    touched = [
        number
        for number in range(len(grid))
        if np.isin(array[grid.where(number)], expected).any()
    ]
    assert numbers == touched
  some = Parts(grid=grid, pieces={n: whole.pieces[n] for n in numbers})
  np.testing.assert_array_equal(some[region], expected)
  narrow = some.astype(np.float16)[region]
  assert narrow.dtype == np.float16
  np.testing.assert_array_equal(narrow, expected.astype(np.float16))


@given(st.integers(1, 10**5), st.integers(1, 10**8))
def test_chunks_fill_their_limit_and_store_little_for_nothing(count, nbytes):
  rows, most = chunks.rows(count, nbytes), max(1, chunks.MAX_BYTES // nbytes)
  least = math.ceil(count / most)  # chunks
  stored, even = (
      math.ceil(count / one) * one for one in (rows, math.ceil(count / least))
  )
  assert 1 <= rows <= most
  assert math.ceil(count / rows) <= 2 * least
  assert stored <= max(1.125 * count, even)


@pytest.mark.parametrize(
    ("count", "nbytes", "expected"),
    [
        (1000, 16, 1000),  # all fit
        (30, 576 * 1536 * 4, 3),  # equal whole pages, 10 of 3 and not 8 of 4
        (5000, 12000, 1280),  # whole pages, 128 rows each, and about equal
        (576, 50257 * 4, 72),  # 1024 rows end a page: 8 equal, not 7 unequal
        (577, 50257 * 4, 83),  # which a prime number does not have
        (1066, 16068, 533),  # 1024 rows end a page, and 2048 would be stored
        (7, 10 << 20, 1),
        (7, 20 << 20, 1),
    ],
)
def test_rows_of_a_chunk(count, nbytes, expected):
  assert chunks.rows(count, nbytes) == expected


def test_a_chunk_that_is_not_here_is_missed():
  array, grid = cut([(4, 2)])
  some = Parts(grid=grid, pieces={0: array[:2]})
  with pytest.raises(KeyError):
    some[(slice(1, 3),)]


def test_large_shards_are_cut_into_equal_chunks(monkeypatch):
  monkeypatch.setattr(chunks, "MAX_BYTES", 100)
  assert chunks.finer((25, 2), 2) == (25, 2)  # 100 bytes
  assert chunks.finer((60, 2), 2) == (20, 2)  # 240 bytes
  assert chunks.finer((50, 2), 2) == (25, 2)
  assert chunks.finer((59, 2), 2) == (59, 2)  # a prime: one chunk
  assert chunks.finer((), 4) == ()
  assert chunks.finer((0, 3), 4) == (1, 3)


def test_a_digest_is_of_the_bytes_in_c_order():
  array = np.arange(6, dtype=np.int32).reshape(2, 3)
  data = np.ascontiguousarray(array.T).tobytes()
  assert chunks.digest(array.T) == blake3.blake3(data).hexdigest()
  assert chunks.sha256(array.T) == hashlib.sha256(data).hexdigest()
  empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
  assert chunks.digest(np.zeros((0, 3))) == empty  # as its authors have it


def test_chunks_that_several_write_are_one_array(tmp_path):
  array, grid = cut([(7, 3), (4, 2)])
  arrays = store.open_folder(tmp_path).arrays
  arrays.create("v", {"w": grid})
  held = chunks.parts(array, grid).pieces
  for mine in (range(0, 6, 2), range(1, 6, 2)):
    other = store.open_folder(tmp_path).arrays
    pieces = {number: held[number] for number in mine}
    other.write_parts("v", {"w": Parts(grid=grid, pieces=pieces)})
  found = store.open_folder(tmp_path).read_arrays("v", ["w"])["w"]
  np.testing.assert_array_equal(found, array)
  seen = {}
  some = arrays.read_parts("v", {"w": (grid, [1, 4])}, seen.__setitem__)["w"]
  assert seen == {"w": some}
  assert sorted(some.pieces) == [1, 4]
  for number, piece in some.pieces.items():
    np.testing.assert_array_equal(piece, held[number])
  assert (tmp_path / "v/w" / grid.key(5)).exists()


def test_an_array_of_another_form_is_not_read(tmp_path):
  array, grid = cut([(4, 2)])
  bucket = store.open_folder(tmp_path)
  bucket.arrays.write("v", {"w": array})
  for change in ({"shape": (6,)}, {"dtype": np.dtype(np.int32)}):
    other = dataclasses.replace(grid, **change)
    with pytest.raises(atomic.CorruptError, match="v/w is another array"):
      bucket.arrays.read_parts("v", {"w": (other, [0])}, lambda *_: None)
    with pytest.raises(atomic.CorruptError, match="v/w is another array"):
      bucket.read_arrays("v", ["w"], forms={"w": other})


def described(folder):
  """A bucket of two versions; where and what is said of the second's array."""
  bucket = store.open_folder(folder)
  weights = {"w": np.ones(4, np.float32)}
  for number in range(2):
    publish.publish(bucket, "main", number, weights, keep=2, meta={})
  where = folder / "policies/main/v1/w/zarr.json"
  return bucket, weights, where, json.loads(where.read_text())


@pytest.mark.parametrize("size", [1 << 45, 1 << 62])  # no memory is so large
def test_an_array_that_is_said_to_be_huge_takes_no_memory(tmp_path, size):
  bucket, weights, where, said = described(tmp_path)
  where.write_text(json.dumps(said | {"shape": [size]}))
  found = publish.read(bucket, "main", "latest", like=weights)
  assert found.version.number == 0
  assert "v1/w is another array" in found.skipped[0]


@pytest.mark.parametrize("chunk", [[1 << 28], [1 << 40], [5]])
def test_an_array_whose_chunks_are_said_to_be_huge_is_not_read(tmp_path, chunk):
  """TensorStore would take memory for a chunk, and end the process."""
  bucket, weights, where, said = described(tmp_path)
  said["chunk_grid"]["configuration"]["chunk_shape"] = chunk
  where.write_text(json.dumps(said))
  found = publish.read(bucket, "main", "latest", like=weights)
  assert found.version.number == 0
  assert "v1/w is cut otherwise" in found.skipped[0]
  publish.publish(bucket, "main", 1, weights, keep=2, meta={})  # anew
  assert publish.read(bucket, "main", 1, like=weights).skipped == ()


def test_numbers_of_another_order_of_bytes_are_read_as_they_were(tmp_path):
  bucket = store.open_folder(tmp_path)
  weights = {"w": np.arange(4, dtype=">f4")}
  publish.publish(bucket, "main", 0, weights, keep=1, meta={})
  like = {"w": np.zeros(4, np.float32)}
  found = publish.read(bucket, "main", 0, like=like)
  np.testing.assert_array_equal(found.params["w"], weights["w"])


def test_where_one_write_fails_the_others_are_waited_for(tmp_path, monkeypatch):
  array, grid = cut([(7, 3), (4, 2)])
  arrays = store.open_folder(tmp_path).arrays
  arrays.create("v", {"w": grid})
  straight, ended = zarr.write, []

  class Slow:
    """A write that takes a while."""

    def __init__(self, target, piece):
      self.write = straight(target, piece)

    def result(self, timeout):
      time.sleep(0.02)
      ended.append(self.write.result(timeout=timeout))

    def cancel(self):
      self.write.cancel()

  class Full:
    """A write that fails at once."""

    def cancel(self):
      pass

    def result(self, timeout):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def write(target, piece):
    return Full() if piece[0, 0] == 0 else Slow(target, piece)

  monkeypatch.setattr(zarr, "write", write)
  with pytest.raises(atomic.StorageError, match="v/w/c/0/0: No space left"):
    arrays.write_parts("v", {"w": chunks.parts(array, grid)})
  assert len(ended) == len(grid) - 1
