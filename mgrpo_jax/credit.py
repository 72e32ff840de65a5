"""Arrows 4 and 5: graded calls in, credited ones out."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mgrpo_jax import advantages, packing, rewards
from mgrpo_jax.agents.team import Team
from mgrpo_jax.alignment import gather
from mgrpo_jax.packing import Credit
from mgrpo_jax.rewards import RoleCalls, Scores
from mgrpo_jax.types import Alignment, RolloutGroup

Align = Callable[..., Alignment]
# One of `advantages`' normalisers; what it is given differs, see `_gains`.
Advantage = Callable[..., Array]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credits:
  """What one step trains on.

  Attributes:
    by_policy: trajectories with advantage and weight.
    advantages: for each group [M] float32, NaN where the update does not see
      the call.
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
    advantage: Advantage,
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
    advantage: one of `advantages`' normalisers; `per_task` for the root where
      it says something about calls only.
    num_slots: D of every role but the root, which has 1.
    seeds: of the alignment's draws, by role, in [0, 2**32).

  Returns:
    The credits.
  """
  gains = _unseen(groups)
  by_policy: dict[str, tuple[Credit, ...]] = {}
  assignments: dict[str, Assignment] = {}
  inherits = advantage is advantages.inherit_parent
  for_calls = inherits or advantage is advantages.per_subtask
  learners = learning(team, trained)
  roots: np.ndarray | None = None
  for role in team.roles:  # the root first
    is_root = role.name == team.root
    learns = role.name in learners
    if not learns and not (is_root and inherits):
      continue
    calls = rewards.by_role(
        groups, scores, role=role.name, max_calls=team.most_calls(role.name)
    )
    assignment = assign(
        calls,
        align=align,
        advantage=advantages.per_task if is_root and for_calls else advantage,
        num_slots=1 if is_root else num_slots,
        seed=seeds[role.name],
        roots=roots,
    )
    roots = assignment.advantages if is_root else roots
    if not learns:
      continue
    scatter(assignment, calls, gains)
    assignments[role.name] = assignment
    earlier = by_policy.get(role.policy, ())
    by_policy[role.policy] = (*earlier, *assignment.credits)
  return Credits(by_policy=by_policy, advantages=gains, assignments=assignments)


def assign(
    calls: RoleCalls,
    *,
    align: Align,
    advantage: Advantage,
    num_slots: int,
    seed: int,
    roots: Float[np.ndarray, "B K 1"] | None = None,
) -> Assignment:
  """Aligns a role's calls and compares each slot with its group.

  Args:
    calls: of B tasks and K rollouts, with their rewards.
    align: one of `alignment`'s strategies.
    advantage: one of `advantages`' normalisers.
    num_slots: D.
    seed: of the alignment's draws, in [0, 2**32).
    roots: advantages of the rollouts' roots, for calls that inherit them.

  Returns:
    The assignment.
  """
  aligned = _aligned(
      np.uint32(seed),
      calls.num_calls,
      calls.rewards,
      calls.subtasks,
      np.zeros((*calls.num_calls.shape, 1), np.float32)
      if roots is None
      else roots,
      align=align,
      advantage=advantage,
      num_slots=num_slots,
  )
  alignment, gathered, gains = jax.device_get(aligned)
  return Assignment(
      credits=packing.fold(calls.calls, alignment, gains),
      alignment=alignment,
      rewards=gathered,
      advantages=gains,
  )


def scatter(
    assignment: Assignment,
    calls: RoleCalls,
    gains: Sequence[np.ndarray],
) -> None:
  """Writes each call's advantage to the call's place in its group.

  Args:
    assignment: of the calls.
    calls: the same that were assigned.
    gains: for each group [M] float, changed in place; calls that fill no slot
      are left as they are.
  """
  index = np.asarray(assignment.alignment.index)
  weight = np.asarray(assignment.alignment.weight)
  for b, k, slot in np.argwhere(weight > 0).tolist():
    position = calls.positions[b][k][int(index[b, k, slot])]
    gains[b][position] = assignment.advantages[b, k, slot]


def _unseen(groups: Sequence[RolloutGroup]) -> tuple[np.ndarray, ...]:
  """NaN for every call."""
  return tuple(np.full(len(g.trajectories), np.nan) for g in groups)


@functools.partial(jax.jit, static_argnames=("align", "advantage", "num_slots"))
def _aligned(
    seed: Int[Array, ""],
    num_calls: Int[Array, "B K"],
    earned: Float[Array, "B K C"],
    subtasks: Int[Array, "B K C"],
    roots: Float[Array, "B K 1"],
    *,
    align: Align,
    advantage: Advantage,
    num_slots: int,
) -> tuple[Alignment, Float[Array, "B K D"], Float[Array, "B K D"]]:
  """Alignment first, then the statistics over it."""
  aligned = align(jax.random.key(seed), num_calls, num_slots=num_slots)
  gathered = gather(earned, aligned)
  return (
      aligned,
      gathered,
      _gains(
          advantage, gathered, aligned.weight, gather(subtasks, aligned), roots
      ),
  )


def _gains(
    advantage: Advantage,
    gathered: Float[Array, "B K D"],
    weights: Float[Array, "B K D"],
    subtasks: Int[Array, "B K D"],
    roots: Float[Array, "B K 1"],
) -> Float[Array, "B K D"]:
  """Calls a normaliser with what it compares."""
  if advantage is advantages.per_subtask:
    return advantage(gathered, weights, subtasks=subtasks)
  if advantage is advantages.inherit_parent:
    return advantage(roots, weights)
  return advantage(gathered, weights)
