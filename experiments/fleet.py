"""Starts every process of every job on this machine, and again if one dies.

WORKDIR                 the run directory of the root's policy's job
WORKDIR/jobs/NAME       that of any other policy's
WORKDIR/jobs/NAME.N.log what process N of a policy's job printed

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
from collections.abc import Sequence

import ml_collections

from experiments import cli, jobs, joining
from experiments.jobs import Job, Running

_SILENCE = 900  # seconds borne of a process that lives: this machine is busy
_RESTARTS = 3  # of each job
_LOOK = 0.5  # seconds between looks at them
_SETTLING = 10.0  # seconds in which one process of a job ends after another
_GRACE = 120.0  # seconds in which they end after the first has
_DEVICES = "--xla_force_host_platform_device_count"


class FleetError(RuntimeError):
  """A job cannot go on; says which, and what it said last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """How a job is started.

  Attributes:
    policy: of the job.
    arguments: of every process of it.
    log: of process N, `{log}.N.log`.
    devices: virtual ones of each process, where there are no others.
  """

  policy: str
  arguments: tuple[str, ...]
  log: pathlib.Path
  devices: int


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
  return (
      sys.executable,
      "-m",
      "experiments.train",
      *plan.arguments,
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
  """
  groups = [_Group(plan, hosts, token) for plan in plans]
  follow = _Follower(pathlib.Path(f"{plans[0].log}.0.log"))
  try:
    for group in groups:
      group.start()
    end = math.inf
    while not all(group.is_over() for group in groups):
      time.sleep(_LOOK)
      follow.show()
      for group in groups:
        group.look()
      if groups[0].is_over():
        end = min(end, time.monotonic() + _GRACE)
      if time.monotonic() > end:
        late = [group.policy for group in groups if not group.is_over()]
        raise FleetError(f"jobs of {', '.join(late)} do not end with the first")
  finally:
    with contextlib.suppress(OSError):
      follow.show()
    jobs.stop([one.process for group in groups for one in group.running])


class _Group:
  """The processes of one job."""

  def __init__(self, plan: Plan, hosts: int, token: str) -> None:
    """Starts none yet."""
    self.policy = plan.policy
    self.running: list[Running] = []
    self._plan = plan
    self._hosts = hosts
    self._left = _RESTARTS
    own = environment(plan, token, virtual=True)
    self._environment = {**os.environ, **own}

  def start(self) -> None:
    """Starts all of them."""
    meeting = f"127.0.0.1:{_free_port()}"
    for process in range(self._hosts):
      job = Job(
          name=f"{self.policy}.{process}",
          command=command(
              self._plan, meeting=meeting, hosts=self._hosts, process=process
          ),
          log=pathlib.Path(f"{self._plan.log}.{process}.log"),
      )
      self.running.append(jobs.start(job, (), self._environment))

  def is_over(self) -> bool:
    """Whether all have ended well."""
    return bool(self.running) and all(
        one.process.poll() == 0 for one in self.running
    )

  def look(self) -> None:
    """Starts all of them again where one has died."""
    if not any(one.process.poll() for one in self.running):
      return
    end = time.monotonic() + _SETTLING
    while time.monotonic() < end and any(
        one.process.poll() is None for one in self.running
    ):
      time.sleep(_LOOK)
    # Process 0, which comes first, knows best why they end.
    one = next(one for one in self.running if one.process.poll())
    code = one.process.returncode
    what = (
        f"{one.job.name} ended with code {code}: {jobs.last_line(one.job.log)}"
    )
    if code == cli.USAGE_ERROR or not self._left:
      raise FleetError(what)
    print(f"{what}; starting its job again", file=sys.stderr, flush=True)
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
