"""Arrays come to memory of ours, straight from files where they lie so."""

import errno
import json
import os
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo_jax import atomic, chunks, deltas, readings, store, zarr
from mgrpo_jax.chunks import Grid, Parts

DTYPES = [np.float32, ml_dtypes.bfloat16, np.int8, np.bool_, np.uint64]


def written(bucket, shape, chunk, dtype=np.int32):
  """Writes an array of such chunks; returns it and its grid."""
  rng = np.random.default_rng(len(shape))
  array = rng.integers(0, 2 if dtype is np.bool_ else 100, shape).astype(dtype)
  grid = Grid(shape=array.shape, dtype=array.dtype, chunk=chunk)
  bucket.arrays.create("v", {"w": grid})
  bucket.arrays.write_parts("v", {"w": chunks.parts(array, grid)})
  return array, grid


@pytest.fixture
def copied(monkeypatch):
  """What TensorStore was asked to read."""
  asked, straight = [], readings._copy

  def copy(source, into):
    asked.append(source)
    return straight(source, into)

  monkeypatch.setattr(readings, "_copy", copy)
  return asked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((), ()), ((5,), (5,)), ((7, 3), (2, 3)), ((4, 1, 2), (3, 1, 2))],
)
def test_chunks_that_lie_as_they_are_come_from_their_files(
    tmp_path, copied, shape, chunk, dtype
):
  bucket = store.open_folder(tmp_path / "a folder, 100% its own")
  array, grid = written(bucket, shape, chunk, dtype)
  found = bucket.read_arrays("v", ["w"])["w"]
  np.testing.assert_array_equal(found, array)
  assert found.dtype == array.dtype
  last = len(grid) - 1
  some = bucket.arrays.read_parts("v", {"w": (grid, [last])}, lambda *_: None)[
      "w"
  ]
  np.testing.assert_array_equal(some.pieces[last], array[grid.where(last)])
  assert not copied


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.integers(1, 8)), min_size=0, max_size=3
    ),
    st.data(),
)
def test_any_cut_is_read_whole_and_in_parts(tmp_path_factory, form, data):
  bucket = store.open_folder(tmp_path_factory.mktemp("cut"))
  shape, chunk = tuple(n for n, _ in form), tuple(n for _, n in form)
  array, grid = written(bucket, shape, chunk)
  np.testing.assert_array_equal(bucket.read_arrays("v", ["w"])["w"], array)
  numbers = (
      data.draw(st.sets(st.sampled_from(range(len(grid))))) if len(grid) else []
  )
  some = bucket.arrays.read_parts(
      "v", {"w": (grid, sorted(numbers))}, lambda *_: None
  )["w"]
  for number, piece in some.pieces.items():
    np.testing.assert_array_equal(piece, array[grid.where(number)])


def test_what_files_do_not_hold_in_a_piece_is_put_together(tmp_path, copied):
  bucket = store.open_folder(tmp_path)
  array, _ = written(bucket, (5, 6), (2, 4))
  np.testing.assert_array_equal(bucket.read_arrays("v", ["w"])["w"], array)
  assert len(copied) == 1


def test_a_region_that_cuts_chunks_is_read(tmp_path, copied):
  bucket = store.open_folder(tmp_path)
  array, _ = written(bucket, (6, 3), (2, 3))
  source = zarr.open(bucket.arrays._kvstore, "v/w").result()
  for rows in (slice(1, 3), slice(3, 6), slice(2, 3)):
    part = zarr.region(source, (rows, slice(0, 3)))
    found = readings.Reading(part, readings.Room([part])).result(60)
    np.testing.assert_array_equal(found, array[rows])
  assert len(copied) == 3


def test_what_is_packed_is_unpacked(tmp_path, copied):
  bucket = store.open_folder(tmp_path)
  array = np.arange(12, dtype=np.uint32).reshape(4, 3)
  grid = deltas.words(chunks.grid(array))
  bucket.arrays.create("v", {"w": grid})
  parts = Parts(grid=grid, pieces={0: array})
  bucket.arrays.write_parts("v", {"w": parts})
  np.testing.assert_array_equal(bucket.read_arrays("v", ["w"])["w"], array)
  assert copied


@pytest.mark.parametrize(
    "change",
    [
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
        {
            "chunk_key_encoding": {
                "name": "default",
                "configuration": {"separator": "."},
            }
        },
    ],
)
def test_another_writer_may_lay_an_array_out_otherwise(
    tmp_path, copied, change
):
  """Whatever zarr3 says it is, is what is read."""
  bucket = store.open_folder(tmp_path)
  array, grid = written(bucket, (4, 3), (2, 3))
  folder = tmp_path / "v/w"
  said = json.loads((folder / "zarr.json").read_text())
  (folder / "zarr.json").write_text(json.dumps(said | change))
  for number in range(len(grid)):
    path = folder / grid.key(number)
    data = np.frombuffer(path.read_bytes(), array.dtype)
    if "codecs" in change:
      path.write_bytes(data.byteswap().tobytes())
    else:
      path.rename(folder / grid.key(number).replace("/", "."))
      path.write_bytes(bytes(data.nbytes))  # as nothing has it any more
  again = store.open_folder(tmp_path)
  np.testing.assert_array_equal(again.read_arrays("v", ["w"])["w"], array)
  assert copied


def test_a_chunk_that_is_not_there_is_zeros_as_zarr_has_it(tmp_path):
  bucket = store.open_folder(tmp_path)
  array, grid = written(bucket, (4, 3), (2, 3))
  (tmp_path / "v/w" / grid.key(1)).unlink()
  array[2:] = 0
  np.testing.assert_array_equal(bucket.read_arrays("v", ["w"])["w"], array)


@pytest.mark.parametrize("change", [-1, 1, 1 << 40])  # that ends TensorStore
def test_a_chunk_of_another_size_is_named(tmp_path, change):
  bucket = store.open_folder(tmp_path)
  _, grid = written(bucket, (4, 3), (2, 3))
  path = tmp_path / "v/w" / grid.key(1)
  os.truncate(path, 24 + change)
  with pytest.raises(atomic.CorruptError, match=r"v/w/c/1/0"):
    bucket.read_arrays("v", ["w"])


def test_what_cannot_be_read_straight_is_left_to_tensorstore(
    tmp_path, copied, monkeypatch
):
  bucket = store.open_folder(tmp_path)
  array, grid = written(bucket, (4, 3), (2, 3))

  def fail(path, into, *, size):
    raise OSError(errno.EIO, os.strerror(errno.EIO), path)

  monkeypatch.setattr(readings.disk, "read", fail)
  np.testing.assert_array_equal(bucket.read_arrays("v", ["w"])["w"], array)
  assert len(copied) == len(grid)


def test_a_server_is_read_by_tensorstore(copied):
  bucket = store.open("memory://readings")
  array, _ = written(bucket, (4, 3), (2, 3))
  np.testing.assert_array_equal(bucket.read_arrays("v", ["w"])["w"], array)
  assert copied


def test_a_reading_waits_no_longer_than_it_is_told(tmp_path, monkeypatch):
  bucket = store.open_folder(tmp_path)
  array, _ = written(bucket, (4, 3), (2, 3))
  go = threading.Event()
  straight = readings.disk.read

  def slow(path, into, *, size):
    go.wait(60)
    straight(path, into, size=size)

  monkeypatch.setattr(readings.disk, "read", slow)
  source = zarr.open(bucket.arrays._kvstore, "v/w").result()
  reading = readings.Reading(source, readings.Room([source]))
  with pytest.raises(TimeoutError):
    reading.result(timeout=0.05)
  go.set()
  np.testing.assert_array_equal(reading.result(timeout=60), array)


def test_where_one_reading_fails_the_others_are_given_up(tmp_path, monkeypatch):
  bucket = store.open_folder(tmp_path)
  arrays = {f"a{number}": np.arange(3) for number in range(40)}
  bucket.write_arrays("v", arrays)
  go, asked, straight = threading.Event(), [], readings.disk.read

  def slow(path, into, *, size):
    asked.append(path)
    if len(asked) > 1:
      go.wait(60)
    straight(path, into, size=size)

  def refuse(name, array):
    raise atomic.CorruptError(name)

  monkeypatch.setattr(readings.disk, "read", slow)
  with pytest.raises(atomic.CorruptError):
    bucket.read_arrays("v", arrays, refuse)
  go.set()
  last = readings.disk.threads("read").submit(len, [])
  last.result(60)  # after all before it
  assert len(asked) < 20  # those that threads had begun


def test_a_reading_waits_for_all_its_files_no_longer_than_it_is_told(
    tmp_path, monkeypatch
):
  bucket = store.open_folder(tmp_path)
  written(bucket, (12, 3), (1, 3))
  monkeypatch.setattr(readings.disk, "read", lambda *_, **__: time.sleep(0.4))
  source = zarr.open(bucket.arrays._kvstore, "v/w").result()
  reading = readings.Reading(source, readings.Room([source]))
  reading._left.reverse()  # the last file is the first that is waited for
  with pytest.raises(TimeoutError):
    reading.result(timeout=0.6)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
  """A pipe's reader would wait for a writer, also at the process's end."""
  bucket = store.open_folder(tmp_path)
  _, grid = written(bucket, (4, 3), (2, 3))
  path = tmp_path / "v/w" / grid.key(1)
  path.unlink()
  make(path)
  with pytest.raises(atomic.CorruptError, match=r"v/w/c/1/0 is not a file"):
    bucket.read_arrays("v", ["w"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_who_stops_reading_waits_for_no_more_files(
    tmp_path, monkeypatch, error
):
  """At its end a process waits for what its threads are still to do."""
  bucket = store.open_folder(tmp_path)
  _, grid = written(bucket, (40, 3), (1, 3))
  bucket.write_arrays("v", {"b": np.arange(5)})
  go, begun = threading.Event(), []

  def read(path, into, *, size):
    begun.append(path)
    go.wait(60)

  def stop(self, timeout):
    raise error("stop")

  monkeypatch.setattr(readings.disk, "read", read)
  monkeypatch.setattr(readings.Reading, "result", stop)
  with pytest.raises((KeyboardInterrupt, atomic.CorruptError)):
    bucket.read_arrays("v", ["w", "b"])
  go.set()
  last = readings.disk.threads("read").submit(int)
  last.result(60)  # comes after all the others
  assert len(begun) < len(grid)


def test_many_arrays_are_read_into_memory_that_jax_takes(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
      f"a{number}": rng.integers(0, 255, number, np.uint8)
      for number in (1, 63, 64, 65, 1000)
  }
  bucket = store.open_folder(tmp_path)
  bucket.write_arrays("v", arrays)
  found = bucket.read_arrays("v", arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(found[name], array)
    assert found[name].ctypes.data % 64 == 0


def test_what_is_too_large_for_memory_is_an_error_of_the_store(tmp_path):
  bucket = store.open_folder(tmp_path)
  grid = Grid(shape=(1 << 58,), dtype=np.dtype("u1"), chunk=(1,))
  bucket.arrays.create("v", {"w": grid})
  with pytest.raises(atomic.StorageError, match=r"v/w and 0 more.*allocate"):
    bucket.read_arrays("v", ["w"])


def test_a_reading_that_is_begun_again_has_memory_of_its_own(tmp_path):
  bucket = store.open_folder(tmp_path)
  bucket.write_arrays("v", {"w": np.arange(5)})
  source = zarr.open(bucket.arrays._kvstore, "v/w").result()
  room = readings.Room([source])
  first, again = (readings.Reading(source, room).result(60) for _ in range(2))
  assert not np.shares_memory(first, again)
  np.testing.assert_array_equal(first, again)
