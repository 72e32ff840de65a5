"""What each agent call earned (M-GRPO, arXiv 2511.13288, Eq. 4–5).

Pure functions of recorded rollouts, on the host. A machine or judge that
failed is not a wrong answer: what it touched has weight 0, not reward 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from mgrpo_jax import fields, grades
from mgrpo_jax.types import (
    NO_PARENT,
    Account,
    RolloutGroup,
    Status,
    Task,
    Trajectory,
)

COMPONENTS = ("format", "correct", "expert", "overlong", "total")
PerCall = Float[np.ndarray, " M"]  # of a group's M trajectories
Positions = Int[np.ndarray, " M"]  # among them


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardWeights:
  """What the components of a role's reward count, a1, a2 or b1, b2, b3.

  Attributes:
    format: of a well-formed call.
    correct: of the root's correctness.
    expert: of the grade of the call itself; 0 for the root.
    overlong: what a call that used up its context loses.

  Raises:
    ValueError: if a weight is negative or not finite, naming it.
  """

  format: float
  correct: float
  expert: float
  overlong: float

  def __post_init__(self) -> None:
    """Checks every field."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      fields.check(field.name, value, 0 <= value < math.inf, ">= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """The functions that grade.

  Attributes:
    format: trajectory -> whether its format is valid; `grades.answered` or
      `grades.well_formed`.
    correct: text, accepted answers -> whether it is right, such as
      `answers.matches`; None if the judge failed.
    expert: task, trajectory -> grade of the call in 0..1, such as
      `grades.evidence_grade`; None if the judge failed.
    correct_of: group -> for each call, which one's correctness counts; only
      these are judged; `of_root` or `of_parent`.
    overlong: trajectory -> how deep it went into the end of its context, in
      0..1, such as `grades.overlong`; None where that costs nothing.
  """

  format: Callable[[Trajectory], bool]
  correct: Callable[[str, Sequence[str]], bool | None]
  expert: Callable[[Task, Trajectory], float | None]
  correct_of: Callable[[RolloutGroup], Positions]
  overlong: Callable[[Trajectory], float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """Rewards of a group's M trajectories.

  Attributes:
    format: [M] float32, 0 or 1.
    correct: [M] float32, 0 or 1; of the root, or the caller.
    expert: [M] float32, 0..1; 0 where the role's weight of it is 0.
    overlong: [M] float32, 0..1; 0 where that costs nothing.
    total: [M] float32.
    weight: [M] float32, 1, or 0 where something failed; the other entries
      then mean nothing.
  """

  format: PerCall
  correct: PerCall
  expert: PerCall
  overlong: PerCall
  total: PerCall
  weight: PerCall

  def records(self) -> list[dict[str, float]]:
    """Lists components and total by name; nothing where weight is 0."""
    return [
        {name: float(getattr(self, name)[m]) for name in COMPONENTS}
        if counted
        else {}
        for m, counted in enumerate(self.weight)
    ]

  def uncounted(self) -> Scores:
    """The scores of a group of which nothing counts."""
    return dataclasses.replace(self, weight=np.zeros_like(self.weight))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleCalls:
  """One role's calls of B tasks and K rollouts, ready to be aligned.

  Attributes:
    calls: [B][K][d] trajectories that count, in order of the call.
    positions: [B][K][d] where they stand in their group.
    num_calls: [B, K] int32, d.
    rewards: [B, K, C] float32, totals, padded with 0 to C calls.
    subtasks: [B, K, C] int32, counts what was delegated; attempts at the same
      sub-task share its number. Padded with -1.
  """

  calls: tuple[tuple[tuple[Trajectory, ...], ...], ...]
  positions: tuple[tuple[tuple[int, ...], ...], ...]
  num_calls: Int[np.ndarray, "B K"]
  rewards: Float[np.ndarray, "B K C"]
  subtasks: Int[np.ndarray, "B K C"]


def score(
    group: RolloutGroup,
    *,
    weights: Mapping[str, RewardWeights],
    rules: Rules,
) -> Scores:
  """Grades every call of a group.

      R = a1 · format + a2 · correct + b3 · expert,   0 if format is invalid
      R - c · overlong                                where that is to cost

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
    ValueError: if a role has no weights, or a rule graded a call with a
      number that is not finite; names the role.
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
  table = np.array(
      [row or (0.0,) * len(COMPONENTS) for row in rows], np.float32
  )
  table = table.reshape(len(rows), len(COMPONENTS))
  for m, column in np.argwhere(~np.isfinite(table))[:1].tolist():
    raise ValueError(
        f"{COMPONENTS[column]} of a call of {group.trajectories[m].role!r} is"
        f" {table[m, column]}, must be finite"
    )
  return Scores(
      **dict(zip(COMPONENTS, table.T, strict=True)),
      weight=np.array([row is not None for row in rows], np.float32),
  )


def appraise(
    task: Task,
    trajectory: Trajectory,
    *,
    weights: RewardWeights,
    rules: Rules,
) -> Account:
  """Says of a call all that another job needs to reward it.

  Args:
    task: that the call belongs to.
    trajectory: the call, made here.
    weights: of its role.
    rules: the functions that grade.

  Returns:
    The account; `score` treats a call with one as the call itself.
  """
  valid, expert, overlong = _parts(task, trajectory, weights, rules)
  return Account(
      sampled=trajectory.sampled,
      turns=trajectory.num_turns,
      format=valid,
      correct=_own_correct(task, trajectory, rules),
      expert=expert,
      overlong=overlong,
  )


def by_role(
    groups: Sequence[RolloutGroup],
    scores: Sequence[Scores],
    *,
    max_calls: Mapping[str, int],
) -> dict[str, RoleCalls]:
  """Sorts the calls of some roles by role, task, rollout and order.

  Args:
    groups: B groups of K rollouts each.
    scores: of the groups.
    max_calls: C, most calls in a rollout, of each role that is wanted.

  Returns:
    By role: calls of weight > 0, their positions, numbers and rewards.

  Raises:
    ValueError: if groups differ in K, or a rollout has more calls than C.
  """
  sizes = {group.num_rollouts for group in groups}
  if len(sizes) != 1:
    raise ValueError(
        f"groups must have the same number of rollouts, got {sorted(sizes)}"
    )
  places = [
      _places(group, graded, max_calls)
      for group, graded in zip(groups, scores, strict=True)
  ]
  return {
      role: _role_calls(
          groups, scores, role, [held[role] for held in places], most
      )
      for role, most in max_calls.items()
  }


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
) -> tuple[float, float, float, float, float] | None:
  """Computes the components and the total; None if the expert failed."""
  valid, expert, deep = _parts(task, trajectory, weights, rules)
  if expert is None:
    return None
  total = (
      weights.format * valid
      + weights.correct * correct
      + weights.expert * expert
  )
  earned = (total if valid else 0.0) - weights.overlong * deep
  return float(valid), correct, expert, deep, earned


def _parts(
    task: Task, trajectory: Trajectory, weights: RewardWeights, rules: Rules
) -> tuple[bool, float | None, float]:
  """Format, expert and overlong of a call, whoever made it."""
  if (told := trajectory.account) is not None:
    return told.format, told.expert, told.overlong
  valid = rules.format(trajectory)
  expert = rules.expert(task, trajectory) if weights.expert > 0 else 0.0
  deep = 0.0
  if rules.overlong is not None and weights.overlong > 0:
    deep = rules.overlong(trajectory)
  return valid, expert, deep


# Of a role, for each rollout: where calls that count stand, and what number the
# sub-task of each has.
_Places = list[tuple[list[int], list[int]]]


def _places(
    group: RolloutGroup, scores: Scores, roles: Collection[str]
) -> dict[str, _Places]:
  """Finds the calls of every role in one pass."""
  found: dict[str, _Places] = {
      role: [([], []) for _ in range(group.num_rollouts)] for role in roles
  }
  asked = {role: [-1] * group.num_rollouts for role in roles}
  for m, trajectory in enumerate(group.trajectories):
    role, k = trajectory.role, trajectory.rollout
    if role not in found:
      continue
    asked[role][k] += trajectory.attempt == 0
    if scores.weight[m] > 0:
      positions, numbers = found[role][k]
      positions.append(m)
      numbers.append(asked[role][k])
  return found


def _role_calls(
    groups: Sequence[RolloutGroup],
    scores: Sequence[Scores],
    role: str,
    places: Sequence[_Places],
    max_calls: int,
) -> RoleCalls:
  """Lays out the calls of one role."""
  num_calls = np.array([[len(at) for at, _ in b] for b in places], np.int32)
  if num_calls.max() > max_calls:
    raise ValueError(
        f"max_calls must be at least {num_calls.max()}, the calls to {role!r}"
        f" in a rollout, got {max_calls}"
    )
  rewards = np.zeros((*num_calls.shape, max_calls), np.float32)
  subtasks = np.full(rewards.shape, -1, np.int32)
  for b, k in np.argwhere(num_calls).tolist():
    at, numbers = places[b][k]
    rewards[b, k, : len(at)] = scores[b].total[at]
    subtasks[b, k, : len(at)] = numbers
  return RoleCalls(
      calls=tuple(
          tuple(tuple(group.trajectories[m] for m in at) for at, _ in b)
          for group, b in zip(groups, places, strict=True)
      ),
      positions=tuple(tuple(tuple(at) for at, _ in b) for b in places),
      num_calls=num_calls,
      rewards=rewards,
      subtasks=subtasks,
  )


def _own_correct(
    task: Task, trajectory: Trajectory, rules: Rules
) -> float | None:
  """Grades a root against the task, a call against its evidence."""
  if trajectory.account is not None:
    return trajectory.account.correct
  if trajectory.status != Status.COMPLETED:
    return 0.0
  accepted = [task.answers]
  if trajectory.parent != NO_PARENT:
    hops = grades.nearest_evidence(task, trajectory.request)
    accepted = [hop.answers for hop in hops]
  judged = [rules.correct(trajectory.result_text, each) for each in accepted]
  return None if None in judged else float(any(judged))
