"""Jobs as real processes: killed at chosen moments, nothing lost or doubled."""

import collections
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mgrpo_jax.policy.load import load
from mgrpo_jax.report import records
from mgrpo_jax.report.writer import read_metrics

PROGRAM = pathlib.Path(__file__).parent / "tiny_job.py"
SEED, STEPS = 3, 7
TOTAL = STEPS + 2  # two steps of imitation come first
JOBS = ("main", "researcher")
DEADLINE = 900  # seconds; a start takes 5 to 20, many more where all is busy


class Team:
  """The jobs of a run, by policy; `all` is the run in one process."""

  def __init__(self, root, *, url="", steps=STEPS):
    self.root = root
    self.steps = steps
    self.bucket = root / "bucket"
    self.url = url or self.bucket.as_uri()
    self.running = {}
    self.second = None
    self.said = collections.defaultdict(str)

  def start(self, *jobs):
    for job in jobs:
      self.running[job] = self.process(job, job)

  def process(self, job, folder):
    """A policy's job in a run directory."""
    with open(self.root / f"{folder}.log", "a") as log:
      return subprocess.Popen(
          [
              sys.executable,
              PROGRAM,
              str(self.root / folder),
              self.url,
              job,
              str(SEED),
              str(self.steps),
          ],
          stdout=subprocess.PIPE,
          stderr=log,
          text=True,
      )

  def wait_for(self, path):
    """Waits until a file is there, and something in it."""
    limit = time.monotonic() + DEADLINE
    path = self.root / path
    while not path.exists() or not path.stat().st_size:
      for job, process in self.running.items():
        assert process.poll() in (None, 0), self.log(job)
      assert time.monotonic() < limit, f"no {path}"
      time.sleep(0.005)

  def kill(self, *jobs):
    for job in jobs:
      self.running[job].send_signal(signal.SIGKILL)
    for job in jobs:
      self.running.pop(job).communicate()

  def stop(self, job, *, seconds):
    self.running[job].send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    self.running[job].send_signal(signal.SIGCONT)

  def finish(self):
    """The summaries."""
    found = {}
    for job, process in self.running.items():
      out, _ = process.communicate(timeout=DEADLINE)
      assert process.returncode == 0, self.log(job)
      found[job] = json.loads(out)
    return found

  def log(self, job):
    return (self.root / f"{job}.log").read_text()

  def weights(self, job, policy):
    found = load(self.root / job / "policies" / policy)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found.params)]

  def trained_tasks(self, job):
    """Step -> ids of the tasks it was trained on."""
    found = {}
    for step, path in records.list_steps(self.root / job / "rollouts").items():
      read = records.read_step(path)
      assert not read.problems
      found[step] = [group["task"]["id"] for group in read.groups]
    return found


@pytest.fixture(scope="module")
def teams(tmp_path_factory):
  """A run in one process, and one whose jobs were killed again and again."""
  whole = Team(tmp_path_factory.mktemp("whole"))
  whole.start("all")
  outcome = whole.finish()["all"]
  broken = Team(tmp_path_factory.mktemp("broken"))
  broken.start(*JOBS)
  # While it answers calls of a step: some are kept, others under way.
  broken.wait_for("researcher/calls/step_000002.jsonl")
  broken.kill("researcher")
  broken.start("researcher")
  # Somebody begins the leader's job anew, elsewhere.
  broken.second = broken.process("main", "elsewhere")
  # Between the leader's word and the follower's update.
  broken.wait_for("bucket/steps/4.json")
  broken.kill("researcher")
  broken.start("researcher")
  # The leader in the middle of its rollouts.
  broken.wait_for("researcher/calls/step_000005.jsonl")
  broken.kill("main")
  broken.start("main")
  # Stopped and let go on: nothing is asked twice of who is only slow.
  broken.wait_for("researcher/calls/step_000006.jsonl")
  broken.stop("researcher", seconds=2.0)
  # The leader right after its word, before its update and checkpoint.
  broken.wait_for("bucket/steps/6.json")
  broken.kill("main")
  broken.start("main")
  # All at once.
  broken.wait_for("bucket/steps/7.json")
  broken.kill(*JOBS)
  broken.start(*JOBS)
  return whole, broken, outcome, broken.finish()


@pytest.mark.parametrize("policy", JOBS)
def test_parameters_are_those_of_one_process_bit_for_bit(teams, policy):
  whole, broken, _, _ = teams
  expected = whole.weights("all", policy)
  actual = broken.weights(policy, policy)
  assert all(map(np.array_equal, expected, actual))


def test_the_leader_ends_with_the_summary_of_one_process(teams):
  _, _, expected, summaries = teams
  for name in ("seed", "steps", "eval"):
    assert summaries["main"][name] == expected[name]
    assert summaries["researcher"][name] == expected[name]
  trained = expected["tokens"]["trained"]
  assert summaries["main"]["tokens"]["trained"] == trained
  assert 0 < summaries["researcher"]["tokens"]["trained"] < trained


@pytest.mark.parametrize("job", JOBS)
def test_every_task_and_step_is_there_once(teams, job):
  whole, broken, _, _ = teams
  assert broken.trained_tasks(job) == whole.trained_tasks("all")
  rows = read_metrics(broken.root / job / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(TOTAL))


def test_metrics_of_a_job_are_those_of_one_process(teams):
  whole, broken, _, _ = teams
  expected = read_metrics(whole.root / "all" / "metrics.jsonl")
  for job in JOBS:
    rows = read_metrics(broken.root / job / "metrics.jsonl")
    for name in ("loss", "reward", "calls", "sampled", "turns", "expert"):
      key = f"{name}/{job}"
      assert [r.get(key) for r in rows] == [r.get(key) for r in expected]
  leader = read_metrics(broken.root / "main" / "metrics.jsonl")
  for key in ("reward/researcher", "turns/researcher", "calls/researcher"):
    assert [r.get(key) for r in leader] == [r.get(key) for r in expected]


def test_no_token_of_a_policy_is_on_anothers_disk(teams):
  _, broken, _, _ = teams
  for job in JOBS:
    for path in records.list_steps(broken.root / job / "rollouts").values():
      for group in records.read_step(path).groups:
        for call in group["trajectories"]:
          own = call["role"] == job or "imitate" == group["stage"]
          assert bool(call["tokens"]) == own


def test_who_waits_says_for_whom(teams):
  _, broken, _, _ = teams
  assert "job of policy 'researcher' was started again" in broken.log("main")
  assert "job of policy 'main' was started again" in broken.log("researcher")


def test_a_second_run_directory_is_refused_and_changes_nothing(teams):
  _, broken, _, _ = teams
  broken.second.communicate(timeout=DEADLINE)
  assert broken.second.returncode != 0
  assert "ClaimedError" in broken.log("elsewhere")
  assert str(broken.root / "main") in broken.log("elsewhere")


def test_what_crosses_besides_text_is_below_a_kibibyte(teams):
  _, broken, _, _ = teams
  rows = read_metrics(broken.root / "main" / "metrics.jsonl")
  found = [r["crossed_besides"] for r in rows if "crossed_besides" in r]
  assert found and 0 < min(found) <= max(found) <= 1024


def test_the_token_is_not_in_the_bucket(teams):
  _, broken, _, _ = teams
  for path in broken.bucket.rglob("*"):
    if path.is_file():
      assert b"0123456789abcdef" not in path.read_bytes()
