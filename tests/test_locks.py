"""Writers that are killed leave nothing to those who come after them."""

import fcntl
import os
import struct

import numpy as np
import pytest

from mgrpo_jax import locks, store


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path)


def left(folder, key, data=b"x" * 100):
  """What a writer of a longer value left when it was killed."""
  path = folder / f"{key}.__lock"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


@pytest.mark.parametrize("key", ["LATEST", "members/main/0.json"])
def test_a_key_is_what_was_written_and_no_more(bucket, tmp_path, key):
  left(tmp_path, key)
  bucket.put(key, b"short")
  assert bucket.get(key) == b"short"
  left(tmp_path, key)
  assert bucket.swap(bucket.read(key), b"other")
  assert bucket.get(key) == b"other"
  left(tmp_path, key)
  bucket.delete(key)
  assert bucket.get(key) is None
  left(tmp_path, key)
  assert bucket.replace(bucket.read(key), b"new")
  assert bucket.get(key) == b"new"


def test_arrays_are_what_was_written_and_no_more(bucket, tmp_path):
  for name in ("w/zarr.json", "w/c/0"):
    left(tmp_path, f"v/{name}", b"x" * 1000)
  array = np.arange(5)
  bucket.write_arrays("v", {"w": array})
  found = store.open_folder(tmp_path).read_arrays("v", ["w"])["w"]
  np.testing.assert_array_equal(found, array)
  assert (tmp_path / "v/w/c/0").stat().st_size == array.nbytes


def test_what_was_left_goes_with_its_folder(bucket, tmp_path):
  bucket.write_arrays("v0", {"w": np.arange(5)})
  for key in ("v0/w/c/1", "v0/never/zarr.json", "v0/w/c/0_12ab"):
    left(tmp_path, key)
  bucket.put("v1/manifest.json", b"{}")
  bucket.discard("v0")
  bucket.settle()
  assert sorted(os.listdir(tmp_path)) == ["v1"]
  left(tmp_path, "v2/w/c/0")
  bucket.discard("v2")  # of which a listing tells nothing
  bucket.settle()
  assert sorted(os.listdir(tmp_path)) == ["v1"]


def test_what_is_written_while_a_folder_is_removed_stays(bucket, tmp_path):
  bucket.put("v0/old", b"1")
  bucket.discard("v0")
  (tmp_path / "v0/new").write_bytes(b"2")
  bucket.settle()
  assert os.listdir(tmp_path / "v0") == ["new"]


def test_folders_above_what_is_removed_go_where_they_are_empty(
    bucket, tmp_path
):
  bucket.write_arrays("policies/main/v0", {"w": np.arange(5)})
  bucket.put("policies/other/LATEST", b"{}")
  bucket.discard("policies/main/v0")
  bucket.settle()
  assert os.listdir(tmp_path / "policies") == ["other"]


def test_where_there_is_nothing_to_remove_folders_above_it_stay(
    bucket, tmp_path
):
  """Who writes beside it has made them, and is about to write."""
  (tmp_path / "policies/main").mkdir(parents=True)
  bucket.discard("policies/main/v0")
  bucket.settle()
  assert (tmp_path / "policies/main").is_dir()


def test_what_somebody_holds_is_not_emptied(tmp_path):
  path = left(tmp_path, "k")
  whole = struct.pack("hhqqiI", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0, 0)
  with path.open("r+b") as file:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, whole)
    locks.empty(tmp_path, "k")
    assert path.read_bytes() == b"x" * 100
  locks.empty(tmp_path, "k")
  assert path.read_bytes() == b""


def test_what_became_the_key_meanwhile_is_not_emptied(tmp_path, monkeypatch):
  """Its writer renamed it after it was opened, and gave the lock back."""
  path, straight = left(tmp_path, "k"), locks._take

  def rename(descriptor):
    path.rename(tmp_path / "k")
    return straight(descriptor)

  monkeypatch.setattr(locks, "_take", rename)
  locks.empty(tmp_path, "k")
  assert (tmp_path / "k").read_bytes() == b"x" * 100
  left(tmp_path, "k", b"y" * 100)  # the next writer's, which is another file

  def replace(descriptor):
    path.unlink()
    left(tmp_path, "k", b"z" * 100)
    return straight(descriptor)

  monkeypatch.setattr(locks, "_take", replace)
  locks.empty(tmp_path, "k")
  assert path.read_bytes() == b"z" * 100


def test_where_there_is_nothing_to_empty_nothing_is_made(tmp_path):
  locks.empty(tmp_path, "never/was")
  locks.empty(None, "k")
  (tmp_path / "k.__lock").mkdir()
  locks.empty(tmp_path, "k")
  assert os.listdir(tmp_path) == ["k.__lock"]


def test_a_system_without_such_locks_leaves_them(tmp_path, monkeypatch):
  path = left(tmp_path, "k")
  monkeypatch.delattr(fcntl, "F_OFD_SETLK")
  locks.empty(tmp_path, "k")
  assert path.stat().st_size == 100
