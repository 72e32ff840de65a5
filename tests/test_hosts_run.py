"""Two jobs of two processes each, one of which is killed: nothing changes."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mgrpo_jax import publish, sharding, store
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.params import param_specs
from mgrpo_jax.report.writer import read_metrics

PROGRAM = pathlib.Path(__file__).parent / "tiny_hosts.py"
JOBS = ("main", "researcher")
DEADLINE = 1800  # seconds; a start takes 10 to 30 where nothing else runs


class Team:
  """Processes by job and number; `all` is the run in one process."""

  def __init__(self, root):
    self.root = root
    self.running = {}

  def start(self, job, *, processes):
    with socket.create_server(("127.0.0.1", 0)) as server:
      meeting = f"127.0.0.1:{server.getsockname()[1]}"
    for number in range(processes):
      with open(self.root / f"{job}.{number}.log", "a") as log:
        self.running[job, number] = subprocess.Popen(
            [
                sys.executable,
                PROGRAM,
                str(self.root / job),
                (self.root / "bucket").as_uri(),
                job,
                meeting,
                str(processes),
                str(number),
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

  def wait_for(self, path):
    """Waits until a file is there."""
    limit = time.monotonic() + DEADLINE
    while not (self.root / path).exists():
      for name, process in self.running.items():
        assert process.poll() in (None, 0), self.log(*name)
      assert time.monotonic() < limit, f"no {path}"
      time.sleep(0.01)

  def kill(self, job):
    """As whoever launched it does, where one of its processes has died."""
    for name in [one for one in self.running if one[0] == job]:
      self.running[name].send_signal(signal.SIGKILL)
      self.running.pop(name).communicate()

  def finish(self):
    """What each process printed."""
    found = {}
    for name, process in self.running.items():
      out, _ = process.communicate(timeout=DEADLINE)
      assert process.returncode == 0, self.log(*name)
      found[name] = out.strip().splitlines()
    return found

  def log(self, job, number):
    return (self.root / f"{job}.{number}.log").read_text()[-5000:]

  def policy(self, name, job="all"):
    return load(self.root / job / "policies" / name)

  def weights(self, job, policy):
    found = self.policy(policy, job)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found.params)]


@pytest.fixture(scope="module")
def teams(tmp_path_factory):
  """A run in one process of four devices, and one in four processes."""
  whole = Team(tmp_path_factory.mktemp("whole"))
  whole.start("all", processes=1)
  spread = Team(tmp_path_factory.mktemp("spread"))
  for job in JOBS:
    spread.start(job, processes=2)
  # Between the leader's word and the follower's update.
  spread.wait_for("bucket/steps/2.json")
  spread.kill("researcher")
  spread.start("researcher", processes=2)
  said = spread.finish()
  return whole, spread, json.loads(whole.finish()["all", 0][-1]), said


@pytest.mark.parametrize("policy", JOBS)
def test_parameters_are_those_of_one_process_bit_for_bit(teams, policy):
  # The mesh's axes have two devices each, so the sums of all but the global
  # norm have two terms, in whatever order they come.
  whole, spread, _, _ = teams
  expected = whole.weights("all", policy)
  actual = spread.weights(policy, policy)
  assert all(map(np.array_equal, expected, actual))


def bucket(team):
  """The one of a team that shares a directory."""
  return store.open_folder(team.root / "bucket")


def chunks(bucket, policy, number):
  """How many a version has."""
  text = bucket.get(f"policies/{policy}/v{number}/manifest.json")
  arrays = json.loads(text)["arrays"].values()
  return sum(len(one["digests"]) for one in arrays)


@pytest.mark.parametrize("policy", JOBS)
def test_what_two_processes_published_is_what_one_did(teams, policy):
  whole, spread, _, _ = teams
  like = sharding.shapes(param_specs(whole.policy(policy).config), None)
  buckets = [bucket(one) for one in (whole, spread)]
  numbers = publish.versions(buckets[0], policy)
  assert numbers == publish.versions(buckets[1], policy)
  for number in numbers:
    expected, actual = (
        jax.tree.leaves(publish.read(one, policy, number, like=like).params)
        for one in buckets
    )
    assert all(map(np.array_equal, expected, actual))
  one, several = (chunks(one, policy, numbers[-1]) for one in buckets)
  assert several > 2 * one  # each shard is one


def test_the_leader_ends_with_the_summary_of_one_process(teams):
  _, _, expected, said = teams
  summary = json.loads(said["main", 0][-1])
  for name in ("seed", "steps", "eval"):
    assert summary[name] == expected[name]
  assert summary["tokens"]["trained"] == expected["tokens"]["trained"]


@pytest.mark.parametrize("job", JOBS)
def test_losses_are_those_of_one_process(teams, job):
  whole, spread, _, _ = teams
  expected, actual = (
      [row[f"loss/{job}"] for row in read_metrics(root / "metrics.jsonl")]
      for root in (whole.root / "all", spread.root / job)
  )
  assert len(actual) > 3
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_only_process_0_says_what_came_out(teams):
  _, _, _, said = teams
  assert all(any(line.startswith("{") for line in said[j, 0]) for j in JOBS)
  assert not any(line.startswith("{") for j in JOBS for line in said[j, 1])
