"""Trajectory alignment: a variable number of calls laid into D slots.

Index arithmetic only. Each strategy says which call stands in each slot and
what the slot weighs; rewards and trajectories are gathered afterwards. The
main agent is called once and has D = 1, so one path serves every role.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mgrpo_jax.types import Alignment


def duplicate_or_drop(
    key: PRNGKeyArray, num_calls: Int[Array, "B K"], *, num_slots: int
) -> Alignment:
  """Fills every slot: copies where calls are few, drops where they are many.

      d ≤ D: the d calls, then D - d draws from them with replacement
      d > D: a random subset of D calls                weight 1 wherever d > 0

  M-GRPO, arXiv 2511.13288, Eq. 11. In expectation over keys a call weighs D/d.

  Args:
    key: randomness of copies and drops.
    num_calls: d, int32; how often the role was called in each rollout.
    num_slots: D ≥ 1.

  Returns:
    The alignment. Indices of calls stand in ascending order, copies last; a
    rollout without calls has index 0 and weight 0 in every slot.

  Raises:
    ValueError: if num_slots < 1.
  """
  _check_num_slots(num_slots)
  subset_key, copy_key = jax.random.split(key)
  real = _slots(num_calls, num_slots) < num_calls[..., None]
  copies = jax.random.randint(
      copy_key,
      (*num_calls.shape, num_slots),
      0,
      jnp.maximum(num_calls, 1)[..., None],
      jnp.int32,
  )
  chosen = _distinct_calls(subset_key, num_calls, num_slots)
  index = jnp.where(real, chosen, copies)
  weight = jnp.broadcast_to(num_calls[..., None] > 0, index.shape)
  return Alignment(
      index=index, weight=weight.astype(jnp.float32), num_calls=num_calls
  )


def mask(
    key: PRNGKeyArray, num_calls: Int[Array, "B K"], *, num_slots: int
) -> Alignment:
  """Leaves slots empty where calls are few: every call counts once.

      weight = 1 on the first min(d, D) slots, 0 on the others

  Args:
    key: randomness of drops, where d > D.
    num_calls: d, int32; how often the role was called in each rollout.
    num_slots: D ≥ 1.

  Returns:
    The alignment; empty slots have index 0.

  Raises:
    ValueError: if num_slots < 1.
  """
  _check_num_slots(num_slots)
  real = _slots(num_calls, num_slots) < num_calls[..., None]
  chosen = _distinct_calls(key, num_calls, num_slots)
  return Alignment(
      index=jnp.where(real, chosen, 0),
      weight=real.astype(jnp.float32),
      num_calls=num_calls,
  )


def inverse_count(
    key: PRNGKeyArray, num_calls: Int[Array, "B K"], *, num_slots: int
) -> Alignment:
  """Lets every rollout count once, without copies.

      weight = 1 / min(d, D) on the first min(d, D) slots, 0 on the others

  Deviation: not in the paper. It is the expectation of `duplicate_or_drop`
  (up to the factor D, which mean losses divide out) without its noise. D does
  not divide out where one policy plays the root as well, whose D is 1: copies
  then let the other roles count D times as much beside it.

  Args:
    key: randomness of drops, where d > D.
    num_calls: d, int32; how often the role was called in each rollout.
    num_slots: D ≥ 1.

  Returns:
    The alignment; empty slots have index 0.

  Raises:
    ValueError: if num_slots < 1.
  """
  masked = mask(key, num_calls, num_slots=num_slots)
  filled = jnp.clip(num_calls, 1, num_slots).astype(jnp.float32)
  return dataclasses.replace(masked, weight=masked.weight / filled[..., None])


def gather(
    values: Float[Array, "B K C"], alignment: Alignment
) -> Float[Array, "B K D"]:
  """Looks up what stands in each slot.

  Args:
    values: one per call, padded to C ≥ max(d) calls.
    alignment: of the same B tasks and K rollouts.

  Returns:
    The values of the slots' calls; arbitrary where the weight is 0.
  """
  return jnp.take_along_axis(values, alignment.index, axis=2)


def suggest_num_slots(
    num_calls: Int[np.ndarray, "*shape"], *, coverage: float
) -> int:
  """Finds the smallest D ≥ 1 with P(d ≤ D) ≥ coverage.

  The paper picks D so that about 0.99 of the rollouts fit (Section 4).

  Args:
    num_calls: observed numbers of calls, any shape, at least one.
    coverage: fraction of rollouts that shall fit, 0 < coverage ≤ 1.

  Returns:
    D.

  Raises:
    ValueError: if nothing was observed or coverage is out of range.
  """
  counts = np.sort(np.asarray(num_calls).ravel())
  if not counts.size:
    raise ValueError("num_calls must hold at least one count, got none")
  if not 0 < coverage <= 1:
    raise ValueError(f"coverage must be in (0, 1], got {coverage}")
  # 0.07 * 100 is 7.000000000000001; that must ask for 7 of 100, not 8.
  needed = int(np.ceil(coverage * counts.size * (1 - 1e-12)))
  return max(1, int(counts[needed - 1]))


def _check_num_slots(num_slots: int) -> None:
  """Raises ValueError unless there is a slot."""
  if num_slots < 1:
    raise ValueError(f"num_slots must be >= 1, got {num_slots}")


def _slots(num_calls: Int[Array, "B K"], num_slots: int) -> Array:
  """Numbers the slots, [1, 1, D] int32."""
  shape = (1,) * num_calls.ndim + (num_slots,)
  return jnp.arange(num_slots, dtype=jnp.int32).reshape(shape)


def _distinct_calls(
    key: PRNGKeyArray, num_calls: Int[Array, "B K"], num_slots: int
) -> Int[Array, "B K D"]:
  """Draws D of d calls without replacement, ascending; 0..D-1 where d ≤ D.

  Floyd's algorithm: uniform over subsets though d is known only at run time.
  """
  keys = jax.random.split(key, num_slots)
  spare = jnp.maximum(num_calls - num_slots, 0)

  def pick(slot: Array, chosen: Array) -> Array:
    last = spare + slot
    draw = jax.random.randint(
        keys[slot], num_calls.shape, 0, last + 1, jnp.int32
    )
    taken = jnp.any(chosen == draw[None], axis=0)
    value = jnp.where(taken, last, draw)
    return jax.lax.dynamic_update_index_in_dim(chosen, value, slot, axis=0)

  def floyd(_: Array, unused: Array) -> Array:
    empty = jnp.full((num_slots, *num_calls.shape), -1, jnp.int32)
    chosen = jax.lax.fori_loop(0, num_slots, pick, empty)
    return jnp.sort(jnp.moveaxis(chosen, 0, -1), axis=-1)

  # Where no d exceeds D there is nothing to draw. A loop of one turn or none,
  # not a cond: a vmapped cond would draw all the same.
  turns = jnp.any(num_calls > num_slots).astype(jnp.int32)
  first = _slots(num_calls, num_slots) + jnp.zeros_like(num_calls)[..., None]
  return jax.lax.fori_loop(0, turns, floyd, first)
