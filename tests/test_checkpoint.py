"""Checkpoints: bit for bit, whole or not at all, corrupt ones skipped."""

import logging
import math
import pathlib
import random
import resource
import shutil
import subprocess
import sys

import jax
import jax.monitoring
import jax.numpy as jnp
import killed
import numpy as np
import optax
import pytest

from mgrpo_jax import atomic, checkpoint
from mgrpo_jax.types import TrainState

HOST = {
    "stage": "easy",
    "data": {"position": [3, 7], "rng": None},
    "pending": ["peru/1", "chad/2"],
    "rate": 0.1,
    "best": -math.inf,
    "text": "é\n",
}


def state(seed: int) -> TrainState:
  rng = np.random.default_rng(seed)
  params = jax.device_put(
      {
          "embed": rng.standard_normal((1024, 4), dtype=np.float32),
          "layers": [{"scale": rng.standard_normal(4).astype(jnp.bfloat16)}],
      }
  )
  return TrainState(
      params=params,
      opt_state=optax.adamw(1e-3).init(params),
      step=jax.device_put(np.int32(seed)),
      rng=jax.random.key(seed),
  )


def run(seed: int) -> dict[str, TrainState]:
  return {"main": state(seed), "researcher": state(seed + 100)}


def bits(tree) -> list[tuple]:
  leaves = [
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
      for x in jax.tree.leaves(tree)
  ]
  return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in leaves]


def opened(folder, keep=3) -> checkpoint.Checkpoints:
  return checkpoint.Checkpoints(folder, max_to_keep=keep)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """Three checkpoints, to be copied and damaged."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  with opened(folder) as checkpoints:
    for step in (10, 20, 30):
      checkpoints.save(step, run(step), HOST | {"step": step})
  return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
  return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.mark.parametrize("abstract", [False, True])
def test_a_run_comes_back_bit_for_bit(folder, abstract):
  like = run(0)
  if abstract:
    like = jax.eval_shape(lambda: like)
  with opened(folder) as checkpoints:
    found = checkpoints.restore(like)
  assert found is not None
  assert found.step == 30
  assert found.host == HOST | {"step": 30}
  assert found.skipped == ()
  assert jax.tree.structure(found.states) == jax.tree.structure(run(0))
  assert bits(found.states) == bits(run(30))
  key = found.states["main"].rng
  assert jax.random.uniform(key) == jax.random.uniform(jax.random.key(30))


def test_nothing_saved_is_nothing_restored(tmp_path):
  with opened(tmp_path / "new") as checkpoints:
    assert checkpoints.restore(run(0)) is None
    assert checkpoints.steps() == []


def test_saving_and_restoring_compile_nothing(tmp_path):
  compiled = []

  def listen(event: str, seconds: float, **_) -> None:
    if "backend_compile" in event:
      compiled.append(event)

  states = run(1)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with opened(tmp_path) as checkpoints:
      checkpoints.save(1, states, {})
      found = checkpoints.restore(states)
    assert compiled == []
    jax.jit(lambda x: x * 3 + 41)(np.ones(17, np.float32))
    assert len(compiled) == 1  # the listener does listen
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert found is not None


def test_restored_arrays_do_not_compile_the_step_again(folder):
  @jax.jit
  def step(state: TrainState) -> TrainState:
    return state.replace(step=state.step + 1)

  fresh = run(0)
  step(fresh["main"])
  with opened(folder) as checkpoints:
    found = checkpoints.restore(fresh)
  step(found.states["main"])
  assert step._cache_size() == 1


def test_arrays_may_change_while_a_save_is_under_way(tmp_path):
  numbers = np.arange(200_000, dtype=np.float32)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, {"main": {"w": numbers}}, {})
    numbers[:] = -1
    found = checkpoints.restore({"main": {"w": numbers}})
  wanted = np.arange(200_000, dtype=np.float32)
  np.testing.assert_array_equal(found.states["main"]["w"], wanted)


def test_host_state_may_change_while_a_save_is_under_way(tmp_path):
  host = {"waiting": {"easy": []}}
  with opened(tmp_path / "checkpoints") as checkpoints:
    for step in range(5):  # whether the write has begun is a matter of luck
      checkpoints.save(step, run(1), host)
      host["waiting"][f"hard{step}"] = ["peru"]
    found = checkpoints.restore(run(0))
  assert found is not None
  assert found.skipped == ()
  assert len(found.host["waiting"]) == 5


def test_only_so_many_are_kept(tmp_path):
  with opened(tmp_path, keep=2) as checkpoints:
    for step in range(4):
      checkpoints.save(step, {"main": killed.tree(step)}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


FILES = [
    "arrays/manifest.ocdbt",
    "arrays/_METADATA",
    "arrays/d/*",
    "arrays/ocdbt.process_0/d/*",
    "record/metadata",
]


@pytest.mark.parametrize("how", ["delete", "truncate", "empty"])
@pytest.mark.parametrize("what", FILES)
def test_a_corrupt_checkpoint_is_named_skipped_and_set_aside(
    folder, caplog, how, what
):
  victims = list((folder / "30").glob(what))
  victim = max(victims, key=lambda path: path.stat().st_size)
  if how == "delete":
    victim.unlink()
  else:
    size = victim.stat().st_size // 2 if how == "truncate" else 0
    victim.write_bytes(victim.read_bytes()[:size])
  with opened(folder) as checkpoints:
    with caplog.at_level(logging.WARNING):
      found = checkpoints.restore(run(0))
    assert found.step == 20
    assert bits(found.states) == bits(run(20))
    assert len(found.skipped) == 1
    assert "checkpoint 30" in found.skipped[0]
    assert "checkpoint 30" in caplog.text
    assert checkpoints.steps() == [10, 20]
    checkpoints.save(30, run(30), {"again": True})
    assert checkpoints.restore(run(0)).host == {"again": True}
  assert (folder / "30.corrupt").is_dir()


@pytest.mark.parametrize(
    "notes", ["[1]", "[" * 100_000, '{"item_handlers": 3}']
)
def test_damaged_notes_of_orbax_cost_no_checkpoint(folder, notes):
  (folder / "20/_CHECKPOINT_METADATA").write_text(notes)
  with opened(folder) as checkpoints:
    found = checkpoints.restore(run(0))
    assert (found.step, found.host["step"]) == (30, 30)
    (problem,) = found.skipped
    assert "_CHECKPOINT_METADATA of checkpoints 10, 20, 30" in problem
    checkpoints.save(40, run(40), {})
  with opened(folder) as checkpoints:
    assert checkpoints.restore(run(0)).skipped == ()


def test_lost_data_is_found_before_orbax_reads(folder):
  for path in (folder / "30/arrays/ocdbt.process_0/d").iterdir():
    path.unlink()
  with opened(folder) as checkpoints:
    (problem,) = checkpoints.restore(run(0)).skipped
  assert "stored values are missing" in problem


def test_no_flipped_bit_goes_unnoticed(folder):
  rng = random.Random(0)
  files = [
      max((folder / "30").glob(what), key=lambda path: path.stat().st_size)
      for what in FILES
  ]
  wanted = {step: bits(run(step)) for step in (20, 30)}
  skipped = 0
  for path in files * 3:
    data = bytearray(path.read_bytes())
    before = bytes(data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    with opened(folder) as checkpoints:
      found = checkpoints.restore(run(0))
    assert bits(found.states) == wanted[found.step]
    assert found.host == HOST | {"step": found.step}
    skipped += len(found.skipped)
    if found.step == 20:
      (folder / "30.corrupt").rename(folder / "30")
    path.write_bytes(before)
  assert skipped > 6


def test_without_a_good_checkpoint_the_run_does_not_start_over(folder):
  for step in (10, 20, 30):
    (folder / f"{step}/record/metadata").write_text("{}")
  for _ in range(2):
    with opened(folder) as checkpoints:
      with pytest.raises(checkpoint.CheckpointError, match="no good") as caught:
        checkpoints.restore(run(0))
    assert "checkpoint 30" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_configuration_is_an_error_not_corrupt(folder):
  with opened(folder) as checkpoints:
    with pytest.raises(
        atomic.MismatchError, match=r"\['main', 'researcher'\], not"
    ):
      checkpoints.restore({"main": state(0)})
    wide = state(0)
    wide = wide.replace(params=wide.params | {"embed": jnp.zeros((16, 8))})
    with pytest.raises(
        atomic.MismatchError, match=r"main, .*embed is float32\[1024, 4\]"
    ):
      checkpoints.restore({"main": wide, "researcher": state(0)})
    assert checkpoints.steps() == [10, 20, 30]


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: 2}, np.int32(3), {"a": [(1,)]}, math.nan, b"x", {1, 2}],
)
def test_host_state_that_json_would_change_is_refused(tmp_path, value):
  with opened(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="host: 'key'"):
      checkpoints.save(1, run(0), {"key": value})
    assert checkpoints.steps() == []


def test_steps_only_grow(folder):
  with opened(folder) as checkpoints:
    for step in (30, 5):
      with pytest.raises(ValueError, match="later than checkpoint 30"):
        checkpoints.save(step, run(0), {})
  with pytest.raises(ValueError, match="max_to_keep"):
    opened(folder, keep=0)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(checkpoint.CheckpointError) as caught:
    opened(tmp_path / "file" / "checkpoints")
  assert str(caught.value).startswith("cannot open checkpoints in")
  assert str(caught.value).endswith(": Not a directory")


FULL = """
import resource, signal, sys, killed
import numpy as np
from mgrpo_jax import checkpoint
with checkpoint.Checkpoints(sys.argv[1], max_to_keep=2) as saved:
  like = {"main": {"a": killed.tree(0)["b"]}}
  saved.save(0, like, {})
  saved.save(1, like, {})
  saved.wait()
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
  noise = np.random.default_rng(0).standard_normal(50_000)
  saved.save(2, {"main": {"a": noise}}, {})
  try:
    saved.wait()
  except checkpoint.CheckpointError as error:
    print(error)
  print(saved.steps(), saved.restore(like).step)
"""


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path):
  """The limit on file sizes fails writes as a full disk does."""
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
  done = subprocess.run(
      [sys.executable, "-c", FULL, tmp_path / "checkpoints"],
      cwd=pathlib.Path(killed.__file__).parent,
      capture_output=True,
      text=True,
      timeout=60,
      check=True,
  )
  lines = done.stdout.splitlines()
  where = tmp_path / "checkpoints"
  assert lines[0] == f"cannot write checkpoint 2 to {where}: File too large"
  assert lines[1] == "[0, 1] 1"
  assert done.stderr == ""  # nor is orbax heard in the saves that succeed
  assert sorted(p.name for p in where.iterdir()) == ["0", "1"]


def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  with checkpoint.Checkpoints(tmp_path / "c", max_to_keep=2) as saved:
    with monkeypatch.context() as full:
      full.setattr(shutil, "disk_usage", lambda path: usage)
      with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        saved.save(0, {"main": killed.tree(0)}, {})
    assert list((tmp_path / "c").iterdir()) == []
    saved.save(0, {"main": killed.tree(0)}, {})
    assert saved.steps() == [0]


def test_a_killed_save_never_damages_earlier_checkpoints(tmp_path):
  rounds = 4
  script = pathlib.Path(killed.__file__)
  command = [sys.executable, script, "checkpoint", tmp_path, str(rounds), "1"]
  seen = []
  with subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:
    for _ in range(rounds):
      assert process.stdout.readline() == "killed\n"
      like = {"main": killed.tree(0), "researcher": killed.tree(0)}
      with opened(tmp_path) as checkpoints:
        found = checkpoints.restore(like)
      assert found.skipped == ()
      assert found.host == {"step": found.step}
      wanted = {
          "main": killed.tree(found.step),
          "researcher": killed.tree(found.step + 1),
      }
      assert bits(found.states) == bits(wanted)
      seen.append(found.step)
      process.stdin.write("\n")
      process.stdin.flush()
  assert process.returncode == 0
  assert seen == sorted(set(seen))
