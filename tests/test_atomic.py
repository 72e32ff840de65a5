"""Files and pytrees on the host: whole, locked, equal to the bit."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrpo_jax import atomic, leaves


def test_a_file_is_replaced_and_its_folders_are_made(tmp_path):
  path = tmp_path / "a/b/file"
  atomic.write(path, "é")
  assert path.read_bytes() == b"\xc3\xa9"
  atomic.write(path, b"2")
  assert path.read_bytes() == b"2"
  assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
  path = tmp_path / "file"
  atomic.write(path, "old")
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder/x").write_text("")
  with pytest.raises(atomic.StorageError) as caught:
    atomic.write(tmp_path / "folder", "new")
  assert str(caught.value) == (
      f"cannot write {tmp_path / 'folder'}: Is a directory"
  )
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
  with pytest.raises(atomic.StorageError, match="file/below: File exists"):
    atomic.write(path / "below", "new")
  assert path.read_text() == "old"


def test_json_goes_round_and_other_values_are_refused(tmp_path):
  path = tmp_path / "x.json"
  atomic.write_json(path, {"a": [1, None]})
  assert atomic.read_json(path) == {"a": [1, None]}
  for value in (float("nan"), {1, 2}, b""):
    with pytest.raises(ValueError, match="x.json is not JSON"):
      atomic.write_json(path, value)
  for text in ("{", "[" * 100_000):
    path.write_text(text)
    with pytest.raises(atomic.CorruptError, match="x.json is not JSON"):
      atomic.read_json(path)
  with pytest.raises(atomic.StorageError, match="No such file"):
    atomic.read_json(tmp_path / "none")


WRITER = """
import itertools, sys
from mgrpo_jax import atomic
for n in itertools.count():
  atomic.write(sys.argv[1], f"{n % 10}" * 200_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
  path = tmp_path / "file"
  atomic.write(path, "0" * 200_000)
  with subprocess.Popen([sys.executable, "-c", WRITER, path]) as process:
    seen = set()
    deadline = time.monotonic() + 30
    try:
      while len(seen) < 5 and time.monotonic() < deadline:
        text = path.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1
        seen.add(text[0])
    finally:
      process.send_signal(signal.SIGKILL)
  assert len(seen) == 5
  text = path.read_text()
  assert len(text) == 200_000 and len(set(text)) == 1
  (tmp_path / ".file.1.1.partial").write_text("left")
  assert atomic.sweep(tmp_path) >= 1
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture(params=["nothing", "folder", "file", "link"])
def taken(tmp_path, request):
  """A path that something has the name of, and what is there."""
  path, other = tmp_path / "policies", tmp_path / "other"
  other.mkdir()
  (other / "precious").write_text("1")
  if request.param == "folder":
    path.mkdir()
    (path / "before").write_text("0")
  elif request.param == "file":
    path.write_text("0")
  elif request.param == "link":
    path.symlink_to(other)
  return path


def test_a_directory_takes_the_place_of_whatever_was_there(taken):
  with atomic.replacing(taken) as made:
    (made / "after").write_text("2")
  assert [path.name for path in taken.iterdir()] == ["after"]
  assert not taken.is_symlink()
  names = sorted(path.name for path in taken.parent.iterdir())
  assert names == ["other", "policies"]
  assert (taken.parent / "other/precious").is_file()


def state(path):
  if path.is_symlink():
    return os.readlink(path)
  if path.is_dir():
    return {below.name: below.read_text() for below in path.iterdir()}
  return path.read_text() if path.exists() else None


def test_a_directory_that_fails_leaves_what_was_there(taken):
  before = state(taken)
  with pytest.raises(RuntimeError):
    with atomic.replacing(taken) as made:
      (made / "half").write_text("2")
      assert state(taken) == before
      raise RuntimeError
  assert state(taken) == before


def test_a_kill_between_the_renames_costs_nothing(tmp_path):
  (tmp_path / ".policies.old").mkdir()
  (tmp_path / ".policies.old/before").write_text("0")
  (tmp_path / ".policies.new").mkdir()
  with pytest.raises(RuntimeError):
    with atomic.replacing(tmp_path / "policies") as made:
      assert not list(made.iterdir())
      raise RuntimeError
  assert state(tmp_path / "policies") == {"before": "0"}
  assert [path.name for path in tmp_path.iterdir()] == ["policies"]


def test_what_cannot_be_replaced_is_one_line(tmp_path, monkeypatch):
  (tmp_path / "policies").mkdir()

  def refuse(path, ignore_errors=False):
    if not ignore_errors:
      raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(atomic.shutil, "rmtree", refuse)
  with pytest.raises(
      atomic.StorageError, match="cannot replace .*policies: Permission denied"
  ):
    with atomic.replacing(tmp_path / "policies"):
      pass


def _hold(path: str, ready) -> None:
  with atomic.exclusive(path):
    ready.set()
    time.sleep(60)


def test_one_process_at_a_time_and_none_after_a_kill(tmp_path):
  path = tmp_path / "run" / ".lock"
  spawn = multiprocessing.get_context("spawn")
  ready = spawn.Event()
  holder = spawn.Process(target=_hold, args=(str(path), ready))
  holder.start()
  assert ready.wait(30)
  with pytest.raises(atomic.StorageError, match="in use by another process"):
    with atomic.exclusive(path):
      pass
  os.kill(holder.pid, signal.SIGKILL)
  holder.join(30)
  with atomic.exclusive(path):
    pass
  with atomic.exclusive(path):
    pass


def test_leaves_are_named_by_their_path():
  tree = {"a": [1, {"b": 2}], "c": (3,)}
  assert leaves.named(tree) == {"a/0": 1, "a/1/b": 2, "c/0": 3}
  with pytest.raises(ValueError, match="two leaves are named 'a/b'"):
    leaves.named({"a": {"b": 1}, "a/b": 2})


def test_a_tree_goes_to_the_host_and_back():
  tree = {
      "w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
      "n": jnp.int32(3),
      "keys": jax.random.split(jax.random.key(0, impl="rbg"), 3),
      "raw": jax.random.PRNGKey(1),
  }
  host = leaves.to_host(tree)
  assert all(type(array) is np.ndarray for array in host.values())
  for like in (tree, jax.eval_shape(lambda: tree)):
    back = leaves.from_host(host, like, what="x")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for name in ("w", "n", "raw"):
      assert back[name].dtype == tree[name].dtype
      np.testing.assert_array_equal(back[name], tree[name])
    assert back["keys"].dtype == tree["keys"].dtype
    assert jnp.array_equal(
        jax.random.key_data(back["keys"]), jax.random.key_data(tree["keys"])
    )


def test_arrays_go_to_the_sharding_they_had():
  mesh = jax.make_mesh(
      (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  tree = {"w": jax.device_put(np.arange(8.0, dtype=np.float32), spread)}
  host = leaves.to_host(tree)
  back = leaves.from_host(host, tree, what="x")
  assert back["w"].sharding == spread
  np.testing.assert_array_equal(back["w"], np.arange(8.0))


def test_only_arrays_go_to_the_host():
  with pytest.raises(ValueError, match="'a' is float, not an array"):
    leaves.to_host({"a": 1.0})


def test_digests_see_values_shapes_dtypes_and_names():
  array = np.arange(6, dtype=np.float32)
  said = {"a": leaves.describe(array)}
  leaves.verify({"a": array.copy()}, said)
  changed = array.copy()
  changed[3] = np.nextafter(changed[3], 9)
  for other in (changed, array.reshape(2, 3), array.view(np.int32)):
    with pytest.raises(atomic.CorruptError, match="digests differ: a"):
      leaves.verify({"a": other}, said)
  with pytest.raises(atomic.CorruptError, match="missing or unexpected: b"):
    leaves.verify({"a": array, "b": array}, said)
  with pytest.raises(atomic.CorruptError, match="missing or unexpected: a"):
    leaves.verify({}, said)


def test_a_sealed_record_notices_any_change():
  body = {"a": [1, 2.5, None], "é": {"b": "x"}}
  record = json.loads(json.dumps(leaves.seal(body)))
  assert leaves.check_seal(record) == body
  for bad in (record | {"a": [1, 2.5]}, record | {"c": 1}, body, [], None):
    with pytest.raises(atomic.CorruptError):
      leaves.check_seal(bad)


def test_reasons_are_one_line():
  error = ValueError("boom [os_error_code='28']\nmore")
  assert atomic.reason(error) == os.strerror(28)
  assert atomic.reason(ValueError("one\ntwo")) == "one"
  assert atomic.reason(ValueError()) == "ValueError"
