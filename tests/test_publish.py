"""Versions of weights: whole or not at all, whoever is killed when."""

import itertools
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import threading
import time
import uuid

import jax
import killed
import numpy as np
import pytest

from mgrpo_jax import atomic, leases, publish, store
from mgrpo_jax.bases import Bases


def params(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  return {
      "embed": rng.standard_normal((16, 4), dtype=np.float32),
      "layers": [
          {"query": rng.standard_normal((4, 4), dtype=np.float32)}
          for _ in range(2)
      ],
  }


LIKE = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, params(0)))


def same(left, right) -> bool:
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture
def bucket(tmp_path) -> store.Store:
  return store.open_folder(tmp_path)


def put(bucket, number, *, seed=None, keep=3):
  weights = params(number if seed is None else seed)
  return publish.publish(
      bucket, "main", number, weights, keep=keep, meta={"step": number}
  )


def read(bucket, number="latest"):
  return publish.read(bucket, "main", number, like=LIKE)


def test_what_is_published_is_what_is_read(bucket):
  version = put(bucket, 0).version
  weights = read(bucket)
  assert weights.version == version
  assert weights.meta == {"step": 0}
  assert weights.skipped == ()
  assert same(weights.params, params(0))
  assert jax.tree.structure(weights.params) == jax.tree.structure(LIKE)
  assert version.path == "policies/main/v0"
  assert all(isinstance(w, jax.Array) for w in jax.tree.leaves(weights.params))


def test_short_weights_are_half_the_bytes_and_come_back_rounded(
    bucket, tmp_path
):
  weights = params(0) | {"count": np.arange(3, dtype=np.int32)}
  published = publish.publish(
      bucket, "main", 0, weights, keep=1, meta={}, short=True
  )
  like = LIKE | {"count": jax.ShapeDtypeStruct((3,), np.int32)}
  found = publish.read(bucket, "main", 0, like=like).params
  assert found["embed"].dtype == np.float32
  rounded = weights["embed"].astype(jax.numpy.bfloat16).astype(np.float32)
  assert not np.array_equal(rounded, weights["embed"])
  np.testing.assert_array_equal(found["embed"], rounded)
  np.testing.assert_array_equal(found["count"], weights["count"])
  chunk = tmp_path / published.version.path / "embed/c/0/0"
  assert chunk.stat().st_size == weights["embed"].nbytes // 2
  again = publish.publish(
      bucket, "main", 0, weights, keep=1, meta={}, short=True
  )
  assert again == published


def test_what_one_mesh_published_is_read_into_another(bucket):
  def sharded(shape, names, parts):
    mesh = jax.make_mesh(shape, names)
    where = jax.sharding.PartitionSpec(*parts)
    return jax.sharding.NamedSharding(mesh, where)

  one = sharded((4, 2), ("fsdp", "tensor"), ("fsdp", "tensor"))
  other = sharded((2, 4), ("data", "tensor"), (None, "tensor"))
  weights = params(0)
  spread = jax.tree.map(lambda a: jax.device_put(a, one), weights)
  publish.publish(bucket, "main", 0, spread, keep=1, meta={})
  like = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=other), weights
  )
  found = publish.read(bucket, "main", 0, like=like).params
  assert same(found, weights)
  assert found["embed"].sharding == other


def test_latest_moves_and_numbers_stay_readable(bucket):
  for number in range(3):
    put(bucket, number)
  assert publish.latest(bucket, "main").number == 2
  assert read(bucket).version.number == 2
  assert same(read(bucket, 1).params, params(1))
  assert publish.versions(bucket, "main") == [0, 1, 2]


def test_policies_do_not_see_each_other(bucket):
  put(bucket, 4)
  with pytest.raises(publish.NoVersionError, match="researcher"):
    publish.read(bucket, "researcher", "latest", like=LIKE)
  assert publish.versions(bucket, "mai") == []


def test_the_same_weights_again_are_not_written_again(bucket, tmp_path):
  version = put(bucket, 0).version
  put(bucket, 1)
  chunk = tmp_path / version.path / "embed/c/0/0"
  before = chunk.stat().st_mtime_ns
  assert put(bucket, 0).version == version
  assert chunk.stat().st_mtime_ns == before
  assert publish.latest(bucket, "main").number == 0


def test_a_resumed_run_replaces_the_past_it_left(bucket):
  for number in range(4):
    put(bucket, number)
  put(bucket, 2, seed=100)
  assert same(read(bucket).params, params(100))
  assert publish.versions(bucket, "main") == [1, 2]
  with pytest.raises(publish.NoVersionError, match="no version 3"):
    read(bucket, 3)


def test_retention_keeps_the_newest_and_the_leased(bucket, tmp_path):
  put(bucket, 0, keep=2)
  publish.lease(bucket, "main", 0, holder="baseline", seconds=math.inf)
  put(bucket, 1, keep=2)
  publish.lease(
      bucket, "main", 1, holder="reader", seconds=-leases.SKEW
  )  # over
  for number in (2, 3):
    put(bucket, number, keep=2)
  assert publish.versions(bucket, "main") == [0, 2, 3]
  publish.release(bucket, "main", 0, holder="baseline")
  put(bucket, 4, keep=2)
  bucket.settle()
  assert publish.versions(bucket, "main") == [3, 4]
  root = tmp_path / "policies/main"
  assert sorted(p.name for p in root.glob("v*")) == ["v3", "v4"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"until": "soon"}', b'{"until": NaN}', b"\xff", b"{}"]
    + [b"[" * 100_000, b'{"until": 1' + b"0" * 400 + b"}"],
)
def test_a_lease_that_cannot_be_read_is_named_and_kept(bucket, content):
  put(bucket, 0, keep=1)
  publish.lease(bucket, "main", 0, holder="reader", seconds=9)
  key = "policies/main/leases/v0/reader"
  bucket.put(key, content)
  bucket.put("policies/main/leases/notes", b"0")
  published = put(bucket, 1, keep=1)
  assert [key in line for line in published.damaged] == [False, True]
  assert "leases/notes" in published.damaged[0]
  assert publish.versions(bucket, "main") == [0, 1]
  publish.release(bucket, "main", 0, holder="reader")
  assert len(put(bucket, 2, keep=1).damaged) == 1
  assert publish.versions(bucket, "main") == [2]


def test_only_what_exists_can_be_leased(bucket):
  with pytest.raises(publish.NoVersionError, match="no version 7"):
    publish.lease(bucket, "main", 7, holder="me", seconds=1)
  assert bucket.list() == []


def damage(path: pathlib.Path, how: str) -> None:
  data = bytearray(path.read_bytes())
  if how == "delete":
    path.unlink()
  elif how == "truncate":
    path.write_bytes(data[: len(data) // 2])
  elif how == "empty":
    path.write_bytes(b"")
  else:
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["delete", "truncate", "empty", "flip"])
@pytest.mark.parametrize(
    "what", ["manifest.json", "embed/c/0/0", "layers/all/query/zarr.json"]
)
def test_a_corrupt_version_is_named_and_skipped(
    bucket, tmp_path, caplog, how, what
):
  for number in range(3):
    put(bucket, number)
  damage(tmp_path / "policies/main/v2" / what, how)
  with caplog.at_level(logging.WARNING):
    weights = read(bucket)
  if what.endswith("zarr.json") and how == "flip" and not weights.skipped:
    assert same(weights.params, params(2))  # the bit meant nothing
    return
  assert weights.version.number == 1
  assert same(weights.params, params(1))
  assert len(weights.skipped) == 1
  assert "version 2" in weights.skipped[0]
  assert "version 2" in caplog.text
  with pytest.raises((atomic.CorruptError, publish.NoVersionError)):
    read(bucket, 2)
  put(bucket, 2)  # publishing again heals it
  assert read(bucket).version.number == 2


def test_two_corrupt_versions_are_skipped_in_order(bucket, tmp_path):
  for number in range(3):
    put(bucket, number)
  for number in (1, 2):
    damage(tmp_path / f"policies/main/v{number}/embed/c/0/0", "flip")
  weights = read(bucket)
  assert weights.version.number == 0
  first, second = weights.skipped
  assert "version 2" in first and "version 1" in second
  damage(tmp_path / "policies/main/v0/embed/c/0/0", "truncate")
  with pytest.raises(publish.NoVersionError, match=r"version 2.*; .*version 0"):
    read(bucket)


@pytest.mark.parametrize(
    "pointer",
    [b"", b"{", b"[]", b"[" * 100_000]
    + [
        f'{{"number": {number}}}'.encode()
        for number in ('"x"', "Infinity", "0.9", "true", "-1", "null")
    ],
)
def test_a_corrupt_pointer_leads_to_the_newest_good_version(bucket, pointer):
  for number in range(2):
    put(bucket, number)
  bucket.put("policies/main/LATEST", pointer)
  weights = read(bucket)
  assert weights.version.number == 1
  assert "LATEST" in weights.skipped[0]
  with pytest.raises(atomic.CorruptError, match="LATEST"):
    publish.latest(bucket, "main")


def test_a_version_moved_elsewhere_is_not_believed(bucket, tmp_path):
  for number in range(2):
    put(bucket, number)
  root = tmp_path / "policies/main"
  text = (root / "v0/manifest.json").read_text()
  (root / "v1/manifest.json").write_text(text)
  assert read(bucket).version.number == 0


def test_a_changed_manifest_is_not_believed(bucket, tmp_path):
  put(bucket, 0)
  path = tmp_path / "policies/main/v0/manifest.json"
  manifest = json.loads(path.read_text())
  manifest["meta"]["step"] = 9
  path.write_text(json.dumps(manifest))
  with pytest.raises(atomic.CorruptError, match="digest differs"):
    read(bucket, 0)


def test_a_manifest_of_brackets_is_skipped(bucket, tmp_path):
  for number in range(2):
    put(bucket, number)
  (tmp_path / "policies/main/v1/manifest.json").write_text("[" * 100_000)
  assert read(bucket).version.number == 0


def test_weights_of_another_configuration_are_an_error_not_corrupt(bucket):
  put(bucket, 0)
  put(bucket, 1)
  other = LIKE | {"embed": jax.ShapeDtypeStruct((16, 8), np.float32)}
  with pytest.raises(ValueError, match=r"embed is float32\[16, 4\], not"):
    publish.read(bucket, "main", "latest", like=other)
  with pytest.raises(ValueError, match="embed is unknown"):
    publish.read(bucket, "main", 0, like={"layers": LIKE["layers"]})
  with pytest.raises(ValueError, match="extra is missing"):
    publish.read(bucket, "main", 0, like=LIKE | {"extra": LIKE["embed"]})


def test_wrong_names_and_numbers_are_refused_before_any_work(bucket):
  weights = params(0)
  for policy in ("..", "a/b", "", "/abs"):
    with pytest.raises(ValueError, match="policy"):
      publish.publish(bucket, policy, 0, weights, keep=1, meta={})
  for number in (-1, 1.5, True):
    with pytest.raises(ValueError, match="number"):
      publish.publish(bucket, "main", number, weights, keep=1, meta={})
  with pytest.raises(ValueError, match="keep"):
    put(bucket, 0, keep=0)
  with pytest.raises(ValueError, match="holder"):
    publish.lease(bucket, "main", 0, holder="../x", seconds=1)
  assert bucket.list() == []


def test_what_cannot_be_written_leaves_the_pointer(tmp_path, monkeypatch):
  bucket = store.open_folder(tmp_path)
  put(bucket, 0)

  def full(prefix, arrays):
    store.Store.write_arrays(bucket, prefix, {"embed": arrays["embed"]})
    raise atomic.StorageError("cannot write: No space left on device")

  monkeypatch.setattr(bucket, "write_arrays", full)
  with pytest.raises(atomic.StorageError, match="No space left"):
    put(bucket, 1)
  bucket.settle()
  assert read(bucket).version.number == 0
  assert not (tmp_path / "policies/main/v1").exists()


def test_s3_holds_versions_too(s3_endpoint):
  name = uuid.uuid4().hex
  bucket = store.open(f"s3://my-bucket/{name}?endpoint={s3_endpoint}")
  for number in range(3):
    put(bucket, number, keep=2)
  bucket.settle()
  assert publish.versions(bucket, "main") == [1, 2]
  assert same(read(bucket).params, params(2))


@pytest.mark.parametrize("behind", [-300, 300])
def test_a_lease_survives_clocks_minutes_apart(bucket, monkeypatch, behind):
  put(bucket, 0, keep=1)
  now = time.time()
  monkeypatch.setattr(time, "time", lambda: now - behind)  # the holder's
  publish.lease(bucket, "main", 0, holder="reader", seconds=60)
  monkeypatch.setattr(time, "time", lambda: now + 59)  # the publisher's
  put(bucket, 1, keep=1)
  assert publish.versions(bucket, "main") == [0, 1]
  monkeypatch.setattr(time, "time", lambda: now + 60 + 300 + leases.SKEW)
  put(bucket, 2, keep=1)
  assert publish.versions(bucket, "main") == [2]


def test_a_lease_taken_while_its_version_is_removed_saves_it(
    bucket, monkeypatch
):
  put(bucket, 0, keep=1)
  straight = bucket.delete

  def overtaken(key):
    if key.endswith("v0/manifest.json"):
      monkeypatch.undo()
      publish.lease(bucket, "main", 0, holder="reader", seconds=60)
    straight(key)

  monkeypatch.setattr(bucket, "delete", overtaken)
  put(bucket, 1, keep=1)
  assert publish.versions(bucket, "main") == [0, 1]
  assert same(read(bucket, 0).params, params(0))


def test_a_lease_that_ran_out_may_be_prolonged_at_any_moment(
    bucket, monkeypatch
):
  """The publisher has read that it is over when the holder prolongs it."""
  put(bucket, 0, keep=1)
  publish.lease(bucket, "main", 0, holder="reader", seconds=-leases.SKEW - 1)
  straight = bucket.get

  def overtaken(key):
    found = straight(key)
    if key.endswith("leases/v0/reader"):
      monkeypatch.undo()
      publish.lease(bucket, "main", 0, holder="reader", seconds=60)
    return found

  monkeypatch.setattr(bucket, "get", overtaken)
  put(bucket, 1, keep=1)
  assert publish.versions(bucket, "main") == [0, 1]
  assert bucket.list("policies/main/leases")


def test_leases_go_with_the_version_that_they_kept(bucket):
  put(bucket, 0, keep=1)
  publish.lease(bucket, "main", 0, holder="reader", seconds=-leases.SKEW - 1)
  put(bucket, 1, keep=1)
  assert publish.versions(bucket, "main") == [1]
  assert bucket.list("policies/main/leases") == []


def test_what_was_never_finished_takes_no_versions_place(bucket):
  for number in (0, 2):
    put(bucket, number, keep=2)
  bucket.put("policies/main/v1/embed/zarr.json", b"{}")  # a killed publisher's
  bucket.put("policies/main/v3/embed/zarr.json", b"{}")
  put(bucket, 4, keep=2)
  assert publish.versions(bucket, "main") == [2, 4]
  bucket.settle()
  assert not bucket.list("policies/main/v1") + bucket.list("policies/main/v3")


def test_who_may_publish_no_more_changes_nothing(bucket):
  put(bucket, 0, keep=1)
  kept = {key: bucket.get(key) for key in bucket.list()}

  def taken():
    raise RuntimeError("another has the job")

  with pytest.raises(RuntimeError, match="another has the job"):
    publish.publish(
        bucket, "main", 1, killed.tree(1), keep=1, meta={}, sure=taken
    )
  assert {key: bucket.get(key) for key in bucket.list()} == kept


def test_of_two_publishers_the_second_is_told(bucket, monkeypatch):
  put(bucket, 0)
  straight = bucket.write_arrays

  def overtaken(prefix, arrays):
    monkeypatch.undo()
    straight(prefix, arrays)
    put(store.open(bucket.url), 1, seed=100)

  monkeypatch.setattr(bucket, "write_arrays", overtaken)
  with pytest.raises(publish.OvertakenError, match="another process publishes"):
    put(bucket, 2)
  assert read(bucket).version.number == 1
  assert same(read(bucket).params, params(100))


def test_what_was_damaged_on_its_way_is_read_again(bucket, monkeypatch):
  for number in range(2):
    put(bucket, number)
  straight = bucket.read_arrays

  def damaged(prefix, names, seen, forms):
    monkeypatch.undo()
    found = straight(prefix, names)
    found["embed"] += 1
    for name, array in found.items():
      seen(name, array)
    return found

  monkeypatch.setattr(bucket, "read_arrays", damaged)
  weights = read(bucket)
  assert weights.version.number == 1
  assert weights.skipped == ()


@pytest.mark.parametrize("whole_every", [1, 3])
def test_a_reader_beside_the_publisher_never_sees_a_mixture(
    tmp_path, whole_every
):
  """Retention keeps one version, so readers are overtaken all the time."""
  bucket, reader = (store.open_folder(tmp_path) for _ in range(2))
  like, bases = killed.tree(0), Bases(whole_every)
  publish.publish(bucket, "main", 0, like, keep=1, meta={}, bases=bases)
  stop = threading.Event()

  def write() -> None:
    for number in itertools.count(1):
      if stop.is_set():
        return
      weights = killed.tree(number)
      publish.publish(
          bucket, "main", number, weights, keep=1, meta={}, bases=bases
      )

  thread = threading.Thread(target=write)
  thread.start()
  try:
    seen: list[int] = []
    limit = time.monotonic() + 60  # seconds; a busy machine starts it late
    while len(seen) < 30 or len(set(seen)) < 3:
      assert time.monotonic() < limit, "the publisher does not move"
      seen.append(whole(reader, like))
  finally:
    stop.set()
    thread.join(30)
  assert seen == sorted(seen)


def test_an_overtaken_reader_takes_the_newer_version(bucket, monkeypatch):
  put(bucket, 0, keep=1)
  straight = bucket.read_arrays

  def overtaken(prefix, names, seen, forms):
    monkeypatch.undo()
    put(bucket, 1, keep=1)
    bucket.settle()
    return straight(prefix, names, seen, forms)

  monkeypatch.setattr(bucket, "read_arrays", overtaken)
  weights = read(bucket)
  assert weights.version.number == 1
  assert weights.skipped == ()


def whole(bucket, like) -> int:
  """Reads the newest version; all of it must be of one number."""
  weights = publish.read(bucket, "main", "latest", like=like)
  number = weights.version.number
  for array in weights.params.values():
    assert np.all(np.asarray(array) == number)
  assert weights.skipped == ()
  return number


@pytest.mark.parametrize("what", ["publish", "differences"])
def test_a_killed_publisher_leaves_whole_versions(tmp_path, what):
  rounds = 8
  script = pathlib.Path(killed.__file__)
  command = [sys.executable, script, what, tmp_path, str(rounds), "0"]
  bucket = store.open_folder(tmp_path)
  like = killed.tree(0)
  seen = []
  with subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:
    for _ in range(rounds):
      assert process.stdout.readline() == "killed\n"
      seen.append(whole(bucket, like))
      process.stdin.write("\n")
      process.stdin.flush()
  assert process.returncode == 0
  assert seen == sorted(set(seen))
  publish.publish(bucket, "main", 10**6, like, keep=1, meta={})
  bucket.settle()
  left = {key.split("/")[2] for key in bucket.list("policies")}
  assert left == {"LATEST", f"v{10**6}"}  # no half-written rest stays


def test_what_other_programs_leave_there_harms_nobody(bucket, tmp_path):
  put(bucket, 0)
  root = os.fsencode(tmp_path / "policies/main")
  os.makedirs(root + b"/leases/v0")
  strays = [b"/leases/v0/.nfs0001", b"/v0/.DS_Store", b"/v0/a b", b"/v0/\xff"]
  for stray in strays:
    with open(root + stray, "wb") as file:
      file.write(b"x")
  assert all(key.isascii() and "/." not in key for key in bucket.list())
  for number in range(1, 3):
    put(bucket, number, keep=1)
  bucket.settle()
  assert publish.versions(bucket, "main") == [2]
  assert read(bucket).version.number == 2
  assert not os.path.exists(root + b"/v0")  # with all that lay there
