"""The jobs of a soak, and what is done to them; see `soak`."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from mgrpo_jax import atomic
from mgrpo_jax.report import records

POLICIES = ("main", "researcher")
HEARTBEAT = 1.0  # jobs.heartbeat, seconds
# What is done to jobs, and how often of 20 times.
KINDS = {
    "kill": 6,
    "stop": 5,
    "long stop": 1,
    "full disk": 4,
    "second directory": 1,
    "same directory": 1,
    "taken over": 2,
}
_CLOCK = """import os, time
_straight, _skew = time.time, float(os.environ.get("SOAK_SKEW", "0"))
time.time = lambda: _straight() + _skew
"""
_SKEWS = (-300.0, 0.0, 300.0)  # seconds that a job's clock is off
_GROWTH = 4096  # bytes that a file may have on the disk that is full
_LONG = 3600.0  # seconds that no stop takes
_FULL = 2.0, 20.0  # seconds that it is full
_LEAVES = 90.0  # seconds in which a job that was taken over ends
_END = 4.0  # seconds, at most, from a job's last step until it is killed
_AGAIN = (0, -signal.SIGKILL, 75)  # how jobs may end: done, killed, in trouble
_REFUSED = {  # how those may that find another one in their place
    "second directory": (2, -signal.SIGKILL, 75),
    "same directory": (0, -signal.SIGKILL, 75),  # 0: had the lock meanwhile
    "taken over": (2,),
}


@dataclasses.dataclass
class Job:
  """One policy's job: its process, while there is one, and how it is run.

  Attributes:
    policy: whose job it is.
    folder: its run directory.
    process: that runs.
    before: the incarnation that had the job when the process was started.
    done: whether it has come to its end.
    killed: whether that was done to it after its last step.
  """

  policy: str
  folder: pathlib.Path
  process: subprocess.Popen[bytes] | None = None
  before: str = ""
  done: bool = False
  killed: bool = False


@dataclasses.dataclass
class Old:
  """A process whose job goes on elsewhere, from a copy of its directory.

  Attributes:
    policy: whose job it was.
    process: that is stopped, or was.
    incarnation: of it.
    log: of what it prints.
    wakes: when it goes on, by `time.monotonic`; None until it is known.
    awake: whether it went on.
  """

  policy: str
  process: subprocess.Popen[bytes]
  incarnation: str
  log: pathlib.Path
  wakes: float | None = None
  awake: bool = False


class Jobs:
  """Runs jobs, starts again what ends, and does things to them.

  Attributes:
    counts: what was done, how often.
    ends: how processes ended, how often.
    problems: ends that must not be, a line each.
    all: the jobs.
  """

  def __init__(
      self,
      options: argparse.Namespace,
      bucket: str,
      rng: random.Random,
      incarnation: Callable[[str], str],
  ) -> None:
    """Starts nothing yet.

    Args:
      options: of the command line.
      bucket: URL, as jobs are to reach it.
      rng: of all draws.
      incarnation: tells which process has a policy's job; empty for none.
    """
    self.counts: collections.Counter[str] = collections.Counter()
    self.ends: collections.Counter[str] = collections.Counter()
    self.problems: list[str] = []
    self._options = options
    self._root = options.workdir
    self._bucket = bucket
    self._rng = rng
    self._incarnation = incarnation
    self._undo: list[tuple[float, Callable[[], None]]] = []
    self._old: list[Old] = []
    self._spares: list[tuple[str, subprocess.Popen[bytes]]] = []
    self.all = [Job(policy, options.workdir / policy) for policy in POLICIES]

  @property
  def pending(self) -> bool:
    """Whether something is still to be undone."""
    return bool(self._undo or self._old)

  @property
  def over(self) -> bool:
    """Whether every job has come to its end."""
    return all(job.done for job in self.all)

  def look(self) -> None:
    """Undoes what is over, and starts again what ended."""
    now = time.monotonic()
    for when, undo in [one for one in self._undo if one[0] <= now]:
      self._undo.remove((when, undo))
      undo()
    for old in list(self._old):
      self._watch(old)
    for job in self.all:
      if job.done:
        continue
      if job.process and job.process.poll() is None:
        self._end(job, job.process)
        continue
      if job.process:
        job.done = job.process.returncode == 0
        self._ended("", job.process, _log(job.folder), _AGAIN)
      if not job.done:
        job.before = self._incarnation(job.policy)
        job.process = self._start(job.policy, job.folder, _log(job.folder))

  def trouble(self, kinds: Mapping[str, int]) -> None:
    """Does something to a job that runs, where that can be done to it now.

    Args:
      kinds: what may be done, and how often in comparison.
    """
    (kind,) = self._rng.choices(list(kinds), weights=list(kinds.values()))
    job = self._rng.choice([job for job in self.all if not job.done])
    process = job.process
    if process is None or process.poll() is not None:
      return
    does = {
        "kill": lambda: process.kill(),
        "stop": lambda: self._halt(process, 0.1, 5 * HEARTBEAT),
        "long stop": lambda: self._halt(
            process, self._options.patience, 1.5 * self._options.patience
        ),
        "full disk": lambda: self._fill(process),
        "second directory": lambda: self._second(
            kind, job, self._root / f"second_{self.counts[kind]}_{job.policy}"
        ),
        "same directory": lambda: self._second(kind, job, job.folder),
        "taken over": lambda: self._take_over(kind, job, process),
    }
    if does[kind]() is not False:
      self.counts[kind] += 1

  def close(self) -> None:
    """Kills what still runs."""
    running = [job.process for job in self.all if job.process]
    running += [old.process for old in self._old]
    running += [process for _, process in self._spares]
    for process in running:
      process.kill()

  def _end(self, job: Job, process: subprocess.Popen[bytes]) -> None:
    """Kills a job once after its last step, while it winds up."""
    last = records.step_path(job.folder / "rollouts", self._options.steps - 1)
    if not job.killed and last.exists():
      job.killed = True
      self._later(self._rng.uniform(0.0, _END), process.kill)
      self.counts["kill at the end"] += 1

  def _later(self, seconds: float, undo: Callable[[], None]) -> None:
    """Undoes something after a while."""
    self._undo.append((time.monotonic() + seconds, undo))

  def _ended(
      self,
      what: str,
      process: subprocess.Popen[bytes],
      log: pathlib.Path,
      allowed: Sequence[int],
  ) -> None:
    """Counts how a process ended."""
    said = f"{what} {_said(log, process.returncode)}".strip()
    self.ends[said] += 1
    if process.returncode not in allowed:
      self.problems.append(f"{log}: ended with {said}")

  def _halt(
      self, process: subprocess.Popen[bytes], low: float, high: float
  ) -> None:
    """Stops a process for some seconds."""

    def go_on() -> None:
      if process not in [old.process for old in self._old]:
        process.send_signal(signal.SIGCONT)

    process.send_signal(signal.SIGSTOP)
    self._later(self._rng.uniform(low, high), go_on)

  def _fill(self, process: subprocess.Popen[bytes]) -> None:
    """Lets no file of a process grow for some seconds."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (_GROWTH, hard))

    def lift() -> None:
      with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))

    self._later(self._rng.uniform(*_FULL), lift)

  def _second(self, kind: str, job: Job, folder: pathlib.Path) -> bool:
    """Starts a job a second time, for less than `jobs.patience`."""
    if not self._incarnation(job.policy):
      return False  # the second might come first
    log = self._root / f"second_{self.counts.total()}_{job.policy}.log"
    process = self._start(job.policy, folder, log)
    self._spares.append((job.policy, process))

    def end() -> None:
      if process.poll() is None:
        process.kill()
        process.wait()
      self._ended(kind, process, log, _REFUSED[kind])

    self._later(self._options.patience, end)
    return True

  def _take_over(
      self, kind: str, job: Job, process: subprocess.Popen[bytes]
  ) -> bool:
    """Goes on from a copy of the directory of a process that is stopped.

    The process goes on as well, as soon as the copy's has taken the job: then
    there are two, and the first must find out before it writes anything.
    """
    if any(
        policy == job.policy and spare.poll() is None
        for policy, spare in self._spares
    ):
      return False  # it may be that one which has the job
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    incarnation = self._incarnation(job.policy)
    if incarnation == job.before or process.poll() is not None:
      process.send_signal(signal.SIGCONT)  # it does not have the job yet
      return False
    folder = self._root / f"copy_{self.counts[kind]}_{job.policy}"
    shutil.copytree(job.folder, folder)
    self._old.append(Old(job.policy, process, incarnation, _log(job.folder)))
    job.folder, job.before = folder, incarnation
    job.process = self._start(job.policy, folder, _log(folder))
    return True

  def _watch(self, old: Old) -> None:
    """Lets a process go on when its job has been taken over; sees it end."""
    if old.wakes is None:
      if self._incarnation(old.policy) != old.incarnation:
        old.wakes = time.monotonic() + self._rng.uniform(0.0, 5 * HEARTBEAT)
      return
    late = time.monotonic() - old.wakes
    if late >= 0 and not old.awake:
      old.process.send_signal(signal.SIGCONT)
      old.awake = True
    if old.process.poll() is None:
      if late < _LEAVES:
        return
      old.process.kill()
      old.process.wait()
    self._old.remove(old)
    self._ended("taken over", old.process, old.log, _REFUSED["taken over"])

  def _start(
      self, policy: str, folder: pathlib.Path, log: pathlib.Path
  ) -> subprocess.Popen[bytes]:
    """Starts a job, by a clock of its own."""
    skew = self._rng.choice(_SKEWS)
    self.counts[f"clock {skew:+.0f} s"] += skew != 0
    clock = self._root / "clock"
    atomic.write(clock / "sitecustomize.py", _CLOCK)
    search = f"{clock}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    extra = {"SOAK_SKEW": str(skew), "PYTHONPATH": search}
    arguments = (f"--policy={policy}", f"--bucket={self._bucket}")
    return train(self._options, folder, arguments, extra, log)


def train(
    options: argparse.Namespace,
    folder: pathlib.Path,
    arguments: Sequence[str],
    extra: Mapping[str, str],
    log: pathlib.Path,
) -> subprocess.Popen[bytes]:
  """Starts training; a thread copies what it prints to a log.

  Args:
    options: of the command line.
    folder: run directory.
    arguments: besides the recipe's.
    extra: of the environment.
    log: file that is appended to.

  Returns:
    The process.
  """
  process = subprocess.Popen(
      [
          sys.executable,
          "-m",
          "experiments.train",
          "--config=configs/decoupled_quickstart.py:smoke",
          f"--config.stages.easy.steps={options.steps // 2}",
          f"--config.stages.hard.steps={options.steps - options.steps // 2}",
          f"--config.evaluation.every={max(1, options.steps // 2)}",
          # What a job that is stopped must not miss: it would end otherwise.
          f"--config.rollout.turn_deadline={_LONG}",
          f"--config.tools.deadline={_LONG}",
          f"--config.jobs.heartbeat={HEARTBEAT}",
          f"--config.jobs.patience={options.patience}",
          f"--workdir={folder}",
          *arguments,
      ],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,  # a file's growth may be forbidden
      stderr=subprocess.STDOUT,
      env={
          **os.environ,
          "JAX_COMPILATION_CACHE_DIR": str(
              options.workdir.parent / "soak_cache"
          ),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
          **extra,
      },
  )
  threading.Thread(target=_copy, args=(process, log), daemon=True).start()
  return process


def _log(folder: pathlib.Path) -> pathlib.Path:
  """Where is kept what the jobs of a run directory print."""
  return folder.with_name(f"{folder.name}.log")


def _copy(process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
  """Keeps what a job prints."""
  assert process.stdout
  with open(log, "ab", buffering=0) as file:
    for line in process.stdout:
      file.write(line)


def _said(log: pathlib.Path, code: int) -> str:
  """How a job ended, in its own words where it had any."""
  if code <= 0:
    return f"code {code}"
  time.sleep(0.2)  # until the log has the last line
  lines = log.read_text("utf-8", "replace").splitlines()
  last = [line for line in lines if line.strip()][-1:]
  plain = re.sub(r"\d+", "N", re.sub(r"\S*/", "", "".join(last)))
  return f"code {code}: {plain[:200]}"
