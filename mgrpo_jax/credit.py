"""Arrows 4 and 5: graded calls in, credited ones out."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mgrpo_jax import packing, rewards
from mgrpo_jax.agents.team import Team
from mgrpo_jax.alignment import gather
from mgrpo_jax.comparison import Comparison, alike
from mgrpo_jax.packing import Credit
from mgrpo_jax.rewards import RoleCalls, Scores
from mgrpo_jax.types import Alignment, RolloutGroup

Align = Callable[..., Alignment]
# Of a role's slots: the alignment, rewards and advantages [B, K, D] float32.
Compared = tuple[Alignment, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
  """What the calls of one role are to be trained with.

  Attributes:
    credits: trajectories with advantage and weight, copies folded.
    alignment: of the calls, on the host.
    rewards: [B, K, D] float32, of the aligned slots.
    advantages: [B, K, D] float32, of the aligned slots.
  """

  credits: tuple[Credit, ...]
  alignment: Alignment
  rewards: np.ndarray
  advantages: np.ndarray

  @property
  def teaches(self) -> np.ndarray:
    """[B] bool: whether a slot of the task that counts has an advantage."""
    counts = np.asarray(self.alignment.weight) > 0
    return np.any(counts & (self.advantages != 0), axis=(1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credits:
  """What one step trains on.

  Attributes:
    by_policy: trajectories with advantage and weight.
    advantages: for each group [M] float64, NaN where the update does not see
      the call; the mean over its slots where they differ.
    assignments: by role; of roles whose calls were compared.
  """

  by_policy: Mapping[str, tuple[Credit, ...]]
  advantages: tuple[np.ndarray, ...]
  assignments: Mapping[str, Assignment]


def learning(team: Team, trained: Collection[str]) -> tuple[str, ...]:
  """Names the roles whose calls train a policy.

  Args:
    team: the roles.
    trained: names of the policies that learn.

  Returns:
    Names, the root's first if it is one of them.
  """
  return tuple(
      role.name
      for role in team.roles
      if role.policy in trained and role.trainable
  )


def copied(
    groups: Sequence[RolloutGroup], scores: Sequence[Scores], team: Team
) -> Credits:
  """Credits demonstrations: every call counts once, nothing is compared.

  Args:
    groups: B demonstrations.
    scores: of the groups; calls of weight 0 are left out.
    team: the roles; those that are not trainable are left out.

  Returns:
    The credits, every advantage 0.
  """
  by_policy: dict[str, list[Credit]] = {}
  for group, graded in zip(groups, scores, strict=True):
    for trajectory, counted in zip(
        group.trajectories, graded.weight > 0, strict=True
    ):
      role = team[trajectory.role]
      if counted and role.trainable:
        by_policy.setdefault(role.policy, []).append(
            Credit(trajectory=trajectory, advantage=0.0, weight=1.0)
        )
  return Credits(
      by_policy={name: tuple(part) for name, part in by_policy.items()},
      advantages=_unseen(groups),
      assignments={},
  )


def compared(
    groups: Sequence[RolloutGroup],
    scores: Sequence[Scores],
    *,
    team: Team,
    trained: Collection[str],
    align: Align,
    comparison: Comparison,
    num_slots: int,
    seeds: Mapping[str, int],
) -> Credits:
  """Aligns and compares the calls of every role that learns.

  Args:
    groups: B groups of K rollouts each.
    scores: of the groups.
    team: the roles.
    trained: names of the policies that learn.
    align: one of `alignment`'s strategies.
    comparison: what slots are compared with.
    num_slots: D of every role but the root, which has 1.
    seeds: of the alignment's draws, by role, in [0, 2**32).

  Returns:
    The credits.

  Raises:
    ValueError: groups differ in K, a rollout has more calls of a role than the
      team allows, or a role that is compared has no seed.
  """
  inherits = comparison.given == "parents"
  learners = learning(team, trained)
  compared_roles = [
      role.name
      for role in team.roles
      if role.name in learners or (inherits and role.name == team.root)
  ]
  calls = rewards.by_role(
      groups,
      scores,
      max_calls={name: team.most_calls(name) for name in compared_roles},
  )
  found = compare(
      calls,
      root=team.root,
      align=align,
      comparison=comparison,
      num_slots=num_slots,
      seeds=seeds,
  )
  gains = _unseen(groups)
  by_policy: dict[str, tuple[Credit, ...]] = {}
  assignments: dict[str, Assignment] = {}
  for name in learners:
    assignment = assign(calls[name], *found[name])
    scatter(assignment, calls[name], gains)
    assignments[name] = assignment
    policy = team[name].policy
    earlier = by_policy.get(policy, ())
    by_policy[policy] = (*earlier, *assignment.credits)
  return Credits(by_policy=by_policy, advantages=gains, assignments=assignments)


def compare(
    calls: Mapping[str, RoleCalls],
    *,
    root: str,
    align: Align,
    comparison: Comparison,
    num_slots: int,
    seeds: Mapping[str, int],
) -> dict[str, Compared]:
  """Aligns calls and compares each slot with its role's group.

  Two programs, however many roles there are: the root's and the others'.

  Args:
    calls: by role; all of the same B tasks and K rollouts.
    root: name of the root, which may be missing from the calls, unless the
      others inherit its advantages.
    align: one of `alignment`'s strategies.
    comparison: what slots are compared with.
    num_slots: D of every role but the root, which has 1.
    seeds: of the alignment's draws, by role, in [0, 2**32).

  Returns:
    By role, on the host: the alignment, rewards and advantages of the slots.

  Raises:
    ValueError: roles differ in B or K, one has no seed, or the root is missing
      whose advantages the others inherit.
  """
  if not calls:
    return {}
  _check(calls, seeds)
  if comparison.given == "parents" and root not in calls:
    raise ValueError(f"calls must have those of {root!r}, to inherit from")
  others = tuple(name for name in calls if name != root)
  shape = next(iter(calls.values())).num_calls.shape
  roots: Any = np.zeros((*shape, 1), np.float32)
  dispatched: dict[str, Any] = {}
  if root in calls:
    dispatched[root] = _aligned(
        *_stacked([calls[root]], [seeds[root]]),
        roots,
        align=align,
        comparison=alike(comparison.root),
        num_slots=1,
    )
    roots = dispatched[root][2][0]
  if others:
    dispatched[""] = _aligned(
        *_stacked([calls[n] for n in others], [seeds[n] for n in others]),
        roots,
        align=align,
        comparison=comparison,
        num_slots=num_slots,
    )
  fetched = jax.device_get(dispatched)
  ordered = [((root,), fetched.get(root)), (others, fetched.get(""))]
  return {
      name: jax.tree.map(operator.itemgetter(number), block)
      for names, block in ordered
      if block is not None
      for number, name in enumerate(names)
  }


def assign(
    calls: RoleCalls,
    alignment: Alignment,
    earned: Float[np.ndarray, "B K D"],
    gains: Float[np.ndarray, "B K D"],
) -> Assignment:
  """Says what a role's calls are to be trained with.

  Args:
    calls: of B tasks and K rollouts.
    alignment: of these calls.
    earned: rewards of the slots, float32.
    gains: advantages of the slots, float32.

  Returns:
    The assignment.
  """
  return Assignment(
      credits=packing.fold(calls.calls, alignment, gains),
      alignment=alignment,
      rewards=earned,
      advantages=gains,
  )


def scatter(
    assignment: Assignment,
    calls: RoleCalls,
    gains: Sequence[np.ndarray],
) -> None:
  """Writes each call's advantage to the call's place in its group.

      Σ w A / Σ w   over the slots that the call fills

  Args:
    assignment: of the calls.
    calls: the same that were assigned.
    gains: for each group [M] float, changed in place; calls that fill no slot
      are left as they are.
  """
  index = np.asarray(assignment.alignment.index)
  weight = np.asarray(assignment.alignment.weight)
  b, k, slot = np.nonzero(weight > 0)
  called, place = np.unique(
      np.stack([b, k, index[b, k, slot]]), axis=1, return_inverse=True
  )
  counted = weight[b, k, slot].astype(np.float64)
  weighted = np.bincount(place, counted * assignment.advantages[b, k, slot])
  means = weighted / np.bincount(place, counted)
  for (task, rollout, call), gain in zip(called.T.tolist(), means, strict=True):
    gains[task][calls.positions[task][rollout][call]] = gain


def _check(calls: Mapping[str, RoleCalls], seeds: Mapping[str, int]) -> None:
  """Raises where roles cannot be compared side by side."""
  shapes = {name: one.num_calls.shape for name, one in calls.items()}
  if len(set(shapes.values())) != 1:
    raise ValueError(f"calls must be of as many tasks and rollouts: {shapes}")
  if missing := sorted(set(calls) - set(seeds)):
    raise ValueError(f"seeds must name roles {missing}")


def _unseen(groups: Sequence[RolloutGroup]) -> tuple[np.ndarray, ...]:
  """NaN for every call."""
  return tuple(np.full(len(g.trajectories), np.nan) for g in groups)


def _stacked(
    calls: Sequence[RoleCalls], seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Seeds [R], numbers [R, B, K], rewards and sub-tasks [R, B, K, C]."""
  most = max(one.rewards.shape[2] for one in calls)

  def padded(values: np.ndarray) -> np.ndarray:
    more = most - values.shape[2]  # which no slot looks at
    return np.pad(values, ((0, 0), (0, 0), (0, more))) if more else values

  return (
      np.array(seeds, np.uint32),
      np.stack([one.num_calls for one in calls]),
      np.stack([padded(one.rewards) for one in calls]),
      np.stack([padded(one.subtasks) for one in calls]),
  )


@functools.partial(
    jax.jit, static_argnames=("align", "comparison", "num_slots")
)
def _aligned(
    seeds: Int[Array, " R"],
    num_calls: Int[Array, "R B K"],
    earned: Float[Array, "R B K C"],
    subtasks: Int[Array, "R B K C"],
    roots: Float[Array, "B K 1"],
    *,
    align: Align,
    comparison: Comparison,
    num_slots: int,
) -> tuple[Alignment, Float[Array, "R B K D"], Float[Array, "R B K D"]]:
  """Alignment first, then the statistics over it; R roles at once."""

  def of_role(
      seed: Array, num_calls: Array, earned: Array, asked: Array
  ) -> Any:
    aligned = align(jax.random.key(seed), num_calls, num_slots=num_slots)
    slots, weights = gather(earned, aligned), aligned.weight
    asked = gather(asked, aligned)
    gains = comparison.of_calls(slots, weights, subtasks=asked, roots=roots)
    return aligned, slots, gains

  found: tuple[Alignment, Array, Array] = jax.vmap(of_role)(
      seeds, num_calls, earned, subtasks
  )
  return found
