"""A job that follows: it trains on its own calls of the leader's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mgrpo_jax import rollout
from mgrpo_jax.agents.call import turn_seed
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.atomic import CorruptError
from mgrpo_jax.decoupled.board import Told
from mgrpo_jax.decoupled.part import Part
from mgrpo_jax.evaluate import Evaluation
from mgrpo_jax.rewards import Scores
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.types import RolloutGroup, Status, Task

T = TypeVar("T")


class Follower(Part):
  """The job of any other policy."""

  def take(self, stage: Stage) -> tuple[Task, ...]:
    """Arrow 1: only demonstrations are this job's own."""
    return super().take(stage) if stage.objective == "imitate" else ()

  def _reported(self, team: Team) -> Sequence[Role]:
    """The roles whose calls are this job's."""
    return [r for r in team.roles if r.policy in self.resources.learners]

  async def _answered(self, probe: Callable[[], T | None], what: str) -> T:
    """Answers calls until the leader has brought something about."""
    team = self.setup.team
    return await self._peers[team[team.root].policy].wait(probe, what)

  async def _rolled_out(
      self, stage: Stage, tasks: Sequence[Task], step: int, seed: int
  ) -> tuple[list[RolloutGroup], int]:
    """Answers calls until the leader has made the step a fact."""
    if (found := self._spool.read(step)) is None:
      self._open(step)
      told = await self._answered(
          lambda: self._board.step(step), f"to complete step {step}"
      )
      groups = [self._group(one, seed, stage) for one in told]
      scores: list[Scores] | None = [one.scores for one in told]
      self._spool.write(step, groups, scores)
      self.desk.close()
    else:
      groups, scores = found
    if scores is None:
      raise CorruptError(f"the spool of step {step} holds no scores")
    self._told.append(scores)
    own = (t for g in groups for t in g.trajectories if t.account is None)
    return groups, sum(t.sampled for t in own)

  def _graded(
      self, stage: Stage, groups: Sequence[RolloutGroup]
  ) -> list[Scores]:
    """The leader's rewards, but for what this job's policy has outgrown."""
    if stage.objective == "imitate":
      return super()._graded(stage, groups)
    scores = self._scored(stage, groups)
    old = [self._publisher.outgrew(stage, group) for group in groups]
    self.meter.values["stale"] = float(sum(old))
    return [
        told.uncounted() if outgrown else told
        for told, outgrown in zip(scores, old, strict=True)
    ]

  async def _examined(
      self, tasks: Sequence[Task], split: str, done: int
  ) -> tuple[Evaluation, int]:
    """Answers calls until the leader has what it asked."""
    own = self.resources.learners.keys()
    found = self._board.evaluation(split, done)
    if found is None:
      if not own.isdisjoint(self.setup.team_after(done).policies):
        self._open(done)  # nobody calls a job that is not there yet
      found = await self._answered(
          lambda: self._board.evaluation(split, done),
          f"to evaluate {split} after {done} steps",
      )  # the desk stays open: the leader may be rolling out that step by now
    return found[0], sum(n for p, n in found[1].items() if p in own)

  def _group(self, told: Told, seed: int, stage: Stage) -> RolloutGroup:
    """A group as the leader tells it, this job's own calls in their places."""
    seed = turn_seed(seed, told.repetition) if told.repetition else seed
    team, rollouts = self.setup.team_in(stage), []
    for calls in told.rollouts:
      failed = any(t.status == Status.FAILED for t in calls)
      rollouts.append(
          [
              t
              if self._is_elsewhere(t, team)
              else self._kept(seed, t, failed=failed)
              for t in calls
          ]
      )
    return rollout.group_of(
        self._tasks[told.task],
        rollouts,
        environment=self.resources.training_of(team),
    )
