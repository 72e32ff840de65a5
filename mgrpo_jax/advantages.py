"""Group-relative advantages.

Each function compares every slot with its group and differs in what the group
is, or in how the comparison is scaled. All act on aligned rewards [B, K, D]
with the alignment's weights; the main agent has D = 1. A slot of weight 0, a
group without spread and a group with fewer than two weighted members get 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax import numerics

PER_TASK = (1, 2)  # axes of a group: all K·D slots of a task
PER_CALL_INDEX = (1,)
PER_BATCH = (0, 1, 2)


def per_task(
    rewards: Float[Array, "B K D"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Standardises rewards over the aligned slots of a task.

      A = (R - mean_w R) / std_w R,   group: all K·D slots of the task

  M-GRPO, arXiv 2511.13288, Eq. 9–13. The standard deviation is the
  population's.

  Deviation: nothing is added to it; a group without spread gets zeros.

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    A, float32.
  """
  return _standardised(rewards, weights, PER_TASK)


def mean_only(
    rewards: Float[Array, "B K D"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Subtracts the task's mean reward and does not divide.

      A = R - mean_w R

  Dr. GRPO (Liu et al., arXiv 2503.20783): without the division, easy and hard
  tasks weigh the same per unit of reward.

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    A, float32, in units of reward.
  """
  deviation, spread, _ = _deviation(rewards, weights, PER_TASK)
  return deviation * spread


def leave_one_out(
    rewards: Float[Array, "B K D"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Compares each slot with the weighted mean of the other slots of its task.

      A_i = R_i - Σ_{j≠i} w_j R_j / Σ_{j≠i} w_j

  RLOO (Ahmadian et al., arXiv 2402.14740). Copies made by the alignment are
  slots of their own: with `duplicate_or_drop` a call's copies stay in its
  baseline.

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    A, float32, in units of reward.
  """
  deviation, spread, spreads = _deviation(rewards, weights, PER_TASK)
  total = jnp.sum(weights, axis=PER_TASK, keepdims=True)
  others = jnp.where(spreads, total - weights, 0.0)
  # R_i - mean of the others = (R_i - mean of all) · Σw / (Σw - w_i).
  return numerics.divide(deviation * spread * total, others)


def other_rollouts(
    rewards: Float[Array, "B K D"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Compares each slot with the slots of the task's other rollouts.

      A_kd = R_kd - Σ_{j≠k} Σ_e w_je R_je / Σ_{j≠k} Σ_e w_je

  Deviation: not in the paper. The baseline knows nothing of the slot's own
  rollout, so it is unbiased even where calls of one rollout share a reward or
  are copied (docs/estimators.md); of the root it is `leave_one_out`.

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    A, float32, in units of reward; 0 where no other rollout has a slot.
  """
  scaled, spread, _ = numerics.unit_scaled(rewards, weights, axis=PER_TASK)
  mass = jnp.sum(weights, axis=2, keepdims=True)
  earned = jnp.sum(scaled * weights, axis=2, keepdims=True)
  others = jnp.sum(mass, axis=1, keepdims=True) - mass
  baseline = numerics.divide(
      jnp.sum(earned, axis=1, keepdims=True) - earned, others
  )
  gains = jnp.where(others > 0, (scaled - baseline) * spread, 0.0)
  return numerics.masked(gains, weights)


def per_call_index(
    rewards: Float[Array, "B K D"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Standardises rewards over the K rollouts, each slot position by itself.

      A = (R - mean_w R) / std_w R,   group: slot d of the task's K rollouts

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    A, float32.
  """
  return _standardised(rewards, weights, PER_CALL_INDEX)


def per_batch(
    rewards: Float[Array, "B K D"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Standardises rewards over all slots of all tasks.

      A = (R - mean_w R) / std_w R,   group: the whole block of B tasks

  REINFORCE++ (Hu et al., arXiv 2501.03262): one baseline and one spread.

  Deviation: of all calls of a step; `per_block` has blocks in arrival order.

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    A, float32.
  """
  return _standardised(rewards, weights, PER_BATCH)


def per_block(
    rewards: Float[Array, "B K D"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Standardises rewards over blocks of K slots in order of arrival.

      A = (R - mean_w R) / std_w R,   group: the slots that count with the
                                      numbers nK to (n + 1)K - 1 in the queue

  What the public MrlX code does with its sub-agent's calls, for comparison: a
  rollout's calls queue up when it ends and are taken as many at a time as a
  task has rollouts, whichever tasks they are from.

  Deviation: rollouts end in the order of their numbers, one of each task after
  the other, for by the clock a seed would not fix the result. The last block
  may be short of K; there it waits for the calls of the next step.

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    A, float32.
  """
  b, k, d = rewards.shape
  if not rewards.size:
    return rewards

  def queued(values: Array) -> Array:
    return jnp.swapaxes(values, 0, 1).ravel()

  counted = queued(weights) > 0
  last = jnp.sum(counted) + jnp.cumsum(~counted)
  place = jnp.where(counted, jnp.cumsum(counted), last) - 1

  def in_blocks(values: Array) -> Array:
    return (
        jnp.zeros(b * k * d, jnp.float32)
        .at[place]
        .set(queued(values))
        .reshape(-1, k)
    )

  blocks = _standardised(in_blocks(rewards), in_blocks(weights), (1,))
  gains = blocks.ravel()[place]
  return jnp.swapaxes(gains.reshape(k, b, d), 0, 1)


def per_subtask(
    rewards: Float[Array, "B K D"],
    weights: Float[Array, "B K D"],
    *,
    subtasks: Int[Array, "B K D"],
) -> Float[Array, "B K D"]:
  """Standardises rewards over the attempts at the same sub-task.

      A = (R - mean_w R) / std_w R,   group: slots of equal sub-task

  An attempt is compared only with what was asked the same way: neither how
  hard the sub-task is, nor what became of the rollout, is in the comparison.

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.
    subtasks: number of the sub-task in its rollout, of the call in each slot;
      from 0 without gaps, for time grows with the largest.

  Returns:
    A, float32; 0 where a sub-task was attempted once.
  """

  def of_subtask(number: Array, found: Array) -> Array:
    asked = subtasks == number
    attempts = jnp.where(asked, weights, 0.0)
    return jnp.where(asked, _standardised(rewards, attempts, (-1,)), found)

  # One after the other: all at once would be D × D numbers a rollout.
  count = jnp.max(jnp.where(weights > 0, subtasks, -1), initial=-1) + 1
  none = jnp.zeros(rewards.shape, jnp.float32)
  return jax.lax.fori_loop(0, count, of_subtask, none)


def inherit_parent(
    parents: Float[Array, "B K 1"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Gives every call the advantage of the rollout that it belongs to.

  MATPO (Mo et al., arXiv 2510.04678): a caller's advantage is its callees',
  all the way down from the root, whose rewards are compared `per_task`.

  Args:
    parents: the roots' advantages, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    A, float32.
  """
  return numerics.masked(parents + jnp.zeros_like(weights), weights)


def plain(
    rewards: Float[Array, "B K D"], weights: Float[Array, "B K D"]
) -> Float[Array, "B K D"]:
  """Compares with nothing: rewards as they are, for a critic to judge.

  Args:
    rewards: R, float32.
    weights: w, float32, ≥ 0, from the alignment.

  Returns:
    R, float32, in units of reward.
  """
  return numerics.masked(rewards, weights)


def _deviation(
    rewards: Array, weights: Array, axis: tuple[int, ...]
) -> tuple[Array, Array, Array]:
  """Computes (R - mean) / spread, the spread, and whether there is one."""
  scaled, spread, spreads = numerics.unit_scaled(rewards, weights, axis=axis)
  mean = _mean(scaled, weights, axis)
  return numerics.masked(scaled - mean, weights), spread, spreads


def _standardised(
    rewards: Array, weights: Array, axis: tuple[int, ...]
) -> Array:
  """Divides the deviations by their population standard deviation."""
  deviation, _, _ = _deviation(rewards, weights, axis)
  variance = _mean(deviation**2, weights, axis)
  return numerics.divide(deviation, jnp.sqrt(variance))


def _mean(values: Array, weights: Array, axis: tuple[int, ...]) -> Array:
  """Computes the weighted mean, keeping the reduced axes."""
  total = jnp.sum(weights, axis=axis, keepdims=True)
  return numerics.divide(
      jnp.sum(values * weights, axis=axis, keepdims=True), total
  )
