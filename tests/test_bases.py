"""Which versions are whole, and which stay because others need them."""

import json
import math
import shutil

import numpy as np
import pytest
from test_deltas import LIKE, base_of, bits, bucket, fill, put, read, tree
from test_publish import damage

from mgrpo_jax import atomic, contents, leaves, publish, store, zarr
from mgrpo_jax.bases import Bases
from mgrpo_jax.writer import Writer

__all__ = ["bucket"]  # a fixture


def test_retention_keeps_the_bases_of_what_it_keeps(bucket):
  bases = Bases(3)
  for number in range(2):
    put(bucket, number, bases, keep=1)
  assert publish.versions(bucket, "main") == [0, 1]  # 0 is the base of 1
  publish.lease(bucket, "main", 1, holder="reader", seconds=math.inf)
  for number in range(2, 8):
    put(bucket, number, bases, keep=1)
    base = base_of(bucket, number)
    expected = {0, 1, number} | ({base} - {None})
    assert set(publish.versions(bucket, "main")) == expected
    assert bits(read(bucket, 1).params) == bits(tree(1))
  again = store.open(bucket.url)  # another process, which remembers nothing
  put(again, 8, Bases(3), keep=1)
  assert publish.versions(again, "main") == [0, 1, 8]
  publish.release(bucket, "main", 1, holder="reader")
  put(again, 9, None, keep=1)
  for one in (bucket, again):
    one.settle()
  left = {key.split("/")[2] for key in bucket.list("policies/main")}
  assert left == {"LATEST", "v9"}


def test_a_lease_taken_while_its_version_goes_saves_its_base(
    bucket, monkeypatch
):
  bases = Bases(2)
  for number in range(2):
    put(bucket, number, bases, keep=1)
  straight = bucket.delete

  def overtaken(key):
    if key.endswith("v1/manifest.json"):
      monkeypatch.undo()
      publish.lease(bucket, "main", 1, holder="reader", seconds=60)
    straight(key)

  monkeypatch.setattr(bucket, "delete", overtaken)
  put(bucket, 2, bases, keep=1)
  assert publish.versions(bucket, "main") == [0, 1, 2]
  assert bits(read(bucket, 1).params) == bits(tree(1))


def test_a_leased_version_that_became_a_difference_keeps_its_base(bucket):
  put(bucket, 2, None)
  publish.lease(bucket, "main", 2, holder="reader", seconds=math.inf)
  put(bucket, 3, None)
  bases = Bases(2)  # of a run that resumes
  put(bucket, 1, bases, keep=1)
  assert publish.versions(bucket, "main") == [1, 2]  # looked at, and whole
  put(bucket, 2, bases, keep=1)
  assert base_of(bucket, 2) == 1
  put(bucket, 3, bases, keep=1)
  assert publish.versions(bucket, "main") == [1, 2, 3]
  assert bits(read(bucket, 2).params) == bits(tree(2))


def test_a_difference_goes_before_its_base(bucket, monkeypatch):
  fill(bucket, 3, 9)
  gone, straight = [], bucket.delete

  def delete(key):
    gone.append(key)
    straight(key)

  monkeypatch.setattr(bucket, "delete", delete)
  put(bucket, 3, None, keep=1)
  assert gone == [f"policies/main/v{n}/manifest.json" for n in (2, 1, 0)]


def test_a_kept_manifest_that_is_damaged_keeps_nothing(bucket, tmp_path):
  fill(bucket, 2, 9)
  damage(tmp_path / "policies/main/v1/manifest.json", "truncate")
  put(bucket, 2, None, keep=2)
  assert publish.versions(bucket, "main") == [1, 2]


@pytest.mark.parametrize("body", [{}, {"base": {"number": 0, "digest": ""}}])
def test_a_sealed_record_that_is_no_manifest_keeps_nothing(bucket, body):
  fill(bucket, 2, 9)
  text = json.dumps(leaves.seal(body)).encode()
  bucket.put("policies/main/v1/manifest.json", text)
  put(bucket, 2, None, keep=2)
  assert publish.versions(bucket, "main") == [1, 2]


def test_a_manifest_damaged_on_its_way_keeps_its_base(bucket, monkeypatch):
  fill(bucket, 2, 9)
  straight = bucket.get

  def damaged(key):
    found = straight(key)
    if key.endswith("v1/manifest.json"):
      monkeypatch.undo()
      return found[:9]
    return found

  monkeypatch.setattr(bucket, "get", damaged)
  put(bucket, 2, None, keep=2)
  assert publish.versions(bucket, "main") == [0, 1, 2]


def test_after_a_start_the_first_version_is_whole(bucket):
  fill(bucket, 2, 9)
  bases = Bases(9)
  put(bucket, 2, bases)
  put(bucket, 3, bases)
  assert [base_of(bucket, n) for n in range(4)] == [None, 0, None, 2]
  put(bucket, 3, Bases(9))  # what was a difference becomes whole
  assert base_of(bucket, 3) is None
  assert bits(read(bucket).params) == bits(tree(3))


def test_the_same_difference_again_is_not_written_again(bucket, tmp_path):
  bases = fill(bucket, 2, 9)
  chunk = tmp_path / "policies/main/v1/embed/c/0/0"
  before = chunk.stat().st_mtime_ns
  version = put(bucket, 1, bases).version
  assert publish.latest(bucket, "main") == version
  assert chunk.stat().st_mtime_ns == before
  damage(chunk, "flip")
  put(bucket, 1, bases)  # publishing again heals it
  assert bits(read(bucket, 1).params) == bits(tree(1))


def test_what_cannot_be_a_difference_is_whole(bucket, tmp_path, monkeypatch):
  bases = fill(bucket, 4, 9)
  put(bucket, 0, bases, params=tree(5))  # before its base, as from a past
  assert base_of(bucket, 0) is None
  put(bucket, 1, bases, params={"embed": np.zeros((3, 2), np.float32)})
  assert base_of(bucket, 1) is None  # another form
  put(bucket, 2, bases)
  put(bucket, 3, bases)
  assert base_of(bucket, 3) == 2
  shutil.rmtree(tmp_path / "policies/main/v2")
  put(bucket, 4, bases)
  assert base_of(bucket, 4) is None  # its base is not there
  damage(tmp_path / "policies/main/v4/manifest.json", "flip")
  put(bucket, 5, bases)
  assert base_of(bucket, 5) is None
  monkeypatch.setattr(zarr, "MOST_PACKED", 100)
  put(bucket, 6, bases)
  assert base_of(bucket, 6) is None  # chunks are too large for blosc


def test_a_version_that_cannot_be_written_is_no_base(bucket, monkeypatch):
  bases = fill(bucket, 2, 2)

  def full(prefix, arrays):
    raise atomic.StorageError("cannot write: No space left on device")

  with monkeypatch.context() as broken:
    broken.setattr(bucket, "write_arrays", full)
    with pytest.raises(atomic.StorageError, match="No space left"):
      put(bucket, 2, bases)
  put(bucket, 3, bases)
  assert base_of(bucket, 3) is None
  with monkeypatch.context() as broken:
    broken.setattr(bucket, "write_arrays", full)
    with pytest.raises(atomic.StorageError, match="No space left"):
      put(bucket, 4, bases)
  assert bits(read(bucket).params) == bits(tree(3))
  put(bucket, 4, bases)
  assert base_of(bucket, 4) == 3


def test_policies_have_bases_of_their_own(bucket):
  bases = Bases(2)
  for number in range(3):
    for policy in ("main", "sub"):
      publish.publish(
          bucket, policy, number, tree(number), keep=9, meta={}, bases=bases
      )
  for policy in ("main", "sub"):
    found = publish.read(bucket, policy, 1, like=LIKE)
    assert bits(found.params) == bits(tree(1))
  assert [base_of(bucket, n) for n in range(3)] == [None, 0, None]


def test_a_writer_writes_differences_and_starts_whole(bucket):
  for first in (0, 3):
    writer = Writer(
        bucket, keep=9, short=True, whole_every=2, tell=lambda _: None
    )
    for number in range(first, first + 3):
      writer.write("main", number, tree(number), meta={})
    assert writer.settle() == []
    writer.close()
  assert [base_of(bucket, n) for n in range(6)] == [None, 0, None] + [
      None, 3, None,
  ]  # fmt: skip


def test_an_overtaken_reader_of_a_difference_takes_the_newer_version(
    bucket, monkeypatch
):
  fill(bucket, 2, 2)
  straight = bucket.read_arrays

  def overtaken(prefix, names, seen, forms):
    monkeypatch.undo()
    put(bucket, 2, None, keep=1)
    bucket.settle()
    return straight(prefix, names, seen, forms)

  monkeypatch.setattr(bucket, "read_arrays", overtaken)
  weights = read(bucket)
  assert weights.version.number == 2
  assert weights.skipped == ()


def test_who_keeps_a_base_is_not_misled_about_its_arrays(bucket):
  fill(bucket, 3, 9)
  held = contents.Held()
  publish.read(bucket, "main", 1, like=LIKE, held=held)
  path = "policies/main/v2"
  bucket.write_arrays(path, {"more": np.zeros(5, np.uint32)})
  body = json.loads(bucket.get(f"{path}/manifest.json"))
  body.pop("digest")
  body["arrays"]["more"] = body["arrays"]["same"]  # not of the base
  sealed = leaves.seal(body)
  bucket.put(f"{path}/manifest.json", json.dumps(sealed).encode())
  pointer = {"number": 2, "path": path, "digest": sealed["digest"]}
  bucket.put("policies/main/LATEST", json.dumps(pointer).encode())
  found = publish.read(bucket, "main", "latest", like=LIKE, held=held)
  assert found.version.number == 1
  assert "its base is cut otherwise" in found.skipped[0]


@pytest.mark.parametrize("every", [0, -1])
def test_how_many_are_whole_is_checked(every):
  with pytest.raises(ValueError, match="whole_every: .* at least 1"):
    Bases(every)


def test_what_has_no_words_of_its_size_is_always_whole(bucket):
  held = Bases(9)
  weights = {"w": np.ones(4, np.complex128)}
  for number in range(3):
    publish.publish(
        bucket, "main", number, weights, keep=9, meta={}, bases=held
    )
  assert [base_of(bucket, n) for n in range(3)] == [None] * 3
