"""What the jobs of a team have in common: `run.Run` with others' help."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mgrpo_jax.agents.team import Team
from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.credit import Credits
from mgrpo_jax.decoupled import wire
from mgrpo_jax.decoupled.board import Board
from mgrpo_jax.decoupled.desk import Desk
from mgrpo_jax.decoupled.members import Heart
from mgrpo_jax.decoupled.peer import Peer
from mgrpo_jax.decoupled.remote import Traffic
from mgrpo_jax.decoupled.spool import Spool
from mgrpo_jax.hosts.channel import Channel
from mgrpo_jax.learner import Step
from mgrpo_jax.resources import Resources
from mgrpo_jax.rewards import Scores
from mgrpo_jax.run import Run
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.types import RolloutGroup, TrainState, Trajectory
from mgrpo_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What a process needs to know to be a policy's job.

  Attributes:
    policy: that it samples and trains.
    workdir: of this job alone.
    where: socket, listening, at which other jobs call.
    address: http://host:port, as they reach it.
    token: that jobs show each other; empty for none.
    patience: seconds without a sign of life that are borne of another job.
    heartbeat: seconds between this one's.
    tell: takes a line about a wait.
    channel: to the job's other processes; None where this is all of it.
  """

  policy: str
  workdir: Workdir
  where: socket.socket
  address: str
  token: str = dataclasses.field(repr=False)
  patience: float
  heartbeat: float
  tell: Callable[[str], None]
  channel: Channel | None = None


class Part(Run):
  """What leader and followers have in common."""

  def __init__(
      self,
      resources: Resources,
      *,
      job: Job,
      peers: Mapping[str, Peer],
      heart: Heart,
      traffic: Traffic,
  ) -> None:
    """Starts with no step done."""
    super().__init__(resources)
    setup = resources.setup
    tasks = {t.id: t for part in setup.tasks.values() for t in part}
    self.done = 0  # steps that were trained on
    self.opened = 0  # steps that the team of the calls under way has done
    self._step = 0
    # Rewards of the steps rolled out and not graded, in their order.
    self._told: collections.deque[list[Scores]] = collections.deque()
    self._tasks = tasks
    self._peers = peers
    self._heart = heart
    self._traffic = traffic
    self._checkpoints = job.workdir.checkpoints
    self._board = Board(
        resources.store,
        rollouts_per_task=setup.rollouts_per_task,
        told=job.workdir.path / "spool",
        sure=heart.sure,
    )
    self._spool = Spool(
        job.workdir.path / "spool",
        tasks=tasks,
        environments=lambda step: resources.training_of(setup.team_at(step)),
    )
    self.desk = Desk(
        job.workdir.path / "calls",
        environments=lambda done: {
            "training": resources.training_of(setup.team_at(done)),
            "testing": resources.testing_of(setup.team_after(done)),
        },
        tasks=tasks,
        stages=setup.stages,
        method=setup.method,
    )

  def _scored(
      self, stage: Stage, groups: Sequence[RolloutGroup]
  ) -> list[Scores]:
    """Rewards as the leader told them."""
    if stage.objective == "imitate":
      return super()._scored(stage, groups)
    return self._told.popleft()

  def assign(
      self,
      stage: Stage,
      groups: Sequence[RolloutGroup],
      scores: Sequence[Scores],
      step: int,
  ) -> Credits:
    """Arrows 4 and 5."""
    self._step = step
    return super().assign(stage, groups, scores, step)

  def update(
      self,
      stage: Stage,
      number: int,
      groups: Sequence[RolloutGroup],
      credits: Credits,
  ) -> dict[str, Step]:
    """Arrow 6, and the step's numbers for the others."""
    dispatched = super().update(stage, number, groups, credits)
    for role in self.setup.team_in(stage).roles:
      if role.policy in self.resources.learners:
        self._board.write_stats(role.name, self._step, self._stats(role.name))
    self.done = self._step + 1
    return dispatched

  def host_state(self) -> dict[str, Any]:
    """What a checkpoint keeps; what the one before it has is not spooled."""
    kept = [int(p.name) for p in self._checkpoints.glob("*") if _is_step(p)]
    self._spool.trim(min(kept, default=-1) + 1)
    self._board.trim(min(kept, default=-1) + 1)
    return {**super().host_state(), "done": self.done}

  def resume(
      self, states: Mapping[str, TrainState], host: Mapping[str, Any]
  ) -> list[str]:
    """Continues from a checkpoint."""
    if "done" not in host:
      raise MismatchError("it is that of a run in one process")
    self.done = host["done"]
    return super().resume(states, host)

  def _stats(self, role: str) -> dict[str, float]:
    """A role's numbers of the step under way."""
    values = {
        name.partition("/")[0]: value
        for name, value in self.meter.values.items()
        if name.endswith(f"/{role}")
    }
    trained = float(self.meter.work.trained_tokens)
    return values | {"trained_tokens": trained}

  def _kept(self, seed: int, told: Trajectory, *, failed: bool) -> Trajectory:
    """This job's own record of a call that stands in a rollout.

    Args:
      seed: of the rollout.
      told: the call, as the leader tells it.
      failed: whether a machine failed on a call of the rollout, so that nothing
        of it is trained on and not all of it was kept.

    Returns:
      The call with its tokens; as it is told where it was not kept.

    Raises:
      MismatchError: it should have been kept: another attempt finds it no more.
    """
    found = self.desk.own(
        wire.identity(
            seed, told.task_id, told.rollout, told.role, told.call, told.attempt
        )
    )
    if found is None and failed:
      return told
    if found is None:
      raise MismatchError(
          f"call {told.call} to {told.role!r} in rollout {told.rollout} of task"
          f" {told.task_id} was reported, but is not kept here: the run cannot"
          " go on from this run directory"
      )
    return dataclasses.replace(found, parent=told.parent)

  def _is_elsewhere(self, one: Trajectory, team: Team) -> bool:
    """Whether a call of a team is another job's."""
    return team[one.role].policy in self.setup.elsewhere

  def _open(self, done: int) -> None:
    """Answers other jobs' calls of a team so many steps old."""
    self.opened = done
    self.desk.open(done)
    self._heart.ready(done)


def _is_step(path: pathlib.Path) -> bool:
  """Whether a path is that of a finished checkpoint."""
  return path.name.isdecimal()
