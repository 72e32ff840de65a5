"""Two real processes publish one policy, each its own chunks."""

import json
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import two_writers

from mgrpo_jax import publish, sharding, store
from mgrpo_jax.policy.params import param_specs
from mgrpo_jax.testing.setup import small_setup

DEADLINE = 900  # seconds; a start takes 10 to 30 where nothing else runs
NAME = two_writers.POLICY


def run(root, mode):
  """Both processes, to their ends."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    meeting = f"127.0.0.1:{server.getsockname()[1]}"
  program = pathlib.Path(two_writers.__file__)
  url = (root / "bucket").as_uri()
  both = []
  for number in range(2):
    command = [sys.executable, program, url, meeting, str(number), mode]
    with open(root / f"{mode}.{number}.log", "w") as log:
      both.append(
          subprocess.Popen(
              command, stdout=subprocess.PIPE, stderr=log, text=True
          )
      )
  said = [one.communicate(timeout=DEADLINE)[0] for one in both]
  return both, said


def told(root, mode):
  """What both printed; they ended well."""
  both, said = run(root, mode)
  for number, one in enumerate(both):
    log = (root / f"{mode}.{number}.log").read_text()
    assert one.returncode == 0, log[-5000:]
  return [json.loads(one.splitlines()[-1]) for one in said]


def published(root):
  """What a process with one device reads, and what was to be published."""
  sizes = {NAME: {"num_heads": 2, "num_kv_heads": 2}}
  setup = small_setup(seed=0, imitation_steps=1, steps=3, sizes=sizes)
  policy = setup.policies[NAME]
  bucket = store.open_folder(root / "bucket")
  like = sharding.shapes(param_specs(policy.config), None)
  found = publish.read(bucket, NAME, "latest", like=like)
  assert found.version.number == two_writers.VERSION and not found.skipped
  trees = (found.params, policy.params)
  return [list(map(np.asarray, jax.tree.leaves(tree))) for tree in trees]


def test_each_writes_and_reads_its_half(tmp_path):
  said = told(tmp_path, "publish")
  found, expected = published(tmp_path)
  assert all(map(np.array_equal, found, expected))
  total = sum(one.nbytes for one in expected)
  assert sum(one["written"] for one in said) == total
  assert sum(one["written before"] for one in said) == total
  for one in said:
    assert 0.45 * total < one["written"] < 0.55 * total
    assert 0.45 * total < one["written before"] < 0.55 * total
    assert one["same"] and one["total"] == total
    assert 0.45 * total < one["read"] < 0.55 * total
    assert 0.45 * total < one["read before"] < 0.55 * total
  bucket = store.open_folder(tmp_path / "bucket")
  path = f"policies/{NAME}/v{two_writers.VERSION}"
  manifest = json.loads(bucket.get(f"{path}/manifest.json"))
  assert (manifest["format"], manifest["base"]["number"]) == (6, 0)


def test_what_process_1_cannot_write_is_told_by_process_0(tmp_path):
  first, _ = told(tmp_path, "full")
  line, latest, left = first["told"]
  assert line.startswith("process 1 of this job: cannot write file://")
  assert line.endswith(": File too large")
  assert not latest and not left
  found, expected = published(tmp_path)  # it was published again
  assert all(map(np.array_equal, found, expected))


def test_a_process_killed_while_it_writes_leaves_no_version(tmp_path):
  both, _ = run(tmp_path, "killed")
  assert both[1].returncode == -signal.SIGKILL
  assert both[0].returncode
  bucket = store.open_folder(tmp_path / "bucket")
  assert bucket.list(f"policies/{NAME}/v{two_writers.VERSION}")  # in parts
  assert publish.versions(bucket, NAME) == []
  assert publish.latest(bucket, NAME) is None
  told(tmp_path, "publish")  # started again
  found, expected = published(tmp_path)
  assert all(map(np.array_equal, found, expected))


def test_an_adapter_is_published_and_merged(tmp_path):
  told(tmp_path, "adapter")
  bucket = store.open_folder(tmp_path / "bucket")
  assert publish.latest(bucket, NAME).number == two_writers.VERSION
