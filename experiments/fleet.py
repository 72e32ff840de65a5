"""Starts the processes of jobs on this machine, and again if one dies.

WORKDIR                  the run directory of the root's policy's job
WORKDIR/jobs/NAME        that of any other policy's
WORKDIR/jobs/NAME.log    what a policy's job printed, or of several processes
WORKDIR/jobs/NAME.N.log  what process N did

The processes of a job end and begin together: `jax.distributed` knows no other
way. Jobs outlive each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import ml_collections

from experiments import cli, jobs, joining
from experiments.jobs import Job, Running
from mgrpo_jax import atomic
from mgrpo_jax.workdir import LOCK_FILE

_SILENCE = 900  # seconds borne of a process that lives: this machine is busy
_RESTARTS = 3  # of each job
LOOK = 0.5  # seconds between looks at them
_LEFT = 90.0  # seconds in which those that an earlier command left end
SETTLING = 10.0  # seconds in which one process of a job ends after another
_GRACE = 120.0  # seconds in which they end after the first has
_DEVICES = "--xla_force_host_platform_device_count"


class FleetError(RuntimeError):
  """A job cannot go on; says which, and what it said last.

  Attributes:
    code: to end with: 2 where the same command would end so again.
  """

  def __init__(self, text: str, *, code: int = cli.BROKEN) -> None:
    """Takes what happened.

    Args:
      text: one line.
      code: to end with.
    """
    super().__init__(text)
    self.code = code


class CutOffError(FleetError):
  """The root's job is over, but another did not come to its end; says which."""


@contextlib.contextmanager
def failures() -> Iterator[None]:
  """Turns a FleetError raised inside into one line and its exit code.

  Yields:
    Nothing.
  """
  try:
    yield
  except FleetError as error:
    cli.fail(str(error), error.code)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """How a job is started.

  Attributes:
    policy: of the job.
    arguments: of every process of it.
    directory: of the run, this job's own.
    log: of its processes, but for the suffix.
    devices: virtual ones of each process, where there are no others.
  """

  policy: str
  arguments: tuple[str, ...]
  directory: pathlib.Path
  log: pathlib.Path
  devices: int

  def log_of(self, process: int, hosts: int) -> pathlib.Path:
    """What a process prints into."""
    number = f".{process}" if hosts > 1 else ""
    return self.log.with_name(f"{self.log.name}{number}.log")


def plans(
    config: ml_collections.ConfigDict,
    policies: Sequence[str],
    *,
    hosts: int,
    workdir: pathlib.Path,
    arguments: Sequence[str],
) -> list[Plan]:
  """Plans the jobs of a run on this machine.

  Args:
    config: the whole recipe, checked, with the bucket.
    policies: of the jobs, the root's first.
    hosts: processes of each job, >= 1.
    workdir: of the run.
    arguments: that give the recipe, `--config=…`.

  Returns:
    A plan for each policy.

  Raises:
    ValueError: a policy's mesh cannot be shared by so many processes.
  """
  made = []
  for policy in policies:
    size = math.prod(config.policies[policy].mesh.values())
    if size % hosts:
      raise ValueError(
          f"config.policies.{policy}.mesh: takes {size} devices, allowed: a"
          f" multiple of --hosts={hosts}"
      )
    own = workdir if policy == policies[0] else workdir / "jobs" / policy
    made.append(
        Plan(
            policy=policy,
            arguments=(
                *arguments,
                f"--workdir={own}",
                f"--bucket={config.publish.bucket}",
                f"--policy={policy}",
            ),
            directory=own,
            log=workdir / "jobs" / policy,
            devices=size // hosts,
        )
    )
  return made


def command(
    plan: Plan, *, meeting: str, hosts: int, process: int
) -> tuple[str, ...]:
  """What starts a process of a job.

  Args:
    plan: of the job.
    meeting: host:port where its processes meet.
    hosts: processes of the job, >= 1.
    process: number of this one.

  Returns:
    The command.
  """
  alone = (sys.executable, "-m", "experiments.train", *plan.arguments)
  if hosts == 1:
    return alone
  return (
      *alone,
      f"--coordinator={meeting}",
      f"--processes={hosts}",
      f"--process={process}",
      f"--silence={_SILENCE}",
  )


def environment(plan: Plan, token: str, *, virtual: bool) -> dict[str, str]:
  """What a process of a job is told beside its arguments.

  Args:
    plan: of the job.
    token: that jobs show each other.
    virtual: whether its devices are to be virtual ones, of a CPU.

  Returns:
    Variables by name.
  """
  told = {joining.TOKEN: token}
  if virtual:
    flags = os.environ.get("XLA_FLAGS", "")
    told["XLA_FLAGS"] = f"{flags} {_DEVICES}={plan.devices}".strip()
  return told


def run(plans: Sequence[Plan], *, hosts: int, token: str) -> None:
  """Runs jobs to their end, and prints what the first one's first prints.

  Args:
    plans: of the jobs, the root's first.
    hosts: processes of each job, >= 1.
    token: that jobs show each other; handed on in their environment.

  Raises:
    FleetError: a job died more often than it may, or was used wrongly.
    OSError: a process cannot be started.
    StorageError: one that an earlier command started still runs.
  """
  groups = [
      Group(plan, hosts=hosts, token=token, tell=cli.tell) for plan in plans
  ]
  follow = _Follower(plans[0].log_of(0, hosts))
  try:
    for group in groups:
      group.wait_until_free()
    for group in groups:
      group.start()
    attend(groups, every=LOOK, show=follow.show)
  finally:
    with contextlib.suppress(OSError):
      follow.show()
    jobs.stop([one.process for group in groups for one in group.running])


class Attended(Protocol):
  """A job that is looked after."""

  policy: str

  def is_over(self) -> bool:
    """Whether all of its processes have ended well."""

  def look(self) -> None:
    """Starts it again where it has died; raises FleetError if it may not."""


def attend(
    groups: Sequence[Attended],
    *,
    every: float,
    show: Callable[[], None] = lambda: None,
    ended: bool = False,
) -> None:
  """Looks after jobs until all have ended.

  Args:
    groups: the jobs, the root's first.
    every: seconds between looks.
    show: called before each look.
    ended: whether the root's job has, which then is none of them.

  Raises:
    CutOffError: a job has not ended a while after the root's.
    FleetError: a job cannot go on.
    OSError: a job cannot be started again.
  """
  end = time.monotonic() + _GRACE if ended else math.inf
  while late := [group.policy for group in groups if not group.is_over()]:
    if time.monotonic() > end:
      raise CutOffError(
          f"jobs of {', '.join(late)} do not end with the root's: {_GRACE:g} s"
          " after it they still run; the same command goes on with them"
      )
    time.sleep(every)
    show()
    for group in groups:
      group.look()
    if groups[0].is_over():
      end = min(end, time.monotonic() + _GRACE)


class Group:
  """The processes of one job.

  Attributes:
    policy: whose job it is.
    running: what was started last.
  """

  def __init__(
      self, plan: Plan, *, hosts: int, token: str, tell: Callable[[str], None]
  ) -> None:
    """Starts none yet.

    Args:
      plan: of the job.
      hosts: its processes, >= 1; one alone has the devices that there are.
      token: that jobs show each other; handed on in their environment.
      tell: takes a line about a job that is started again, or waited for.
    """
    self.policy = plan.policy
    self.running: list[Running] = []
    self._plan = plan
    self._hosts = hosts
    self._tell = tell
    self._left = _RESTARTS
    own = environment(plan, token, virtual=hosts > 1)
    self._environment = {**os.environ, **own}

  def wait_until_free(self) -> None:
    """Waits for a job that an earlier command left to end; none is doubled.

    Raises:
      StorageError: it does not.
    """
    end, told = time.monotonic() + _LEFT, False
    while self._plan.directory.is_dir():
      try:
        with atomic.exclusive(self._plan.directory / LOCK_FILE):
          return
      except atomic.StorageError as error:
        if time.monotonic() > end:
          raise
        if not told:
          self._tell(f"{error}: waits {_LEFT:.0f} s for it to end")
        told = True
      time.sleep(LOOK)

  def start(self) -> None:
    """Starts all of them.

    Raises:
      OSError: one cannot be started, or its log not be written.
    """
    meeting = f"127.0.0.1:{_free_port()}"
    for process in range(self._hosts):
      job = Job(
          name=f"{self.policy}.{process}" if self._hosts > 1 else self.policy,
          command=command(
              self._plan, meeting=meeting, hosts=self._hosts, process=process
          ),
          log=self._plan.log_of(process, self._hosts),
      )
      self.running.append(jobs.start(job, (), self._environment))

  def is_over(self) -> bool:
    """Whether all have ended well."""
    return bool(self.running) and all(
        one.process.poll() == 0 for one in self.running
    )

  def look(self) -> None:
    """Starts all of them again where one has died.

    Raises:
      FleetError: it died too often, or was used wrongly.
      OSError: it cannot be started again.
    """
    if not any(one.process.poll() for one in self.running):
      return
    end = time.monotonic() + SETTLING
    while time.monotonic() < end and any(
        one.process.poll() is None for one in self.running
    ):
      time.sleep(LOOK)
    one = self.running[
        jobs.telling([one.process.poll() for one in self.running])
    ]
    code = one.process.returncode
    said = jobs.last_line(one.job.log)
    what = f"job of policy {one.job.name} ended with code {code}: {said}"
    if code == cli.USAGE_ERROR or not self._left:
      wrong = code == cli.USAGE_ERROR
      raise FleetError(
          f"{what}; see {one.job.log}", code=code if wrong else cli.BROKEN
      )
    self._tell(f"{what}; it is started again")
    self._left -= 1
    jobs.kill([one.process for one in self.running])  # it is of no use
    self.running = []
    self.start()


class _Follower:
  """Prints what is new in a log."""

  def __init__(self, log: pathlib.Path) -> None:
    """Starts at what is there by now."""
    self._log = log
    self._seen = log.stat().st_size if log.exists() else 0

  def show(self) -> None:
    """Prints what has come since the last time."""
    if not self._log.exists():
      return
    with open(self._log, "rb") as file:
      file.seek(self._seen)
      new = file.read()
    self._seen += len(new)
    if new:
      sys.stdout.write(new.decode("utf-8", errors="replace"))
      sys.stdout.flush()


def _free_port() -> int:
  """A port of the loopback address that nobody listens at just now."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]
