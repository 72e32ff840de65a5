"""Starts the other jobs of a team on this machine, and again if they die.

WORKDIR            the run directory of the root's policy's job, this process
WORKDIR/jobs/NAME  that of any other policy's, and NAME.log beside it
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from experiments import cli, jobs
from experiments.jobs import Job, Running
from experiments.joining import TOKEN
from mgrpo_jax import atomic
from mgrpo_jax.workdir import LOCK_FILE

_RESTARTS = 3  # of each job
_LOOK = 0.5  # seconds between looks at them
_GRACE = 120.0  # seconds in which they end after the leader has
_LEFT = 90.0  # seconds in which those that an earlier command left end


class CutOffError(RuntimeError):
  """The run is over, but a job did not come to its end; says which."""


def recipe_arguments(arguments: Sequence[str]) -> list[str]:
  """Picks the arguments that give the recipe.

  Args:
    arguments: of this process.

  Returns:
    `--config`, `--config.key` and their values.
  """
  found: list[str] = []
  takes_value = False
  for one in arguments:
    name, equals, _ = one.partition("=")
    is_recipe = name.lstrip("-").partition(".")[0] == "config"
    if takes_value or (one.startswith("-") and is_recipe):
      found.append(one)
      takes_value = not takes_value and not equals
  return found


@contextlib.contextmanager
def others(
    policies: Sequence[str],
    *,
    workdir: pathlib.Path,
    bucket: str,
    token: str,
    arguments: Sequence[str],
    tell: Callable[[str], None],
) -> Iterator[None]:
  """Runs the other jobs of a team while it is entered.

  A job that dies is started again, a few times; then this process is told to
  end as by SIGTERM.

  Args:
    policies: of the jobs.
    workdir: of the run.
    bucket: URL that all jobs share.
    token: that they show each other; handed on in their environment.
    arguments: that give the recipe, `--config=…`.
    tell: takes a line.

  Yields:
    Nothing.

  Raises:
    CutOffError: a job did not end well after the leader has.
    OSError: a job cannot be started.
    StorageError: one that an earlier command started still runs.
  """
  folder = workdir / "jobs"
  commands = [
      Job(
          name=policy,
          command=(
              sys.executable,
              "-m",
              "experiments.train",
              *arguments,
              f"--workdir={folder / policy}",
              f"--bucket={bucket}",
              f"--policy={policy}",
          ),
          log=folder / f"{policy}.log",
      )
      for policy in policies
  ]
  for policy in policies:
    _wait_until_free(folder / policy, tell)
  keeper = _Keeper(commands, {**os.environ, TOKEN: token}, tell)
  try:
    yield
    keeper.finish()
  finally:
    keeper.close()


def _wait_until_free(
    directory: pathlib.Path, tell: Callable[[str], None]
) -> None:
  """Waits for a job that an earlier command left to end; none is doubled."""
  end, told = time.monotonic() + _LEFT, False
  while directory.is_dir():
    try:
      with atomic.exclusive(directory / LOCK_FILE):
        return
    except atomic.StorageError as error:
      if time.monotonic() > end:
        raise
      if not told:
        tell(f"{error}: waits {_LEFT:.0f} s for it to end")
      told = True
    time.sleep(_LOOK)


class _Keeper:
  """Keeps jobs running, from a thread."""

  def __init__(
      self,
      commands: Sequence[Job],
      environment: Mapping[str, str],
      tell: Callable[[str], None],
  ) -> None:
    """Starts all of them."""
    self._tell = tell
    self._environment = environment
    self._left = dict.fromkeys((job.name for job in commands), _RESTARTS)
    self._over = threading.Event()
    self._running: list[Running] = []
    try:
      for job in commands:
        self._running.append(jobs.start(job, (), self._environment))
    except BaseException:
      jobs.stop([one.process for one in self._running])
      raise
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def finish(self) -> None:
    """Waits for the jobs to end by themselves, the run being over.

    Raises:
      CutOffError: one does not, or not well.
    """
    end = time.monotonic() + _GRACE
    while left := [r.job.name for r in self._running if r.process.poll() != 0]:
      if time.monotonic() > end:
        raise CutOffError(
            f"jobs of {', '.join(left)}: not at their end {_GRACE:.0f} s after"
            " the leader's; the same command goes on with them"
        )
      time.sleep(_LOOK)

  def close(self) -> None:
    """Ends what still runs."""
    self._over.set()
    self._thread.join()
    jobs.stop([one.process for one in self._running])

  def _watch(self) -> None:
    """Starts again what died."""
    while not self._over.wait(_LOOK):
      for place, one in enumerate(self._running):
        if one.process.poll():
          if not self._again(place, one):
            return

  def _again(self, place: int, died: Running) -> bool:
    """Starts a job again; where it may not, tells this process to end."""
    job, code = died.job, died.process.returncode
    said = jobs.last_line(job.log)
    self._tell(f"job of policy {job.name!r} ended with code {code}: {said}")
    if code == cli.USAGE_ERROR or not self._left[job.name]:
      os.kill(os.getpid(), signal.SIGTERM)
      return False
    self._left[job.name] -= 1
    try:
      self._running[place] = jobs.start(job, (), self._environment)
    except (OSError, subprocess.SubprocessError) as error:
      self._tell(f"job of policy {job.name!r} cannot be started: {error}")
      os.kill(os.getpid(), signal.SIGTERM)
      return False
    return True
