"""Arrows 4 and 5 for one role: graded calls in, credited ones out."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mgrpo_jax import packing
from mgrpo_jax.alignment import gather
from mgrpo_jax.packing import Credit
from mgrpo_jax.rewards import RoleCalls
from mgrpo_jax.types import Alignment

Align = Callable[..., Alignment]
Advantage = Callable[[Array, Array], Array]


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


def assign(
    calls: RoleCalls,
    *,
    align: Align,
    advantage: Advantage,
    num_slots: int,
    seed: int,
) -> Assignment:
  """Aligns a role's calls and compares each slot with its group.

  Args:
    calls: of B tasks and K rollouts, with their rewards.
    align: one of `alignment`'s strategies.
    advantage: one of `advantages`' normalisers.
    num_slots: D.
    seed: of the alignment's draws, in [0, 2**32).

  Returns:
    The assignment.
  """
  aligned = _aligned(
      np.uint32(seed),
      calls.num_calls,
      calls.rewards,
      align=align,
      advantage=advantage,
      num_slots=num_slots,
  )
  alignment, rewards, gains = jax.device_get(aligned)
  return Assignment(
      credits=packing.fold(calls.calls, alignment, gains),
      alignment=alignment,
      rewards=rewards,
      advantages=gains,
  )


def scatter(
    assignment: Assignment,
    calls: RoleCalls,
    advantages: Sequence[np.ndarray],
) -> None:
  """Writes each call's advantage to the call's place in its group.

  Args:
    assignment: of the calls.
    calls: the same that were assigned.
    advantages: for each group [M] float, changed in place; calls that fill no
      slot are left as they are.
  """
  index = np.asarray(assignment.alignment.index)
  weight = np.asarray(assignment.alignment.weight)
  for b, k, slot in np.argwhere(weight > 0).tolist():
    position = calls.positions[b][k][int(index[b, k, slot])]
    advantages[b][position] = assignment.advantages[b, k, slot]


@functools.partial(jax.jit, static_argnames=("align", "advantage", "num_slots"))
def _aligned(
    seed: Int[Array, ""],
    num_calls: Int[Array, "B K"],
    rewards: Float[Array, "B K C"],
    *,
    align: Align,
    advantage: Advantage,
    num_slots: int,
) -> tuple[Alignment, Float[Array, "B K D"], Float[Array, "B K D"]]:
  """Alignment first, then the statistics over it."""
  alignment = align(jax.random.key(seed), num_calls, num_slots=num_slots)
  gathered = gather(rewards, alignment)
  return alignment, gathered, advantage(gathered, alignment.weight)
