"""The soak does what it says to jobs, and its checks can fail."""

import argparse
import collections
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import killed
import pytest
from trajectories import group, task, trajectory

from experiments.bench import soak, soak_checks
from mgrpo_jax import publish, store
from mgrpo_jax.report import records
from mgrpo_jax.report.writer import MetricsWriter

SLEEPS = "import time; print('up', flush=True); time.sleep(600)"


def run_directory(path, rollouts):
  """What a run of one step leaves."""
  calls = [trajectory(rollout=k) for k in rollouts]
  records.write_step(
      path / "rollouts",
      0,
      [group(task(), calls, num_rollouts=len(calls))],
      rewards=[[{"total": 1.0}] * len(calls)],
      advantages=[[0.5] * len(calls)],
      pieces=lambda role, tokens: ["x"] * len(tokens),
      stage="easy",
  )
  metrics = MetricsWriter(path, last_step=-1)
  metrics.write(0, "easy", {"seconds/step": 1.0})
  metrics.close()
  (path / "policies/main").mkdir(parents=True)
  (path / "policies/main/model.safetensors").write_bytes(b"weights")
  return path


def compared(alone, job):
  return soak_checks.wrong(alone, {"main": job}, steps=1)


def test_checks_see_what_is_lost_doubled_or_other(tmp_path):
  alone = run_directory(tmp_path / "alone", [0, 1])
  same = run_directory(tmp_path / "same", [0, 1])
  assert compared(alone, same) == []
  fewer = run_directory(tmp_path / "fewer", [0])
  assert compared(alone, fewer) == ["1 trajectories of main are lost"]
  assert compared(fewer, alone) == ["1 of main are doubled or others"]
  doubled = run_directory(tmp_path / "doubled", [0, 1])
  shutil.copy(
      records.step_path(doubled / "rollouts", 0),
      records.step_path(doubled / "rollouts", 1),
  )
  (line,) = compared(alone, doubled)
  assert line == "2 of main are doubled or others"
  (same / "policies/main/model.safetensors").write_bytes(b"others")
  (same / "metrics.jsonl").write_text("")
  assert compared(alone, same) == [
      "parameters of main differ",
      "steps of main: []",
  ]


def test_the_reader_remembers_what_a_version_was(tmp_path):
  bucket = store.open_folder(tmp_path)
  reader = soak_checks.Reader(bucket.url, {"main": killed.tree(0)})
  for number in (1, 2):  # one version, read in two ways
    publish.publish(bucket, "main", 0, killed.tree(number), keep=1, meta={})
    limit, before = time.monotonic() + 60, reader.reads
    with reader.reading():
      while reader.reads == before and time.monotonic() < limit:
        time.sleep(0.05)
    reader._over.clear()
    assert len(reader.torn()) == number - 1
  assert reader.torn() == ["version 0 of main was read in 2 ways"]


class Dummy(soak.Jobs):
  """Jobs that sleep."""

  def _start(self, policy, folder):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    return process


def state(process):
  """The letter of a process in /proc, without the zombie's shell."""
  with open(f"/proc/{process.pid}/stat") as file:
    return file.read().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no prlimit here")
def test_jobs_are_killed_stopped_starved_and_started_again(
    tmp_path, monkeypatch
):
  options = argparse.Namespace(workdir=tmp_path, patience=60.0)
  jobs = Dummy(options, "s3://nowhere", random.Random(0))
  try:
    jobs.look()
    first = jobs.all[0].process
    jobs.all[1].done = True  # the faults are the other's
    monkeypatch.setattr(soak, "_KINDS", {"stop": 1})
    jobs.trouble()
    limit = time.monotonic() + 30
    while state(first) != "T" and time.monotonic() < limit:
      time.sleep(0.01)
    assert state(first) == "T"
    undo(jobs)
    monkeypatch.setattr(soak, "_KINDS", {"full disk": 1})
    jobs.trouble()
    soft, hard = resource.prlimit(first.pid, resource.RLIMIT_FSIZE)
    assert soft == soak._GROWTH
    undo(jobs)
    assert resource.prlimit(first.pid, resource.RLIMIT_FSIZE) == (hard, hard)
    monkeypatch.setattr(soak, "_KINDS", {"kill": 1})
    jobs.trouble()
    assert first.wait(30) == -signal.SIGKILL
    jobs.look()
    second = jobs.all[0].process
    assert second is not first and second.poll() is None
    assert jobs.ends == collections.Counter({"code -9": 1})
    assert jobs.counts == {"stop": 1, "full disk": 1, "kill": 1}
  finally:
    jobs.close()
    for job in jobs.all:
      if job.process:
        job.process.wait(30)


def undo(jobs):
  """Lets what was done be over now."""
  jobs._undo[:] = [(0.0, act) for _, act in jobs._undo]
  jobs.look()
  assert not jobs.pending
