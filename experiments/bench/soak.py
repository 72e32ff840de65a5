r"""Trains by real jobs among random faults, and compares with a run left alone.

    python -m experiments.bench.soak --workdir=DIR --faults=200 --seed=0 \
        [--steps=24] [--alone=DIR]

First the recipe runs in one process (or did, in --alone). Then each policy has
its job; their bucket is an emulator of S3 (moto) behind a proxy that spoils
requests (`mgrpo_jax.testing.faulty`). Besides, at moments drawn from a seed, a
job is killed, stopped (shorter than a heartbeat, longer, sometimes longer than
`jobs.patience`), its files may grow no more (RLIMIT_FSIZE: as on a full disk),
or somebody starts the job a second time from another run directory. Every start
gets a clock that is up to five minutes off (Python's `time.time`; libfaketime
makes sleeps hang). Jobs that end otherwise than with 0 are started again. A
reader reads the newest versions all the while.

When enough was injected everything is left alone until the run is over. The
command fails unless parameters are equal bit for bit, every trajectory is there
once, and no version was ever read in two ways.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import cli
from experiments.bench import soak_checks
from mgrpo_jax import atomic
from mgrpo_jax.policy.load import load
from mgrpo_jax.testing import faulty, object_servers

POLICIES = ("main", "researcher")
_WEIGHTS = pathlib.Path("configs/quickstart_weights")
_HEARTBEAT = 1.0  # jobs.heartbeat, seconds
_SKEWS = (-300.0, 0.0, 300.0)  # seconds that a job's clock is off
_CLOCK = """import os, time
_straight, _skew = time.time, float(os.environ.get("SOAK_SKEW", "0"))
time.time = lambda: _straight() + _skew
"""
_GROWTH = 4096  # bytes that a file may have on the disk that is full
_SECOND = 90.0  # seconds in which a second job from elsewhere is refused
_LIMIT = 3600.0  # seconds in which the run ends once it is left alone
# What is done to jobs, and how often of 20 times.
_KINDS = {"kill": 8, "stop": 5, "long stop": 1, "full disk": 4, "second": 2}


@dataclasses.dataclass
class Job:
  """One policy's job: its process, while there is one, and how it is run."""

  policy: str
  folder: pathlib.Path
  process: subprocess.Popen[bytes] | None = None
  done: bool = False


class Jobs:
  """Runs jobs, starts again what ends, and does things to them."""

  def __init__(
      self, options: argparse.Namespace, bucket: str, rng: random.Random
  ) -> None:
    """Starts nothing yet."""
    self.counts: collections.Counter[str] = collections.Counter()
    self.ends: collections.Counter[str] = collections.Counter()
    self._options = options
    self._root = options.workdir
    self._bucket = bucket
    self._rng = rng
    self._undo: list[tuple[float, Callable[[], None]]] = []
    self.all = [Job(policy, options.workdir / policy) for policy in POLICIES]

  @property
  def pending(self) -> bool:
    """Whether something is still to be undone."""
    return bool(self._undo)

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
    for job in self.all:
      if job.done or (job.process and job.process.poll() is None):
        continue
      if job.process:
        job.done = job.process.returncode == 0
        self.ends[_said(job.folder, job.process.returncode)] += 1
      if not job.done:
        job.process = self._start(job.policy, job.folder)

  def trouble(self) -> None:
    """Does something to a job that runs."""
    kinds = list(_KINDS)
    (kind,) = self._rng.choices(kinds, weights=list(_KINDS.values()))
    job = self._rng.choice([job for job in self.all if not job.done])
    process = job.process
    if process is None or process.poll() is not None:
      return
    if kind == "second":
      self._second(job)
    elif kind == "kill":
      process.kill()
    elif kind == "full disk":
      self._fill(process)
    else:
      low, high = (0.1, 5 * _HEARTBEAT)
      if kind == "long stop":
        low = self._options.patience
        high = 1.5 * low
      seconds = self._rng.uniform(low, high)
      process.send_signal(signal.SIGSTOP)
      self._later(seconds, lambda: process.send_signal(signal.SIGCONT))
    self.counts[kind] += 1

  def close(self) -> None:
    """Kills what still runs."""
    for job in self.all:
      if job.process and job.process.poll() is None:
        job.process.kill()
    for _, undo in self._undo:
      with contextlib.suppress(ProcessLookupError):
        undo()

  def _later(self, seconds: float, undo: Callable[[], None]) -> None:
    """Undoes something after a while."""
    self._undo.append((time.monotonic() + seconds, undo))

  def _fill(self, process: subprocess.Popen[bytes]) -> None:
    """Lets no file of a process grow for some seconds."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (_GROWTH, hard))

    def lift() -> None:
      with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))

    self._later(self._rng.uniform(1.0, 5.0), lift)

  def _second(self, job: Job) -> None:
    """Starts a job a second time, from another run directory."""
    number = self.counts["second"]
    folder = self._root / f"second_{number}_{job.policy}"
    process = self._start(job.policy, folder)

    def end() -> None:
      if process.poll() is None:
        process.kill()
        process.wait()
      self.ends[f"second {_said(folder, process.returncode)}"] += 1

    self._later(_SECOND, end)

  def _start(
      self, policy: str, folder: pathlib.Path
  ) -> subprocess.Popen[bytes]:
    """Starts a job, by a clock of its own."""
    skew = self._rng.choice(_SKEWS)
    self.counts[f"clock {skew:+.0f} s"] += skew != 0
    clock = self._root / "clock"
    atomic.write(clock / "sitecustomize.py", _CLOCK)
    search = f"{clock}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    extra = {"SOAK_SKEW": str(skew), "PYTHONPATH": search}
    arguments = (f"--policy={policy}", f"--bucket={self._bucket}")
    return _train(self._options, folder, arguments, extra)


def _train(
    options: argparse.Namespace,
    folder: pathlib.Path,
    arguments: Sequence[str],
    extra: Mapping[str, str],
) -> subprocess.Popen[bytes]:
  """Starts training; a thread copies what it prints to FOLDER.log."""
  process = subprocess.Popen(
      [
          sys.executable,
          "-m",
          "experiments.train",
          "--config=configs/decoupled_quickstart.py:smoke",
          f"--config.stages.easy.steps={options.steps // 2}",
          f"--config.stages.hard.steps={options.steps - options.steps // 2}",
          f"--config.evaluation.every={max(1, options.steps // 2)}",
          f"--config.jobs.heartbeat={_HEARTBEAT}",
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
  threading.Thread(target=_copy, args=(process, folder), daemon=True).start()
  return process


def _copy(process: subprocess.Popen[bytes], folder: pathlib.Path) -> None:
  """Keeps what a job prints."""
  assert process.stdout
  with open(f"{folder}.log", "ab", buffering=0) as log:
    for line in process.stdout:
      log.write(line)


def _said(folder: pathlib.Path, code: int) -> str:
  """How a job ended, in its own words where it had any."""
  if code <= 0:
    return f"code {code}"
  time.sleep(0.2)  # until the log has the last line
  lines = pathlib.Path(f"{folder}.log").read_text("utf-8", "replace")
  last = [line for line in lines.splitlines() if line.strip()][-1:]
  return f"code {code}: {''.join(last)[:200]}"


def soak(options: argparse.Namespace) -> dict[str, Any]:
  """Runs the recipe alone and among faults, and compares."""
  root = options.workdir
  alone = options.alone or root / "alone"
  if not options.alone and _train(options, alone, (), {}).wait():
    raise RuntimeError(f"the run alone failed, see {alone}.log")
  rng = random.Random(options.seed)
  faults = faulty.Faults(seed=options.seed, rate=0.0, seconds=2.0)
  began = time.monotonic()
  with (
      object_servers.s3() as server,
      faulty.between(server, faults) as proxy,
  ):
    url = f"s3://{object_servers.BUCKET}/run?endpoint={proxy}"
    like = {name: load(_WEIGHTS / name).params for name in POLICIES}
    jobs, reader = Jobs(options, url, rng), soak_checks.Reader(url, like)
    with contextlib.closing(jobs), reader.reading():
      jobs.look()
      faults.rate = options.rate
      _disturb(jobs, faults, rng, options)
      faults.rate = 0.0
      enough = not jobs.over
      end = time.monotonic() + _LIMIT
      while not jobs.over:
        jobs.look()
        time.sleep(0.2)
        if time.monotonic() > end:
          raise RuntimeError(f"the jobs do not come to their end, see {root}")
      while jobs.pending:  # second jobs, refused meanwhile
        jobs.look()
        time.sleep(0.2)
  folders = {job.policy: job.folder for job in jobs.all}
  problems = reader.torn() + soak_checks.wrong(
      alone, folders, steps=options.steps
  )
  if not enough:
    problems.append("the run was over before enough faults: give more --steps")
  return {
      "seconds": round(time.monotonic() - began, 1),
      "requests": faults.requests,
      "injected": dict(faults.injected) | dict(jobs.counts),
      "ends": dict(jobs.ends),
      "reads": {
          "whole": reader.reads,
          "failed": reader.failed,
          "versions": len(reader.seen),
      },
      "problems": problems,
  }


def _disturb(
    jobs: Jobs,
    faults: faulty.Faults,
    rng: random.Random,
    options: argparse.Namespace,
) -> None:
  """Injects faults until there were enough, or the run is over."""
  due = time.monotonic() + rng.expovariate(1 / options.pause)
  while not jobs.over:
    jobs.look()
    if time.monotonic() > due and not jobs.over:
      jobs.trouble()
      due = time.monotonic() + rng.expovariate(1 / options.pause)
    if faults.injected.total() + jobs.counts.total() >= options.faults:
      return
    time.sleep(0.1)


def main() -> None:
  """Prints the tables and writes them."""
  options = _options()
  if options.workdir.exists():
    cli.fail(f"--workdir={options.workdir}: exists")
  options.workdir.mkdir(parents=True)
  found = soak(options)
  total = sum(found["injected"].values())
  cli.say(
      f"{total} faults, {found['requests']} requests, {found['seconds']} s,"
      f" seed {options.seed}"
  )
  for title in ("injected", "ends", "reads"):
    cli.say(f"\n| {title} | times |\n|---|---|")
    for what, times in sorted(found[title].items()):
      cli.say(f"| {what} | {times} |")
  if options.out:
    atomic.write_json(options.out, found)
  for problem in found["problems"]:
    cli.say(f"WRONG: {problem}")
  if found["problems"]:
    sys.exit(1)
  cli.say("\nparameters equal bit for bit, every trajectory once, none torn")


def _path(text: str) -> pathlib.Path:
  """An absolute path."""
  return pathlib.Path(text).absolute()


def _options() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=_path, required=True, help="new")
  parser.add_argument("--faults", type=int, default=200, help="at least")
  parser.add_argument("--seed", type=int, default=0, help="of all draws")
  parser.add_argument(
      "--steps", type=int, default=24, help="of training, half in each stage"
  )
  parser.add_argument(
      "--rate", type=float, default=0.02, help="of requests that are spoilt"
  )
  parser.add_argument(
      "--pause", type=float, default=20.0, help="seconds between job faults"
  )
  parser.add_argument(
      "--patience",
      type=float,
      default=60.0,
      help="jobs.patience: more seconds than a job takes to start",
  )
  parser.add_argument(
      "--alone", type=_path, help="run directory of the recipe left alone"
  )
  parser.add_argument("--out", type=_path, help="JSON file for the counts")
  return parser.parse_args()


if __name__ == "__main__":
  main()
