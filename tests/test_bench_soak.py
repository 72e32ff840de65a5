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

from experiments.bench import soak, soak_checks, soak_jobs
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


def test_a_run_that_kept_no_calls_is_no_measure(tmp_path):
  alone = run_directory(tmp_path / "alone", [0, 1])
  records.step_path(alone / "rollouts", 0).unlink()
  assert compared(alone, alone) == ["alone, main kept calls of 0 steps only"]


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


@pytest.fixture
def like():
  return {"main": killed.tree(0)}


def publish_version(bucket, value, *, number=0):
  publish.publish(bucket, "main", number, killed.tree(value), keep=9, meta={})


def read_once(reader):
  limit, before = time.monotonic() + 60, reader.counts.total()
  with reader.reading():
    while reader.counts.total() == before and time.monotonic() < limit:
      time.sleep(0.05)
  reader._over.clear()


def test_the_reader_remembers_what_a_version_was(tmp_path, like):
  alone = store.open_folder(tmp_path / "alone")
  publish_version(alone, 1)
  expected = soak_checks.versions(alone, like)
  assert list(expected) == [("main", 0)]
  bucket = store.open_folder(tmp_path / "bucket")
  reader = soak_checks.Reader(bucket.url, like)
  read_once(reader)
  assert reader.wrong(expected) == ["no version was read among faults"]
  publish_version(bucket, 1)
  read_once(reader)
  assert reader.wrong(expected) == []
  assert reader.counts == {"nothing there yet": 1, "whole": 1}
  publish_version(bucket, 2)  # one version, read in two ways
  read_once(reader)
  assert reader.wrong(expected) == ["version 0 of main was read in 2 ways"]
  reader = soak_checks.Reader(bucket.url, like)
  read_once(reader)  # in one way, which is not that of the run left alone
  assert reader.wrong(expected) == ["version 0 of main was read as another one"]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
def test_a_reader_that_breaks_is_told(tmp_path, like):
  bucket = store.open_folder(tmp_path)
  reader = soak_checks.Reader(bucket.url, like)
  reader._read = lambda policy: 1 / 0
  with reader.reading():
    time.sleep(1.5)
  assert "the reader broke, see above" in reader.wrong({})


def test_the_reader_says_how_it_went(tmp_path, like):
  bucket = store.open_folder(tmp_path)
  reader = soak_checks.Reader(bucket.url, like)
  publish_version(bucket, 1)
  publish_version(bucket, 2, number=1)
  bucket.put("policies/main/v1/manifest.json", b"{}")
  read_once(reader)
  bucket.put("policies/main/v0/manifest.json", b"{}")
  read_once(reader)
  assert reader.counts == {"older": 1, "no good version": 1}


def test_the_last_version_must_be_there(tmp_path, like):
  bucket = store.open_folder(tmp_path)

  def missing():
    return soak_checks.unread(bucket, like, expected, steps=1)

  expected = {}
  assert "of main is None, and not the run's last, 1" in missing()[0]
  for number in (0, 1):
    publish_version(bucket, number, number=number)
  assert len(missing()) == 1  # there, but not that of the run left alone
  expected = soak_checks.versions(bucket, like)
  assert missing() == []
  bucket.put("policies/main/v1/manifest.json", b"{}")
  assert "of main is 0, and" in missing()[0]


def test_enough_is_enough_of_every_kind():
  done = collections.Counter({"kill": 2, "stop": 1})
  assert soak._rare(["kill", "stop", "flip"], done, 2) == ("stop", "flip")
  assert soak._rare(["kill", "stop"], done, 1) == ()


class Dummy(soak_jobs.Jobs):
  """Jobs that sleep; every one takes its policy's job at once."""

  def __init__(self, folder, *, patience=60.0):
    options = argparse.Namespace(workdir=folder, patience=patience, steps=3)
    self.started = collections.Counter()
    super().__init__(
        options,
        "s3://nowhere",
        random.Random(0),
        lambda policy: f"{self.started[policy]}",
    )

  def _start(self, policy, folder, log):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    self.started[policy] += 1
    folder.mkdir(exist_ok=True)
    log.write_text("")
    return process

  def do(self, kind):
    """Does one thing to the first job."""
    self.all[1].done = True
    self.trouble({kind: 1})


@pytest.fixture
def jobs(tmp_path):
  if not hasattr(resource, "prlimit"):
    pytest.skip("no prlimit here")
  jobs = Dummy(tmp_path)
  jobs.look()
  yield jobs
  jobs.close()
  for _, process in [*jobs._spares, *[(j, j.process) for j in jobs.all]]:
    process.wait(30)


def state(process):
  """The letter of a process in /proc, without the zombie's shell."""
  with open(f"/proc/{process.pid}/stat") as file:
    return file.read().rpartition(")")[2].split()[0]


def becomes(process, letters):
  """Whether a process comes to be in one of these states."""
  limit = time.monotonic() + 30
  while state(process) not in letters and time.monotonic() < limit:
    time.sleep(0.01)
  return state(process) in letters


def undo(jobs):
  """Lets what was done be over now."""
  jobs._undo[:] = [(0.0, act) for _, act in jobs._undo]
  jobs.look()
  assert not jobs._undo


def test_jobs_are_killed_stopped_starved_and_started_again(jobs):
  first = jobs.all[0].process
  for kind in ("stop", "long stop"):
    jobs.do(kind)
    assert becomes(first, "T")
    undo(jobs)
    assert becomes(first, "SR")
  jobs.do("full disk")
  soft, hard = resource.prlimit(first.pid, resource.RLIMIT_FSIZE)
  assert soft == soak_jobs._GROWTH
  undo(jobs)
  assert resource.prlimit(first.pid, resource.RLIMIT_FSIZE) == (hard, hard)
  jobs.do("kill")
  assert first.wait(30) == -signal.SIGKILL
  jobs.look()
  second = jobs.all[0].process
  assert second is not first and second.poll() is None
  assert jobs.ends == collections.Counter({"code -9": 1})
  kinds = ("stop", "long stop", "full disk", "kill")
  assert {kind: jobs.counts[kind] for kind in kinds} == dict.fromkeys(kinds, 1)
  assert jobs.problems == []


@pytest.mark.parametrize("kind", ["second directory", "same directory"])
def test_jobs_are_started_twice(jobs, kind):
  jobs.do(kind)
  ((_, second),) = jobs._spares
  assert second.poll() is None and jobs.pending
  undo(jobs)
  assert second.returncode == -signal.SIGKILL
  assert jobs.ends == {f"{kind} code -9": 1} and jobs.problems == []


@pytest.mark.parametrize("code", [2, 0, None])
def test_jobs_are_taken_over_from_a_copy(jobs, monkeypatch, code):
  monkeypatch.setattr(soak_jobs, "HEARTBEAT", 0.0)
  monkeypatch.setattr(soak_jobs, "_LEAVES", 0.5)
  (jobs.all[0].folder / "kept").write_text("steps")
  first = jobs.all[0].process
  jobs.do("stop")  # what else was done to it does not wake it early
  jobs.do("taken over")
  undo(jobs)
  second = jobs.all[0]
  assert second.process is not first and second.process.poll() is None
  assert (second.folder / "kept").read_text() == "steps"
  assert becomes(first, "T")
  jobs.look()
  assert becomes(first, "SR")
  if code is not None:  # as if it had found out; None: it goes on and on
    first.kill()
    first.wait()
    first.returncode = code
  time.sleep(0.6)
  jobs.look()
  assert not jobs.pending
  assert len(jobs.problems) == (code != 2)
  assert jobs.counts["taken over"] == 1


def test_what_has_not_taken_the_job_is_not_taken_over(jobs):
  jobs.all[0].before = jobs._incarnation("main")
  first = jobs.all[0].process
  jobs.do("taken over")
  assert jobs.all[0].process is first and becomes(first, "SR")
  assert not jobs.pending and not jobs.counts["taken over"]


def test_the_second_does_not_come_first(jobs):
  jobs.started.clear()
  jobs._incarnation = lambda policy: ""
  jobs.do("second directory")
  assert not jobs._spares and not jobs.counts["second directory"]


def test_what_may_have_a_rival_is_not_taken_over(jobs):
  first = jobs.all[0].process
  jobs.do("same directory")
  jobs.do("taken over")
  assert jobs.all[0].process is first and not jobs.counts["taken over"]


@pytest.mark.parametrize(("code", "problems"), [(75, 0), (1, 1), (2, 1)])
def test_jobs_end_as_they_may(jobs, code, problems):
  first = jobs.all[0].process
  jobs.do("kill")
  first.wait(30)
  first.returncode = code
  jobs.look()
  assert len(jobs.problems) == problems


def test_jobs_are_killed_once_when_they_have_made_their_last_step(jobs):
  first = jobs.all[0].process
  for step in (1, 2):
    assert not jobs.pending
    path = records.step_path(jobs.all[0].folder / "rollouts", step)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    jobs.look()
  undo(jobs)
  assert first.wait(30) == -signal.SIGKILL
  jobs.look()
  assert jobs.all[0].process.poll() is None and not jobs.pending
  assert jobs.counts["kill at the end"] == 1


def test_the_words_of_an_end_are_those_of_others_like_it(tmp_path):
  log = tmp_path / "log"
  log.write_text("error: version 12 is at vm:/tmp/soak/main_3, not\n\n")
  assert soak_jobs._said(log, 2) == "code 2: error: version N is at main_N, not"
  assert soak_jobs._said(log, -9) == "code -9"
