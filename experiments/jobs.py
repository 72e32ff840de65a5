"""Runs commands side by side, each with its share of this machine's cores.

A command that runs alone is left all cores. Of several at a time each is kept
on cores of its own (`sched_setaffinity`, which XLA's thread pools go by), and
told so by the environment (`NPROC` for XLA, `OMP_NUM_THREADS` and the like for
others) where there is no such call. Cores are shared only where there are more
commands at a time than cores.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from experiments import cli
from mgrpo_jax import atomic
from mgrpo_jax.report.live import printable

_POLL = 0.2  # seconds between looks at what runs
# Seconds that a command has to end. It is told several times: Python drops what
# a signal raises while a callback of the garbage collector runs, as JAX's does.
_GRACES = (20.0, 20.0, 20.0)
_TAIL = 16_384  # bytes at the end of a log that are searched for its last line
_LONGEST = 300  # characters of that line
_THREADS = (
    "NPROC",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A command and the file that keeps what it prints."""

  name: str
  command: tuple[str, ...]
  log: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
  """A job that came to its end: its exit code, and what it took."""

  job: Job
  code: int
  seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
  """A job's process, in a session of its own."""

  job: Job
  process: subprocess.Popen[bytes]
  started: float


def run(
    jobs: Sequence[Job],
    *,
    parallel: int,
    environment: Mapping[str, str],
    watch: Callable[[Sequence[float]], None],
) -> Generator[Ended, None, None]:
  """Runs jobs, a few at a time.

  Close it (`contextlib.closing`) where it may not be read to the end: what
  runs then is told to end, and killed where it does not within a minute.

  Args:
    jobs: in the order in which they start.
    parallel: at a time, >= 1.
    environment: of the commands.
    watch: called several times a second with how long what runs has run,
      seconds.

  Yields:
    Each job when it has ended.

  Raises:
    StorageError: a log cannot be written.
    OSError: a command cannot be started.
  """
  waiting = collections.deque(jobs)
  running: dict[int, Running] = {}
  places = shares(_cores(), parallel)
  try:
    while waiting or running:
      for place, cores in enumerate(places):
        if place not in running and waiting:
          running[place] = start(waiting.popleft(), cores, environment)
      time.sleep(_POLL)
      now = time.monotonic()
      for place, one in list(running.items()):
        code = one.process.poll()
        if code is not None:
          del running[place]
          yield Ended(job=one.job, code=code, seconds=now - one.started)
      watch([now - one.started for one in running.values()])
  finally:
    stop([one.process for one in running.values()])


def shares(cores: Sequence[int], parallel: int) -> list[tuple[int, ...]]:
  """Divides the cores among jobs.

  Args:
    cores: that there are, at least one.
    parallel: jobs at a time, >= 1.

  Returns:
    The cores of each job; empty where it is alone and needs no limit.
  """
  if parallel == 1:
    return [()]
  n = len(cores)
  if parallel > n:
    return [(cores[i % n],) for i in range(parallel)]
  ends = [i * n // parallel for i in range(parallel + 1)]
  return [
      tuple(cores[first:end])
      for first, end in zip(ends[:-1], ends[1:], strict=True)
  ]


def last_line(log: pathlib.Path) -> str:
  """Reads the last line that is not empty.

  Args:
    log: a file of any size and content.

  Returns:
    The line without control characters, cut where it is long.
  """
  try:
    with open(log, "rb") as file:
      file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
      text = file.read().decode("utf-8", errors="replace")
  except OSError as error:
    return f"cannot read {log}: {atomic.reason(error)}"
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return printable(lines[-1][:_LONGEST]) if lines else "(nothing was printed)"


def _cores() -> list[int]:
  """The cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def start(
    job: Job,
    cores: tuple[int, ...],
    environment: Mapping[str, str],
    *,
    tied: str = "TERM",
) -> Running:
  """Starts a job; its log goes on where an earlier one ended.

  Args:
    job: the command.
    cores: that it is kept on; empty for all.
    environment: of the command.
    tied: signal that it gets when this process is killed.

  Returns:
    Its process. `stop` ends it.

  Raises:
    StorageError: its log cannot be written.
    OSError: it cannot be started.
  """
  limits = dict.fromkeys(_THREADS, str(len(cores))) if cores else {}
  with _log(job) as log:
    process = subprocess.Popen(
        [*_tied(tied), *job.command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**environment, **limits},
        start_new_session=True,  # Ctrl-C is for us, we tell it to end
    )
  if cores and hasattr(os, "sched_setaffinity"):
    with contextlib.suppress(ProcessLookupError):  # ended already
      os.sched_setaffinity(process.pid, cores)
  return Running(job=job, process=process, started=time.monotonic())


@contextlib.contextmanager
def _log(job: Job) -> Iterator[int]:
  """Opens the log of a job, a line about the command in it."""
  flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
  try:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(job.log, flags, 0o644)
  except OSError as error:
    raise atomic.StorageError(
        f"cannot write {job.log}: {atomic.reason(error)}"
    ) from error
  try:
    os.write(log, f"$ {shlex.join(job.command)}\n".encode())
    yield log
  finally:
    os.close(log)


def _tied(how: str) -> tuple[str, ...]:
  """A prefix that ends a command when this process is killed, where known."""
  if shutil.which("setpriv") is None:
    return ()
  return ("setpriv", "--pdeathsig", how, "--")


def telling(codes: Sequence[int | None]) -> int:
  """Finds the process of several that tells best why they end.

  Args:
    codes: with what each has ended, None of one that runs; some with an error.

  Returns:
    The number of the first that ended with 2, which trying again does not
    mend; else of the first that ended with an error.
  """
  failed = [number for number, code in enumerate(codes) if code]
  wrong = [number for number in failed if codes[number] == cli.USAGE_ERROR]
  return (wrong or failed)[0]


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
  """Tells processes to end, and kills those that do not within a minute.

  Args:
    processes: that `start` started; some may have ended.
  """
  try:
    for grace in _GRACES:
      for process in processes:
        _signal(process, signal.SIGTERM)
      end = time.monotonic() + grace
      for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(max(0.0, end - time.monotonic()))
  finally:  # a second Ctrl-C does not wait
    kill(processes)


def kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
  """Kills processes at once, and waits until they are gone.

  Args:
    processes: that `start` started; some may have ended.
  """
  for process in processes:
    _signal(process, signal.SIGKILL)
  for process in processes:
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
  """Signals a process and what it started, if it still runs."""
  if process.poll() is None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, number)
