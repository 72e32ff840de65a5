import json
import os
import signal
import subprocess
import sys

import pytest

from mgrpo_jax import atomic, workdir

CONFIG = {"seed": 0, "loss": {"clip": 0.2, "ratio": "token"}}


def test_a_new_directory_gets_the_config(tmp_path):
  with workdir.hold(tmp_path / "run", CONFIG) as held:
    assert held.read_config() == CONFIG
  assert json.loads((tmp_path / "run/config.json").read_text()) == CONFIG


def test_the_same_config_resumes_and_another_lists_differences(tmp_path):
  with workdir.hold(tmp_path, CONFIG):
    pass
  with workdir.hold(tmp_path, CONFIG):
    pass
  other = {"seed": 1, "loss": {"clip": 0.3, "ratio": "token"}, "new": 2}
  with pytest.raises(workdir.ConfigMismatchError) as error:
    with workdir.hold(tmp_path, other):
      pass
  text = str(error.value)
  assert "seed: 0 -> 1" in text
  assert "loss.clip: 0.2 -> 0.3" in text
  assert "new: absent -> 2" in text
  assert "ratio" not in text


def test_a_directory_whose_run_refuses_it_takes_another_config(tmp_path):
  def refuse():
    raise atomic.MismatchError("the bucket belongs to another config")

  with pytest.raises(atomic.MismatchError, match="the bucket"):
    with workdir.hold(tmp_path / "run", CONFIG, name=refuse):
      pass
  assert os.listdir(tmp_path / "run") == [".lock"]
  other = CONFIG | {"seed": 1}
  workdir.check(tmp_path / "run", other)
  with workdir.hold(tmp_path / "run", other, name=lambda: "joined") as held:
    assert held.read_id() == "joined"
    assert held.read_config() == other


def test_checking_changes_nothing(tmp_path):
  workdir.check(tmp_path / "new", CONFIG)
  assert not (tmp_path / "new").exists()
  with workdir.hold(tmp_path / "old", CONFIG):
    pass
  workdir.check(tmp_path / "old", CONFIG)
  with pytest.raises(workdir.ConfigMismatchError, match="seed: 0 -> 1"):
    workdir.check(tmp_path / "old", CONFIG | {"seed": 1})


def test_two_processes_cannot_hold_one_directory(tmp_path):
  with workdir.hold(tmp_path, CONFIG):
    with pytest.raises(atomic.StorageError, match="in use"):
      with workdir.hold(tmp_path, CONFIG):
        pass


def test_a_directory_with_other_things_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  with pytest.raises(atomic.StorageError, match="not empty"):
    with workdir.hold(tmp_path, CONFIG):
      pass
  assert sorted(os.listdir(tmp_path)) == ["thesis.tex"]


def test_what_other_jobs_of_a_run_made_first_is_in_nobodys_way(tmp_path):
  for name in ("bucket", "jobs"):
    (tmp_path / name).mkdir()
  workdir.check(tmp_path, CONFIG)
  with workdir.hold(tmp_path, CONFIG):
    assert (tmp_path / "config.json").exists()


KILLED_AT_THE_RENAME = """
import os, signal, sys
from mgrpo_jax import workdir
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with workdir.hold(sys.argv[1], {}):
  pass
"""


def test_a_directory_whose_first_write_was_killed_can_be_used(tmp_path):
  ended = subprocess.run(
      [sys.executable, "-c", KILLED_AT_THE_RENAME, tmp_path], check=False
  )
  assert ended.returncode == -signal.SIGKILL
  left = sorted(os.listdir(tmp_path))
  assert len(left) == 2 and left[0].startswith(".config.json.")
  workdir.check(tmp_path, CONFIG)
  with workdir.hold(tmp_path, CONFIG):
    assert sorted(os.listdir(tmp_path)) == [
        ".lock",
        "config.json",
        "run_id.json",
    ]


def test_another_programs_partial_file_is_left_alone(tmp_path):
  (tmp_path / ".thesis.tex.7.partial").write_text("precious")
  with pytest.raises(atomic.StorageError, match="not empty"):
    with workdir.hold(tmp_path, CONFIG):
      pass
  assert os.listdir(tmp_path) == [".thesis.tex.7.partial"]


def test_a_corrupt_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(atomic.CorruptError, match="config.json"):
    with workdir.hold(tmp_path, CONFIG):
      pass


def test_a_directory_below_a_file_is_named_once(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(atomic.StorageError) as error:
    workdir.check(tmp_path / "file/run", CONFIG)
  assert str(error.value) == f"workdir {tmp_path}/file/run: Not a directory"


def test_a_file_in_the_place_of_the_directory(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(atomic.StorageError, match="run"):
    with workdir.hold(tmp_path / "run", CONFIG):
      pass


@pytest.mark.parametrize("url", ["gs://team/run", "file:///tmp/run", "x+y://a"])
def test_a_url_is_no_directory(url):
  with pytest.raises(atomic.StorageError, match="config.publish.bucket"):
    workdir.check(url, CONFIG)


def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
  odd = os.fsdecode(os.fsencode(tmp_path) + b"/n\xe9")
  for path in (odd, f"{odd}/run"):
    with pytest.raises(atomic.StorageError, match="must be UTF-8"):
      workdir.check(path, CONFIG)
  workdir.check(tmp_path / "n\u00e9", CONFIG)
