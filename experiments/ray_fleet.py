"""Starts every job on a Ray cluster: an actor for each host, restarted by Ray.

An actor runs `experiments.train` as a process of its own on its node: on a new
start nothing of the old one is left. Where a process or its node dies, Ray
starts the actor again, elsewhere if it must, and the processes of its job begin
again together; other jobs wait. So run directories and the bucket must lie
where all nodes see them. TPU slices are reserved whole, one for each policy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import cli, fleet, jobs
from experiments.fleet import FleetError, Plan
from experiments.jobs import Job, Running

_RESTARTS = 3  # of each job
_LOOK = 1.0  # seconds between looks at them
_PLACING = 600.0  # seconds that Ray has to find places, at first or again
_ANSWER = 90.0  # seconds that an actor has to answer


class NewActorError(RuntimeError):
  """The actor was started again, and knows of no process."""


class Host:
  """One process of a job on its node; an actor."""

  def __init__(self, folder: str, environment: Mapping[str, str]) -> None:
    """Starts nothing yet.

    Args:
      folder: of this repository, the same on every node.
      environment: what the process is told beside its arguments.
    """
    os.chdir(folder)
    self._environment = {**os.environ, **environment}
    self._running: Running | None = None

  def meeting(self) -> tuple[str, int]:
    """This node's address, and a port that is free there just now."""
    import ray

    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as server:
      return address, server.getsockname()[1]

  def start(self, command: Sequence[str], log: str) -> None:
    """Starts the process; one that an earlier start left is ended.

    Args:
      command: to run.
      log: file that keeps what it prints.
    """
    self.stop(kill=True)  # another actor was lost before all had begun
    job = Job(name=log, command=tuple(command), log=pathlib.Path(log))
    self._running = jobs.start(job, (), self._environment, tied="KILL")

  def code(self) -> int | None:
    """The exit code; None while it runs.

    Raises:
      NewActorError: it was not started.
    """
    if self._running is None:
      raise NewActorError("the actor was started again")
    return self._running.process.poll()

  def stop(self, *, kill: bool) -> None:
    """Ends the process.

    Args:
      kill: at once; else it has a while to close its files.
    """
    if self._running is not None:
      (jobs.kill if kill else jobs.stop)([self._running.process])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
  """A TPU slice of each policy.

  Attributes:
    version: of the accelerator, `v6e`.
    topology: of the slice, `4x4`.
  """

  version: str
  topology: str


def parse_slice(text: str) -> Slice | None:
  """Reads `v6e:4x4`.

  Args:
    text: of the flag; empty for machines without TPUs.

  Returns:
    The slice; None for none.

  Raises:
    ValueError: it is none.
  """
  if not text:
    return None
  version, colon, topology = text.partition(":")
  if not colon or not all(one.isdecimal() for one in topology.split("x")):
    raise ValueError(f"--ray_tpu={text}: must be VERSION:TOPOLOGY, v6e:4x4")
  return Slice(version=version, topology=topology)


def run(
    plans: Sequence[Plan],
    *,
    hosts: int,
    token: str,
    address: str,
    tpu: Slice | None,
) -> None:
  """Runs jobs on a cluster to their end.

  Args:
    plans: of the jobs, the root's first.
    hosts: processes of each job, >= 1; of a TPU slice, its hosts.
    token: that jobs show each other.
    address: of the cluster; `local` starts one here.
    tpu: of each policy; None for a CPU a process.

  Raises:
    FleetError: a job died more often than it may, was used wrongly, cannot be
      started or does not end; or there is no room for it, or no cluster.
  """
  import ray

  try:
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
  except ConnectionError as error:
    raise FleetError(
        f"--ray_address={address}: {error}", code=cli.USAGE_ERROR
    ) from error
  with contextlib.ExitStack() as stack:
    stack.callback(ray.shutdown)
    groups = []
    for plan in plans:
      placed = stack.enter_context(_reserved(hosts, tpu, plan.policy))
      groups.append(_Group(plan, hosts, token, placed, tpu))
    stack.callback(_stop, groups, kill=False)
    for group in groups:
      group.start()
    fleet.attend(groups, every=_LOOK)


@contextlib.contextmanager
def _reserved(hosts: int, tpu: Slice | None, policy: str) -> Iterator[Any]:
  """Places for the processes of a job: nodes of one slice, or any."""
  import ray

  cli.tell(
      f"job of {policy!r}: waits for its {hosts} places on the Ray cluster,"
      f" {_PLACING:g} s at most"
  )
  end = time.monotonic() + _PLACING
  group: Any
  if tpu is not None:
    whole = _slice(tpu, policy)
    group, release = whole.slice_placement_group, whole.shutdown
  else:
    group = ray.util.placement_group(
        [{"CPU": 1}] * hosts, strategy="SPREAD", name=policy
    )

    def release() -> None:
      ray.util.remove_placement_group(group)

  try:
    if tpu is not None and whole.num_hosts != hosts:
      raise FleetError(
          f"--hosts={hosts}: a slice of {tpu.version}:{tpu.topology} has"
          f" {whole.num_hosts}",
          code=cli.USAGE_ERROR,
      )
    if not group.wait(max(1.0, end - time.monotonic())):
      raise FleetError(
          f"the cluster has no room for the {hosts} processes of {policy!r}"
          f" within {_PLACING:g} s"
      )
    yield group
  finally:
    release()


def _slice(tpu: Slice, policy: str) -> Any:
  """Asks for a slice, and waits until Ray has found the head of one."""
  from ray.util.tpu import SlicePlacementGroup

  try:
    return SlicePlacementGroup(
        topology=tpu.topology,
        accelerator_version=tpu.version,
        head_reservation_timeout_s=_PLACING,
    )
  except ValueError as error:
    raise FleetError(
        f"--ray_tpu={tpu.version}:{tpu.topology}: {error}",
        code=cli.USAGE_ERROR,
    ) from error
  except (RuntimeError, TimeoutError) as error:
    raise FleetError(
        f"the cluster has no slice for {policy!r}: {cli.last_line(error)}"
    ) from error


class _Group:
  """The processes of one job.

  Attributes:
    policy: whose job it is.
  """

  def __init__(
      self,
      plan: Plan,
      hosts: int,
      token: str,
      placed: Any,
      tpu: Slice | None,
  ) -> None:
    """Has Ray make the actors; starts nothing on them."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    self.policy = plan.policy
    self._over = False
    self._plan = plan
    self._left = _RESTARTS
    chips = placed.bundle_specs[0].get("TPU", 0)
    actor = ray.remote(Host)
    environment = fleet.environment(plan, token, virtual=tpu is None)
    self._hosts: list[Any] = [
        actor.options(
            num_cpus=0 if tpu else 1,
            resources={"TPU": chips} if chips else {},
            max_restarts=_RESTARTS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=placed, placement_group_bundle_index=number
            ),
        ).remote(os.getcwd(), environment)
        for number in range(hosts)
    ]

  def start(self) -> None:
    """Starts all processes; waits for actors that Ray is starting again."""
    from ray import exceptions

    end, told = time.monotonic() + _PLACING, False
    while True:
      try:
        self._begin()
        return
      except _lost() as error:
        said = cli.last_line(error)
        if getattr(error, "actor_init_failed", False):
          raise self._refused(said) from error
        if time.monotonic() > end:
          raise FleetError(
              f"Ray does not bring back the job of {self.policy!r}: {said}"
          ) from error
        if not told:
          cli.tell(
              f"job of {self.policy!r}: waits for Ray to bring its processes'"
              f" places back, {_PLACING:g} s at most: {said}"
          )
        told = True
        time.sleep(_LOOK)
      except exceptions.RayTaskError as error:  # it would fail again
        raise self._refused(cli.last_line(error)) from error

  def is_over(self) -> bool:
    """Whether all have ended well."""
    return self._over

  def look(self) -> None:
    """Starts all of them again where one has died."""
    if self._over:
      return
    try:
      codes = self._codes()
      end = time.monotonic() + fleet.SETTLING
      while any(codes) and None in codes and time.monotonic() < end:
        time.sleep(_LOOK)
        codes = self._codes()
    except _lost() as error:
      self._again(type(error).__name__)
      return
    self._over = all(code == 0 for code in codes)
    if any(codes):
      code = codes[jobs.telling(codes)]
      if code == cli.USAGE_ERROR:
        raise FleetError(
            f"job of {self.policy!r} ended with code {code};"
            f" see {self._plan.log}*.log",
            code=code,
        )
      self._again(f"code {code}")

  def _codes(self) -> list[int | None]:
    """With what each process has ended."""
    return _get([host.code.remote() for host in self._hosts])

  def stopping(self, *, kill: bool) -> list[Any]:
    """Tells all processes to end; gives what is there when they have."""
    return [host.stop.remote(kill=kill) for host in self._hosts]

  def _refused(self, why: str) -> FleetError:
    """A node does not start what it is to."""
    return FleetError(f"job of {self.policy!r} cannot be started: {why}")

  def _again(self, why: str) -> None:
    """Starts the job again, if it may."""
    said = jobs.last_line(self._plan.log_of(0, len(self._hosts)))
    what = f"job of {self.policy!r}: {why}: {said}"
    if not self._left:
      raise FleetError(f"{what}; see {self._plan.log}*.log")
    self._left -= 1
    cli.tell(f"{what}; starting it again")
    _stop([self], kill=True)
    self.start()

  def _begin(self) -> None:
    """Starts a process on every actor."""
    ((address, port),) = _get([self._hosts[0].meeting.remote()])
    nodes = _get([host.meeting.remote() for host in self._hosts])
    _get(
        [
            host.start.remote(
                [
                    *fleet.command(
                        self._plan,
                        meeting=f"{address}:{port}",
                        hosts=len(self._hosts),
                        process=number,
                    ),
                    f"--listen={node}",
                ],
                str(self._plan.log_of(number, len(self._hosts))),
            )
            for number, (host, (node, _)) in enumerate(
                zip(self._hosts, nodes, strict=True)
            )
        ]
    )


def _get(references: Sequence[Any]) -> Any:
  """What actors answer."""
  import ray

  return ray.get(list(references), timeout=_ANSWER)


def _stop(groups: Sequence[_Group], *, kill: bool) -> None:
  """Ends the processes on all actors that are there, at the same time."""
  import ray
  from ray import exceptions

  with contextlib.suppress(exceptions.RayError):
    asked = [one for group in groups for one in group.stopping(kill=kill)]
    ray.wait(asked, num_returns=len(asked), timeout=_ANSWER)


def _lost() -> tuple[type[Exception], ...]:
  """What Ray raises where an actor is not there, or is another one by now."""
  from ray import exceptions

  return (
      exceptions.RayActorError,
      exceptions.GetTimeoutError,
      NewActorError,
  )
