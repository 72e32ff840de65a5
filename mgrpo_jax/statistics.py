"""What a step's rollouts say about each role, as metrics."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mgrpo_jax import numerics
from mgrpo_jax.answers import overlap
from mgrpo_jax.comparison import Comparison
from mgrpo_jax.credit import Assignment, Credits
from mgrpo_jax.packing import Credit
from mgrpo_jax.rewards import RewardWeights, Scores
from mgrpo_jax.types import NO_PARENT, RolloutGroup, Status

_PARTS = ("format", "correct", "expert", "overlong")  # of a reward
_ECHO = 0.8  # F1 of words between a report and its request
_ENDINGS = {
    "completed": Status.COMPLETED,
    "truncated": Status.TRUNCATED,
    "malformed": Status.MALFORMED,
}


def of_role(
    groups: Sequence[RolloutGroup], scores: Sequence[Scores], role: str
) -> dict[str, float]:
  """Averages over the calls of one role that did not fail.

  Args:
    groups: of a step.
    scores: of the groups.
    role: its name.

  Returns:
    Metrics by name; means of rewards are missing where nothing counted.
  """
  calls = [t for group in groups for t in group.trajectories if t.role == role]
  rollouts = sum(group.num_rollouts for group in groups)
  failed = sum(t.status == Status.FAILED for t in calls)
  values = {
      f"calls/{role}": len(calls) / max(rollouts, 1),
      f"failed/{role}": float(failed),
  }
  done = [t for t in calls if t.status != Status.FAILED]
  if not done:
    return values
  values[f"turns/{role}"] = float(np.mean([t.num_turns for t in done]))
  values[f"sampled/{role}"] = float(np.mean([t.sampled for t in done]))
  echoes = [overlap(t.result_text, t.request) >= _ECHO for t in done]
  values[f"echoed/{role}"] = float(np.mean(echoes))
  for name, status in _ENDINGS.items():
    share = np.mean([t.status == status for t in done])
    values[f"{name}/{role}"] = float(share)
  return values | _rewards(groups, scores, role)


def of_seatings(groups: Sequence[RolloutGroup]) -> dict[str, int]:
  """Counts what spare rollouts did to groups.

  Args:
    groups: of a step.

  Returns:
    Rollouts by metric; nothing where no spares were begun.
  """
  seatings = [group.seating for group in groups if group.seating is not None]
  if not seatings:
    return {}
  return {
      name: sum(getattr(seating, name) for seating in seatings)
      for name in ("rescued", "late", "surplus")
  }


def of_credits(
    credits: Credits,
    comparison: Comparison,
    versions: Mapping[str, Sequence[int]],
) -> dict[str, float]:
  """Says of what a step trains on how it was compared, and how old it is.

  Args:
    credits: of the step.
    comparison: that made their advantages.
    versions: see `age`.

  Returns:
    The metrics of `of_assignment`, for each role, and of `staleness`.
  """
  values: dict[str, float] = {}
  for role, assignment in credits.assignments.items():
    values |= of_assignment(role, assignment, comparison)
  return values | staleness(credits.by_policy, versions)


def of_assignment(
    role: str, assignment: Assignment, comparison: Comparison
) -> dict[str, float]:
  """Says what the alignment dropped and how rewards spread within groups.

  Args:
    role: its name.
    assignment: of the role's calls.
    comparison: that made their advantages.

  Returns:
    `dropped`, `spread` and `flat_groups` of the role. The last two are missing
    where nobody called it, the last one also where calls are compared with
    nothing: a critic learns from equal rewards, too.
  """
  weight = np.asarray(assignment.alignment.weight, np.float64)
  num_calls = np.asarray(assignment.alignment.num_calls)
  tasks = np.flatnonzero(weight.sum((1, 2)) > 0)
  spreads = [
      _spread(weight[b].ravel(), assignment.rewards[b].ravel()) for b in tasks
  ]
  dropped = np.maximum(num_calls - weight.shape[-1], 0).sum()
  flat = ~assignment.teaches[tasks]
  values = {f"dropped/{role}": float(dropped)}
  if tasks.size:
    values[f"spread/{role}"] = float(np.mean(spreads))
  if tasks.size and comparison.in_groups:
    values[f"flat_groups/{role}"] = float(np.mean(flat))
  return values


def of_shares(
    groups: Sequence[RolloutGroup],
    scores: Sequence[Scores],
    roles: Iterable[str],
    weights: Mapping[str, RewardWeights],
    comparison: Comparison,
) -> dict[str, float]:
  """Says how much of the spread of roles' rewards outcome and grade make.

  A reward (M-GRPO, arXiv 2511.13288, Eq. 4-5) is the sum of what the outcome
  gives, b2 · format · correct, the grade, b3 · format · expert, and the rest.

      share of a part p = |C_p| / Σ_q |C_q|,   C_p = Σ_tasks Cov(R, p)

  with covariances over the calls of a task that count. A share is 0 where its
  weight is.

  Args:
    groups: of a step.
    scores: of the groups.
    roles: names of those that are told of.
    weights: of rewards, by role.
    comparison: of the step; where it gives calls something else than rewards,
      only the root's shares are told.

  Returns:
    For each role `outcome_share`, of the tasks in which outcomes differ, and
    `grade_share`, of those in which grades do and never of the root, which has
    no grade; missing where there is no such task.
  """
  parts, roots = _parts(groups, scores, weights)
  shares: dict[str, float] = {}
  for role in roles:
    found = parts.get(role)
    if not found or (role not in roots and comparison.given != "rewards"):
      continue
    differ = [one.made for one in found if one.outcomes]
    if differ:
      shares[f"outcome_share/{role}"] = _share(differ, 0)
    if role in roots:
      continue
    differ = [one.made for one in found if one.grades]
    if differ or not weights[role].expert:  # then nobody is graded
      shares[f"grade_share/{role}"] = _share(differ, 1)
  return shares


def staleness(
    by_policy: Mapping[str, Sequence[Credit]],
    versions: Mapping[str, Sequence[int]],
) -> dict[str, float]:
  """Says how old the oldest token of what is trained on is, in updates.

  Args:
    by_policy: what each policy is trained on.
    versions: see `age`.

  Returns:
    `staleness` and `staleness_mean` of each policy, 0 where everything was
    sampled from the newest version; and for each age that occurs the share of
    all trajectories that have it, `aged`. Calls in which nothing was sampled
    have no age.
  """
  values: dict[str, float] = {}
  found: list[int] = []
  for policy, credits in by_policy.items():
    ages = [
        _updates(versions[policy], one.trajectory.version_min)
        for one in credits
        if one.trajectory.loss_mask.any()
    ]
    values[f"staleness/{policy}"] = float(max(ages, default=0))
    values[f"staleness_mean/{policy}"] = float(np.mean(ages or [0]))
    found += ages
  shares = {
      f"aged/{age}": found.count(age) / len(found) for age in sorted({*found})
  }
  return values | shares


def age(
    group: RolloutGroup,
    *,
    policies: Mapping[str, str],
    versions: Mapping[str, Sequence[int]],
) -> int:
  """Computes how many updates old the weights behind a group's tokens are.

  Args:
    group: the rollouts.
    policies: of the roles that learn, by role.
    versions: numbers of the versions of each policy, ascending, the last of
      the weights that are being trained. A number is that of a step: a policy
      that did not learn in it has none.

  Returns:
    The most updates that one of these policies has seen since it sampled a
    token; 0 where none was sampled.
  """
  ages = [
      _updates(versions[policies[t.role]], t.version_min)
      for t in group.trajectories
      if t.role in policies and t.loss_mask.any()
  ]
  return max(ages, default=0)


def _updates(versions: Sequence[int], oldest: int) -> int:
  """How many versions are newer than one."""
  return sum(version > oldest for version in versions)


def _spread(weight: np.ndarray, rewards: np.ndarray) -> float:
  """Weighted population standard deviation."""
  mean = np.average(rewards, weights=weight)
  return float(np.sqrt(np.average((rewards - mean) ** 2, weights=weight)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
  """What makes the rewards of a role's calls differ within a task."""

  outcomes: bool  # whether they differ
  grades: bool
  made: np.ndarray  # [3] covariances with the reward: outcome, grade, rest


def _parts(
    groups: Sequence[RolloutGroup],
    scores: Sequence[Scores],
    weights: Mapping[str, RewardWeights],
) -> tuple[dict[str, list[_Parts]], set[str]]:
  """Takes rewards apart, by role and task; and the roles of the roots."""
  parts: dict[str, list[_Parts]] = {}
  roots = set()
  for group, graded in zip(groups, scores, strict=True):
    places: dict[str, list[int]] = {}
    for m, one in enumerate(group.trajectories):
      if one.parent == NO_PARENT:
        roots.add(one.role)
      if graded.weight[m] > 0:
        places.setdefault(one.role, []).append(m)
    for role, at in places.items():
      parts.setdefault(role, []).append(_apart(graded, at, weights[role]))
  return parts, roots


def _apart(graded: Scores, at: Sequence[int], weights: RewardWeights) -> _Parts:
  """Takes the rewards of some calls of a task apart."""
  total = graded.total[at].astype(np.float64)
  outcome = weights.correct * graded.format[at] * graded.correct[at]
  grade = weights.expert * graded.format[at] * graded.expert[at]
  rows = np.stack([outcome, grade, total - outcome - grade])
  apart = total - total.mean()
  # What rounding leaves of equal rewards is 0.
  rounding = numerics.SPREAD_ULPS * np.finfo(np.float32).eps
  apart[np.abs(apart) <= rounding * np.abs(total).max()] = 0.0
  return _Parts(
      outcomes=bool(np.ptp(graded.correct[at]) > 0),
      grades=bool(np.ptp(graded.expert[at]) > 0),
      made=rows @ apart / len(at),
  )


def _share(made: Sequence[np.ndarray], part: int) -> float:
  """Share of one part; 0 where nothing moves rewards."""
  sizes = np.abs(np.sum(made, axis=0)) if made else np.zeros(3)
  total = float(sizes.sum())
  return float(sizes[part]) / total if total > 0 else 0.0


def _rewards(
    groups: Sequence[RolloutGroup], scores: Sequence[Scores], role: str
) -> dict[str, float]:
  """Mean reward components of a role's calls that count, and their number."""
  rows = [
      [getattr(graded, part)[m] for part in ("total", *_PARTS)]
      for group, graded in zip(groups, scores, strict=True)
      for m, trajectory in enumerate(group.trajectories)
      if trajectory.role == role and graded.weight[m] > 0
  ]
  counted = {f"counted/{role}": float(len(rows))}
  if not rows:
    return counted
  names = ("reward", *_PARTS)
  means = np.mean(np.array(rows, np.float64), axis=0)
  return counted | {
      f"{n}/{role}": float(v) for n, v in zip(names, means, strict=True)
  }
