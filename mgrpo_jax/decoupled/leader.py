"""The job that leads: its word makes a step a fact for the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax.agents.call import turn_seed
from mgrpo_jax.agents.team import Team
from mgrpo_jax.atomic import CorruptError, MismatchError
from mgrpo_jax.decoupled.part import Part
from mgrpo_jax.evaluate import Evaluation
from mgrpo_jax.meter import Meter
from mgrpo_jax.run import Run
from mgrpo_jax.spares import together
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.types import RolloutGroup, Status, Task, TrainState


class Leader(Part):
  """The job of the root's policy: drives rollouts, grades, decides."""

  _begun = (0, 0, 0)  # what had crossed when the step's calls began
  _awaited: frozenset[str] = frozenset()  # policies whose jobs were, last

  def resume(
      self, states: Mapping[str, TrainState], host: Mapping[str, Any]
  ) -> list[str]:
    """Continues from a checkpoint; tells again what may have been lost."""
    problems = super().resume(states, host)
    self._board.repeat()
    return problems

  async def tokens(self) -> dict[str, int]:
    """What the whole team has spent so far."""
    spent = await super().tokens()
    for policy in self._peers:
      step = _last(self.setup.played({policy}), self.done)
      if step is not None:
        stats = await self._trained(policy, step)
        spent["trained"] += int(stats["trained_tokens"])
    return spent

  async def _rolled_out(
      self, stage: Stage, tasks: Sequence[Task], step: int, seed: int
  ) -> tuple[list[RolloutGroup], int]:
    """Executes the team, unless the step was made before; makes it a fact."""
    found, told = self._spool.read(step), self._board.has_step(step)
    if found is None:
      if told:
        raise MismatchError(
            f"step {step} stands in the bucket, but not in this run directory:"
            " give that which the run began with, or another bucket"
        )
      await self._ready(self.setup.team_in(stage), step, self.drawing)
      groups = await self._roll_out(stage, tasks, seed)
      groups = [
          self._filled(group, seed, groups[:b], self.setup.team_in(stage))
          for b, group in enumerate(groups)
      ]
      self._spool.write(step, groups, None)
    else:
      groups, _ = found
      if [g.task.id for g in groups] != [t.id for t in tasks]:
        raise CorruptError(f"the spool of step {step} is of other tasks")
    scores = Run._scored(self, stage, groups)
    if not told:
      self._count(self._board.announce(step, groups, scores), groups)
    self._told.append(scores)
    return groups, sum(t.sampled for g in groups for t in g.trajectories)

  async def _examined(
      self, tasks: Sequence[Task], split: str, done: int
  ) -> tuple[Evaluation, int]:
    """Asks held-out questions, unless that was done before."""
    found = self._board.evaluation(split, done)
    if found is not None:
      return found[0], sum(found[1].values())
    team = self.setup.team_after(done)
    await self._ready(team, done, self.meter)
    result, _ = await super()._examined(tasks, split, done)
    tokens = dict.fromkeys(team.policies, 0)
    for group in result.groups:
      for one in group.trajectories:
        tokens[team[one.role].policy] += one.sampled
    self._board.write_evaluation(split, done, result, tokens)
    return result, sum(tokens.values())

  async def _ready(self, team: Team, done: int, meter: Meter) -> None:
    """Waits until a team's jobs answer calls of it, so many steps old."""
    self._open(done)
    with meter.timed("jobs"):
      async with together() as group:
        for policy, peer in self._peers.items():
          if policy in team.policies:
            self._expect(policy)
            group.create_task(peer.ready(done))
    self._awaited = frozenset(team.policies)
    self._begun = self._crossed()

  def _expect(self, policy: str) -> None:
    """Begins to count the silence of a job that was not waited for before."""
    if policy not in self._awaited:
      self._peers[policy].expect()

  async def _trained(self, policy: str, step: int) -> dict[str, Any]:
    """Waits until a job has trained on a step; what it says of it."""
    self._expect(policy)
    team = self.setup.team_at(step)
    role = next(role.name for role in team.roles if role.policy == policy)
    return await self._peers[policy].wait(
        lambda: self._board.stats(role, step), f"to train on step {step}"
    )

  def _crossed(self) -> tuple[int, int, int]:
    """Calls in other jobs, bytes of their text, all bytes; so far."""
    total = sum(peer.sent + peer.received for peer in self._peers.values())
    return self._traffic.calls, self._traffic.text_bytes, total

  def _count(self, written: int, groups: Sequence[RolloutGroup]) -> None:
    """Says what crossed between jobs in the step, by trajectory."""
    calls, text, total = (
        now - before
        for now, before in zip(self._crossed(), self._begun, strict=True)
    )
    if not calls:
      return
    trajectories = sum(len(group.trajectories) for group in groups)
    self.drawing.values |= {
        "crossed_text": text / calls,
        "crossed_besides": (total - text) / calls + written / trajectories,
    }

  def _filled(
      self,
      group: RolloutGroup,
      seed: int,
      before: Sequence[RolloutGroup],
      team: Team,
  ) -> RolloutGroup:
    """Puts in the calls that others made of this job."""
    repetition = [one.task.id for one in before].count(group.task.id)
    seed = turn_seed(seed, repetition) if repetition else seed
    failed = {
        t.rollout for t in group.trajectories if t.status == Status.FAILED
    }
    calls = tuple(
        t
        if t.account is None or self._is_elsewhere(t, team)
        else self._kept(seed, t, failed=t.rollout in failed)
        for t in group.trajectories
    )
    return dataclasses.replace(group, trajectories=calls)


def _last(spans: Sequence[range], done: int) -> int | None:
  """The last of the steps done that stands in one of the spans, if any."""
  begun = [span for span in spans if span.start < done]
  return min(begun[-1].stop, done) - 1 if begun else None
