"""The bucket: keys, compare-and-swap and arrays, on all four back ends."""

import multiprocessing
import os
import pathlib
import urllib.parse
import uuid
from collections.abc import Iterator

import emulators
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo_jax import atomic, chunks, disk, store
from mgrpo_jax.keys import check_key, check_name
from mgrpo_jax.testing import object_servers


@pytest.fixture(params=["file", "memory", "s3", "gs"])
def bucket(request, tmp_path) -> store.Store:
  name = f"run-{uuid.uuid4().hex}"
  if request.param == "file":
    return store.open_folder(tmp_path / "a bucket")
  if request.param == "memory":
    return store.open(f"memory://{name}")
  kind = {"s3": "s3_endpoint", "gs": "gcs_endpoint"}[request.param]
  endpoint = request.getfixturevalue(kind)
  return store.open(f"{request.param}://my-bucket/{name}?endpoint={endpoint}")


@pytest.fixture(scope="session")
def gcs_endpoint() -> Iterator[str]:
  with emulators.serve() as endpoint:
    yield endpoint


def test_keys_are_written_read_listed_and_deleted(bucket):
  assert bucket.get("a/b") is None
  assert bucket.list() == []
  for key, value in {"a/b": b"1", "a/c/d": b"", "ab": b"2"}.items():
    bucket.put(key, value)
  assert bucket.list() == ["a/b", "a/c/d", "ab"]
  assert bucket.list("a") == ["a/b", "a/c/d"]
  assert bucket.list("a/c") == ["a/c/d"]
  assert bucket.get("a/c/d") == b""
  bucket.put("a/b", b"3")
  assert bucket.get("a/b") == b"3"
  bucket.delete("a/b")
  bucket.delete("never")
  assert bucket.get("a/b") is None
  bucket.discard("a")
  bucket.settle()
  assert bucket.list() == ["ab"]


def test_swap_lets_one_of_two_win(bucket):
  assert bucket.can_swap
  absent = bucket.read("k")
  first = bucket.swap(absent, b"1")
  assert first is not None
  assert bucket.swap(absent, b"2") is None
  assert bucket.get("k") == b"1"
  second = bucket.swap(bucket.read("k"), b"3")
  assert second is not None
  assert bucket.swap(first, b"4") is None
  assert bucket.replace(second, b"5")
  assert not bucket.replace(second, b"6")
  assert bucket.list() == ["k"]
  if bucket.url.startswith("s3"):
    with pytest.raises(atomic.StorageError, match="no compare-and-swap"):
      bucket.swap(bucket.read("k"), None)
    return
  assert bucket.swap(first, None) is None
  assert bucket.swap(bucket.read("k"), None) is not None
  assert bucket.get("k") is None


def test_neighbours_in_a_bucket_are_left_alone(s3_endpoint):
  address = f"s3://my-bucket/{{}}?endpoint={s3_endpoint}"
  one, two = (store.open(address.format(n)) for n in ("near", "nearby"))
  for each in (one, two):
    each.put("a/b", b"1")
  one.discard("a")
  one.settle()
  assert one.list() == []
  assert two.list("a") == ["a/b"]


def _on_emulated_gcs(endpoint: str) -> None:
  """A process of its own, for one process has one GCS endpoint."""
  os.environ.pop("TENSORSTORE_GCS_HTTP_URL", None)  # its parent's
  address = f"gs://my-bucket/{{}}?endpoint={endpoint}"
  one, two = (store.open(address.format(n)) for n in ("one", "two"))
  for each in (one, two):
    each.put("a/b", b"1")
    each.put("ab", b"2")
  assert one.list() == ["a/b", "ab"]
  assert one.list("a") == ["a/b"]
  one.discard("a")
  one.settle()
  assert one.list() == ["ab"]
  assert two.list() == ["a/b", "ab"]
  array = np.arange(7, dtype=np.float32)
  one.put("vw", b"3")
  for name in ("w", "x", "w"):
    one.write_arrays("v", {name: array})
  for name in ("w", "x"):
    np.testing.assert_array_equal(one.read_arrays("v", [name])[name], array)
  assert (one.get("vw"), two.get("ab")) == (b"3", b"2")
  assert not one.can_swap  # it ignores conditions
  with pytest.raises(atomic.StorageError, match="no compare-and-swap"):
    one.swap(one.read("k"), b"1")
  assert one.replace(one.read("k"), b"1")


def test_an_emulator_that_ignores_bounds_and_conditions_costs_nothing():
  pytest.importorskip(
      "gcp_storage_emulator",
      reason="gcp-storage-emulator is missing: pip install -e .[test]",
  )
  with object_servers.gcs() as endpoint:
    process = multiprocessing.get_context("spawn").Process(
        target=_on_emulated_gcs, args=(endpoint,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_arrays_come_back_bit_for_bit(bucket):
  rng = np.random.default_rng(0)
  arrays = {
      "layers/0/query": rng.standard_normal((7, 5), dtype=np.float32),
      "layers/0/key": rng.standard_normal((5, 7)).T,  # not C-contiguous
      "scalar": np.array(3, np.int32),
      "none": np.zeros((0, 3), np.float32),
      "zeros": np.array([0.0, -0.0], np.float32),
      "others": np.array([np.nan, np.inf, 1e-45], np.float32),
      "flags": np.array([True, False]),
  }
  bucket.write_arrays("p/v1", arrays)
  found = bucket.read_arrays("p/v1", arrays)
  assert list(found) == list(arrays)
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    assert found[name].shape == array.shape
    assert found[name].tobytes() == array.tobytes()
  bucket.write_arrays("p/v1", {"flags": np.arange(3)})  # another shape
  assert bucket.read_arrays("p/v1", ["flags"])["flags"].tolist() == [0, 1, 2]
  with pytest.raises(atomic.CorruptError, match="p/v1/nothing"):
    bucket.read_arrays("p/v1", ["nothing"])


def test_large_arrays_are_cut_into_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(chunks, "MAX_BYTES", 1000)
  bucket = store.open_folder(tmp_path)
  array = np.arange(1001 * 3, dtype=np.float32).reshape(1001, 3)
  bucket.write_arrays("v", {"w": array})
  files = [p for p in (tmp_path / "v/w/c").rglob("*") if p.is_file()]
  assert len(files) == 13  # ceil(1001 / (1000 // 12))
  assert max(p.stat().st_size for p in files) <= 1000
  np.testing.assert_array_equal(bucket.read_arrays("v", ["w"])["w"], array)


def test_chunks_go_on_to_the_disk_as_they_are_written(bucket, monkeypatch):
  """Whoever publishes does not wait for it; who needs them there, less."""
  hastened = []
  monkeypatch.setattr(disk, "hasten", hastened.append)
  monkeypatch.setattr(chunks, "MAX_BYTES", 64)
  arrays = {"a/b": np.arange(40), "c": np.float32(3)}
  bucket.write_arrays("folder", arrays)
  written = [f"folder/a/b/c/{n}" for n in range(5)] + ["folder/c/c"]
  assert {*written} <= {*bucket.list()}
  if bucket.url.startswith("file://"):
    path = urllib.parse.unquote(bucket.url.removeprefix("file://"))
    root = pathlib.Path(path)
    assert sorted(hastened) == sorted(str(root / key) for key in written)
  else:
    assert not hastened


def test_discarded_folders_vanish_with_their_directories(tmp_path):
  bucket = store.open_folder(tmp_path)
  bucket.write_arrays("v1", {"a/b": np.ones(3), "c": np.ones(3)})
  bucket.put("v10/x", b"1")
  bucket.discard("v1")
  bucket.settle()
  assert [p.name for p in tmp_path.iterdir()] == ["v10"]


def test_a_memory_bucket_is_shared_by_name():
  name = uuid.uuid4().hex
  store.open(f"memory://{name}").put("k", b"1")
  assert store.open(f"memory://{name}/").get("k") == b"1"
  assert store.open(f"memory://{name}x").get("k") is None


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "..",
        "a/../b",
        "a//b",
        "a/",
        "./a",
        "a/.hidden",
        "a\\b",
        "a\x00",
        "a b",
        "a\n",
        "é",
        "x.__lock",
        "x" * 600,
        "a?b",
        "file:a",
    ],
)
def test_keys_that_could_leave_the_bucket_are_refused(key):
  bucket = store.open("memory://keys")
  for use in (bucket.get, bucket.delete, bucket.discard, check_key):
    with pytest.raises(ValueError, match="key"):
      use(key)
  with pytest.raises(ValueError, match="key"):
    bucket.put(key, b"")
  with pytest.raises(ValueError, match="key"):
    bucket.write_arrays("v", {key: np.zeros(1)})


@given(st.text(max_size=20))
def test_an_accepted_key_stays_inside(key):
  root = pathlib.Path("/root/of/bucket")
  try:
    check_key(key)
  except ValueError:
    return
  path = pathlib.Path(f"{root}/{key}").resolve()
  assert path.is_relative_to(root) and path != root
  assert str(path) == f"{root}/{key}"


def test_names_are_single_segments():
  assert check_name("main", "policy") == "main"
  with pytest.raises(ValueError, match=r"policy: 'a/b'"):
    check_name("a/b", "policy")
  with pytest.raises(ValueError, match=r"policy: .*'\.\.'"):
    check_name("..", "policy")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://host/x", "file://, memory://, gs://, s3://"),
        ("runs/a", "must start with one of"),
        ("file://relative/x", "absolute"),
        ("file:///x?endpoint=http://h", "unknown option 'endpoint'"),
        ("gs://", "must name a bucket"),
        ("s3:///folder", "must name a bucket"),
        ("gs://bucket/x?region=us", "unknown option 'region'"),
        ("s3://bucket/x#y", "must start with one of"),
        ("file:///x/n%E9", "not UTF-8"),
        ("file:///x?b/c", "unknown option 'b/c' in 'file:///x.*none"),
        ("file:///x?", "unknown option ''"),
        ("file:///x#", "must start with one of"),
        ("file:///x\n", "not printed"),
        ("file://[x/y", "Invalid IPv6"),
        ("s3://bucket/x?", "unknown option ''.*endpoint or region"),
        ("s3://bucket/x?endpoint", "'endpoint' is empty in 's3://bucket/x"),
        ("s3://bucket/x?endpoint=", "'endpoint' is empty"),
        ("gs://bucket/x?endpoint=", "'endpoint' is empty"),
        ("s3://bucket/x?region=", "'region' is empty"),
        ("s3://bucket/x?region=a&region=b", "'region' stands twice"),
        ("s3://bucket/x?region=a&&", "unknown option ''"),
        ("s3://bucket/x?endpoint=localhost:1", "must be http://HOST:PORT"),
        ("s3://bucket/x?endpoint=http://u:p@h", "must be http://HOST:PORT"),
        ("s3://user:pw@bucket/x", "must name a bucket"),
        ("gs://bucket/n%E9", "not UTF-8"),
    ],
)
def test_other_addresses_are_refused(url, words):
  with pytest.raises(ValueError, match=words) as caught:
    store.open(url)
  assert "\n" not in str(caught.value)


def test_no_error_shows_what_may_be_a_secret():
  for url in (
      "s3://user:pw@b/x",
      "s3://b/x?key=pw",
      "gs://b?endpoint=http://pw@h",
  ):
    with pytest.raises(ValueError) as caught:
      store.open(url)
    assert "pw" not in str(caught.value)


def test_one_process_has_one_gcs_endpoint(gcs_endpoint):
  store.open(f"gs://my-bucket/x?endpoint={gcs_endpoint}")
  with pytest.raises(ValueError, match="already uses the GCS endpoint"):
    store.open("gs://my-bucket/x?endpoint=http://localhost:1")


def test_errors_say_what_where_and_why(tmp_path):
  (tmp_path / "file").write_text("")
  bucket = store.open_folder(tmp_path / "file" / "bucket")
  with pytest.raises(atomic.StorageError) as caught:
    bucket.put("a", b"1")
  text = str(caught.value)
  assert text == f"cannot write {bucket.url}/a: Not a directory"


def test_a_damaged_array_is_corrupt_not_unreadable(tmp_path):
  bucket = store.open_folder(tmp_path)
  bucket.write_arrays("v", {"w": np.arange(10)})
  chunk = tmp_path / "v/w/c/0"
  chunk.write_bytes(chunk.read_bytes()[:-3])
  with pytest.raises(atomic.CorruptError, match="v/w"):
    bucket.read_arrays("v", ["w"])


def _count_up(folder: str, times: int) -> None:
  """Adds to a counter, again and again, against other processes."""
  bucket = store.open_folder(folder)
  done = 0
  while done < times:
    record = bucket.read("counter")
    now = int(record.value or 0)
    done += bucket.swap(record, str(now + 1).encode()) is not None


def test_no_count_is_lost_between_processes(tmp_path):
  spawn = multiprocessing.get_context("spawn")
  people = [
      spawn.Process(target=_count_up, args=(str(tmp_path), 50))
      for _ in range(2)
  ]
  for person in people:
    person.start()
  for person in people:
    person.join(60)
    assert person.exitcode == 0
  assert store.open_folder(tmp_path).get("counter") == b"100"
