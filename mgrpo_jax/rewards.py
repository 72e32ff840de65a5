"""What each agent call earned (M-GRPO, arXiv 2511.13288, Eq. 4–5).

Pure functions of recorded rollouts, on the host. A machine or judge that
failed is not a wrong answer: what it touched has weight 0, not reward 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from mgrpo_jax import answers, fields
from mgrpo_jax.types import (
    NO_PARENT,
    Evidence,
    RolloutGroup,
    Status,
    Task,
    Trajectory,
)

Matches = Callable[[str, Sequence[str]], bool]
PerCall = Float[np.ndarray, " M"]  # of a group's M trajectories
Positions = Int[np.ndarray, " M"]  # among them


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardWeights:
  """What the components of a role's reward count, a1, a2 or b1, b2, b3.

  Attributes:
    format: of a well-formed call.
    correct: of the root's correctness.
    expert: of the grade of the call itself; 0 for the root.

  Raises:
    ValueError: if a weight is negative or not finite, naming it.
  """

  format: float
  correct: float
  expert: float

  def __post_init__(self) -> None:
    """Checks every field."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      fields.check(field.name, value, 0 <= value < math.inf, ">= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """The functions that grade.

  Attributes:
    format: trajectory -> whether its format is valid; `answered` or
      `well_formed`.
    correct: text, accepted answers -> whether it is right, such as
      `answers.matches`; None if the judge failed.
    expert: task, trajectory -> grade of the call in 0..1, such as
      `evidence_grade`; None if the judge failed.
    correct_of: group -> for each call, which one's correctness counts; only
      these are judged; `of_root` or `of_parent`.
  """

  format: Callable[[Trajectory], bool]
  correct: Callable[[str, Sequence[str]], bool | None]
  expert: Callable[[Task, Trajectory], float | None]
  correct_of: Callable[[RolloutGroup], Positions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Rewards of a group's M trajectories.

  Attributes:
    format: [M] float32, 0 or 1.
    correct: [M] float32, 0 or 1; of the root, or the caller.
    expert: [M] float32, 0..1; 0 where the role's weight of it is 0.
    total: [M] float32.
    weight: [M] float32, 1, or 0 where something failed; the other entries
      are then 0 and mean nothing.
  """

  format: PerCall
  correct: PerCall
  expert: PerCall
  total: PerCall
  weight: PerCall

  def records(self) -> list[dict[str, float]]:
    """Lists components and total by name; nothing where weight is 0."""
    names = ("format", "correct", "expert", "total")
    return [
        {name: float(getattr(self, name)[m]) for name in names}
        if counted
        else {}
        for m, counted in enumerate(self.weight)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleCalls:
  """One role's calls of B tasks and K rollouts, ready to be aligned.

  Attributes:
    calls: [B][K][d] trajectories that count, in order of the call.
    positions: [B][K][d] where they stand in their group.
    num_calls: [B, K] int32, d.
    rewards: [B, K, C] float32, totals, padded with 0 to C calls.
  """

  calls: tuple[tuple[tuple[Trajectory, ...], ...], ...]
  positions: tuple[tuple[tuple[int, ...], ...], ...]
  num_calls: Int[np.ndarray, "B K"]
  rewards: Float[np.ndarray, "B K C"]


def score(
    group: RolloutGroup,
    *,
    weights: Mapping[str, RewardWeights],
    rules: Rules,
) -> Scores:
  """Grades every call of a group.

      R = a1 · format + a2 · correct + b3 · expert,   0 if format is invalid

  M-GRPO, arXiv 2511.13288, Eq. 4 (root, b3 = 0) and 5 (its calls).

  Deviation: a rollout in which a call FAILED, or whose judge of correctness
  failed, has weight 0 whole: its outcome is not the team's doing.

  Args:
    group: the K rollouts of a task.
    weights: by name of role.
    rules: the functions that grade.

  Returns:
    Components, totals and weights of the M trajectories.

  Raises:
    ValueError: if a role has no weights, naming it.
  """
  missing = {t.role for t in group.trajectories} - weights.keys()
  if missing:
    raise ValueError(f"weights must name roles {sorted(missing)}, which ran")
  counting = rules.correct_of(group)
  own = {
      m: _own_correct(group.task, group.trajectories[m], rules)
      for m in set(counting.tolist())
  }
  broken = {
      t.rollout
      for t, m in zip(group.trajectories, counting, strict=True)
      if t.status == Status.FAILED or own[m] is None
  }
  rows = [
      None
      if t.rollout in broken
      else _grade(group.task, t, own[m] or 0.0, weights[t.role], rules)
      for t, m in zip(group.trajectories, counting, strict=True)
  ]
  table = np.array([row or (0.0,) * 4 for row in rows], np.float32)
  table = table.reshape(len(rows), 4)
  return Scores(
      format=table[:, 0],
      correct=table[:, 1],
      expert=table[:, 2],
      total=table[:, 3],
      weight=np.array([row is not None for row in rows], np.float32),
  )


def by_role(
    groups: Sequence[RolloutGroup],
    scores: Sequence[Scores],
    *,
    role: str,
    max_calls: int,
) -> RoleCalls:
  """Sorts one role's calls by task, rollout and order.

  Args:
    groups: B groups of K rollouts each.
    scores: of the groups.
    role: its name.
    max_calls: C, most calls of the role in a rollout.

  Returns:
    Calls of weight > 0, their positions, numbers and rewards.

  Raises:
    ValueError: if groups differ in K, or a rollout has more calls than C.
  """
  sizes = {group.num_rollouts for group in groups}
  if len(sizes) != 1:
    raise ValueError(
        f"groups must have the same number of rollouts, got {sorted(sizes)}"
    )
  positions = tuple(
      _positions(group, graded, role)
      for group, graded in zip(groups, scores, strict=True)
  )
  num_calls = np.array([[len(k) for k in b] for b in positions], np.int32)
  if num_calls.max() > max_calls:
    raise ValueError(
        f"max_calls must be at least {num_calls.max()}, the calls to {role!r}"
        f" in a rollout, got {max_calls}"
    )
  rewards = np.zeros((*num_calls.shape, max_calls), np.float32)
  for b, k in np.ndindex(num_calls.shape):
    held = list(positions[b][k])
    rewards[b, k, : len(held)] = scores[b].total[held]
  return RoleCalls(
      calls=tuple(
          tuple(tuple(group.trajectories[m] for m in k) for k in b)
          for group, b in zip(groups, positions, strict=True)
      ),
      positions=positions,
      num_calls=num_calls,
      rewards=rewards,
  )


def answered(trajectory: Trajectory) -> bool:
  """Accepts a call that ended with an answer, whatever came before.

  Args:
    trajectory: the call.

  Returns:
    Whether its format is valid.
  """
  return trajectory.status == Status.COMPLETED and bool(
      trajectory.result_text.strip()
  )


def well_formed(trajectory: Trajectory) -> bool:
  """Accepts a call that answered without a malformed turn.

  Args:
    trajectory: the call.

  Returns:
    Whether its format is valid.
  """
  return answered(trajectory) and all(
      turn.kind != "malformed" for turn in trajectory.turns
  )


def evidence_grade(
    task: Task,
    trajectory: Trajectory,
    *,
    matches: Matches,
    opened_share: float,
) -> float:
  """Grades a call by the evidence it was sent for.

      o · opened the passage + (1 - o) · its report is the passage's answer

  The evidence is the task's look-up whose question is nearest the request, by
  F1 of words; the best grade among equally near ones.

  Args:
    task: with its evidence; without any the grade is 0.
    trajectory: the call.
    matches: text, accepted answers -> whether a report is right, such as
      `answers.matches`, or `answers.mentions` where reports are sentences.
    opened_share: o, what opening alone is worth, in [0, 1].

  Returns:
    0, o, 1 - o or 1.
  """
  grades = [
      opened_share * _opened(trajectory, evidence)
      + (1 - opened_share) * _reports(trajectory, evidence, matches)
      for evidence in nearest_evidence(task, trajectory.request)
  ]
  return max(grades, default=0.0)


def nearest_evidence(task: Task, request: str) -> tuple[Evidence, ...]:
  """Finds what a request asks for among a task's look-ups.

  Args:
    task: with its evidence.
    request: what a caller asked.

  Returns:
    The evidence whose question shares most words with the request (F1), all
    of it where several share equally many.
  """
  nearness = [answers.overlap(request, e.question) for e in task.evidence]
  best = max(nearness, default=0.0)
  return tuple(
      evidence
      for evidence, near in zip(task.evidence, nearness, strict=True)
      if near == best
  )


def of_root(group: RolloutGroup) -> Positions:
  """Gives every call the correctness of its rollout's root (the paper's).

  Args:
    group: the rollouts.

  Returns:
    [M] int, where the root of each call's rollout stands.
  """
  rollout = np.asarray(group.rollout)
  (where,) = np.nonzero(np.asarray(group.parent) == NO_PARENT)
  roots = np.zeros(group.num_rollouts, np.int64)
  roots[rollout[where]] = where
  return roots[rollout]


def of_parent(group: RolloutGroup) -> Positions:
  """Gives every call the correctness of its caller, the root its own.

  Args:
    group: the rollouts.

  Returns:
    [M] int, where each call's caller stands.
  """
  parents = np.asarray(group.parent)
  return np.where(parents == NO_PARENT, np.arange(len(parents)), parents)


def _grade(
    task: Task,
    trajectory: Trajectory,
    correct: float,
    weights: RewardWeights,
    rules: Rules,
) -> tuple[float, float, float, float] | None:
  """Computes format, correct, expert and total; None if the expert failed."""
  valid = rules.format(trajectory)
  expert = rules.expert(task, trajectory) if weights.expert > 0 else 0.0
  if expert is None:
    return None
  total = (
      weights.format * valid
      + weights.correct * correct
      + weights.expert * expert
  )
  return float(valid), correct, expert, total if valid else 0.0


def _positions(
    group: RolloutGroup, scores: Scores, role: str
) -> tuple[tuple[int, ...], ...]:
  """Lists where a role's calls that count stand, for each rollout."""
  held: list[list[int]] = [[] for _ in range(group.num_rollouts)]
  for m, trajectory in enumerate(group.trajectories):
    if trajectory.role == role and scores.weight[m] > 0:
      held[trajectory.rollout].append(m)
  return tuple(map(tuple, held))


def _own_correct(
    task: Task, trajectory: Trajectory, rules: Rules
) -> float | None:
  """Grades a root against the task, a call against its evidence."""
  if trajectory.status != Status.COMPLETED:
    return 0.0
  accepted = [task.answers]
  if trajectory.parent != NO_PARENT:
    hops = nearest_evidence(task, trajectory.request)
    accepted = [hop.answers for hop in hops]
  judged = [rules.correct(trajectory.result_text, each) for each in accepted]
  return None if None in judged else float(any(judged))


def _reports(
    trajectory: Trajectory, evidence: Evidence, matches: Matches
) -> bool:
  """Says whether a call came back with the answer to a look-up."""
  return trajectory.status == Status.COMPLETED and matches(
      trajectory.result_text, evidence.answers
  )


def _opened(trajectory: Trajectory, evidence: Evidence) -> bool:
  """Says whether the passage was opened, alone or on a page that shows it."""
  return any(
      turn.page == evidence.page
      or evidence.page.startswith(f"{turn.page}#")
      and answers.shows(turn.result, evidence.answers)
      for turn in trajectory.turns
  )
