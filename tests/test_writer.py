"""Weights go to the store while other work goes on."""

import threading

import killed
import pytest

from mgrpo_jax import atomic, publish, store
from mgrpo_jax.writer import Writer


@pytest.fixture
def bucket(tmp_path) -> store.Store:
  return store.open_folder(tmp_path)


def hand_over(writer, number):
  writer.write("main", number, killed.tree(number), meta={"step": number})


def test_handing_over_does_not_wait_for_the_store(bucket, monkeypatch):
  go, straight = threading.Event(), bucket.write_arrays

  def slow(prefix, arrays):
    assert go.wait(60)
    straight(prefix, arrays)

  monkeypatch.setattr(bucket, "write_arrays", slow)
  writer = Writer(
      bucket, keep=3, short=False, whole_every=1, tell=lambda _: None
  )
  for number in range(3):
    hand_over(writer, number)
  assert publish.latest(bucket, "main") is None
  go.set()
  assert writer.settle() == []
  assert publish.versions(bucket, "main") == [0, 1, 2]
  assert publish.latest(bucket, "main").number == 2
  writer.close()


def test_a_version_that_fails_is_told_and_the_next_is_written(
    bucket, monkeypatch
):
  def full(prefix, arrays):
    monkeypatch.undo()
    raise atomic.StorageError(f"cannot write {prefix}: No space left on device")

  monkeypatch.setattr(bucket, "write_arrays", full)
  writer = Writer(
      bucket, keep=3, short=False, whole_every=1, tell=lambda _: None
  )
  hand_over(writer, 0)
  hand_over(writer, 1)
  with pytest.raises(atomic.StorageError, match="v0: No space left"):
    writer.settle()
  assert writer.settle() == []  # told once
  assert publish.versions(bucket, "main") == [1]
  hand_over(writer, 2)
  writer.close()  # waits, whatever happens
  assert publish.latest(bucket, "main").number == 2


def test_what_is_damaged_is_handed_on(bucket):
  bucket.put("policies/main/leases/notes", b"0")
  writer = Writer(
      bucket, keep=1, short=False, whole_every=1, tell=lambda _: None
  )
  hand_over(writer, 0)
  (line,) = writer.settle()
  assert "leases/notes" in line
  writer.close()
