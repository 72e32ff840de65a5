"""The objective's parts: ratios, clipping, KL, aggregations.

All functions act on trajectory-major arrays [N, T]: N trajectories of T token
positions. Where a mask is given, what lies under a zero may be NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgrpo_jax import numerics

Ratio = Callable[[Array, Array, Array], Array]
KL = Callable[[Array, Array], Array]


@flax.struct.dataclass
class Totals:
  """What a whole optimizer batch is divided by, whatever its micro-batches."""

  trajectories: Any  # [] float32, Σ weight
  tokens: Any  # [] float32, Σ weight · sampled tokens
  context_tokens: Any  # [] float32, Σ weight · other predicted tokens


def token_ratio(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    mask: Float[Array, "N T"],
) -> Float[Array, "N T"]:
  """Computes each token's own probability ratio.

      ρ_t = exp(log π(t) - log π_old(t))

  GRPO (Shao et al., arXiv 2402.03300) and the public MrlX code.

  Args:
    logprobs: float32, nats, of the policy being trained.
    old_logprobs: float32, nats, of the policy before the batch's updates.
    mask: float32, 1 on sampled tokens.

  Returns:
    ρ, float32; 1 where the mask is 0. Constant beyond
    |log ρ| = `numerics.LOG_RATIO_BOUND`.
  """
  return numerics.bounded_exp(_log_ratio(logprobs, old_logprobs, mask))


def sequence_ratio(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    mask: Float[Array, "N T"],
) -> Float[Array, "N T"]:
  """Computes the probability ratio of the whole trajectory.

      ρ = Π_t π(t) / π_old(t) = exp Σ_t (log π(t) - log π_old(t))

  M-GRPO, arXiv 2511.13288, Eq. 14–19; summed in logarithms.

  Args:
    logprobs: float32, nats, of the policy being trained.
    old_logprobs: float32, nats, of the policy before the batch's updates.
    mask: float32, 1 on sampled tokens.

  Returns:
    ρ, float32, the same at every token of a trajectory. Constant beyond
    |log ρ| = `numerics.LOG_RATIO_BOUND`.
  """
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  total = jnp.sum(log_ratio, axis=1, keepdims=True)
  return _at_every_token(numerics.bounded_exp(total), log_ratio)


def geometric_ratio(
    logprobs: Float[Array, "N T"],
    old_logprobs: Float[Array, "N T"],
    mask: Float[Array, "N T"],
) -> Float[Array, "N T"]:
  """Computes the trajectory's ratio per token, the geometric mean.

      ρ = exp(1/n Σ_t (log π(t) - log π_old(t))),   n sampled tokens

  GSPO (Zheng et al., arXiv 2507.18071, Eq. 7).

  Args:
    logprobs: float32, nats, of the policy being trained.
    old_logprobs: float32, nats, of the policy before the batch's updates.
    mask: float32, 1 on sampled tokens.

  Returns:
    ρ, float32, the same at every token of a trajectory; 1 where it has no
    sampled token. Constant beyond |log ρ| = `numerics.LOG_RATIO_BOUND`.
  """
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  total = jnp.sum(log_ratio, axis=1, keepdims=True)
  mean = numerics.divide(total, jnp.sum(mask, axis=1, keepdims=True))
  return _at_every_token(numerics.bounded_exp(mean), log_ratio)


def _log_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
  """Subtracts log-probabilities where the mask is 1."""
  return numerics.masked(logprobs, mask) - numerics.masked(old_logprobs, mask)


def _at_every_token(values: Array, like: Array) -> Array:
  """Repeats one value per trajectory, [N, 1] -> [N, T], keeping shards."""
  return values + jnp.zeros_like(like)


def clipped_surrogate(
    ratio: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Array, "N T"]:
  """Computes the pessimistic objective, to be maximised.

      min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A)

  M-GRPO, arXiv 2511.13288, Eq. 14–19; PPO (arXiv 1707.06347, Eq. 7).

  Args:
    ratio: ρ, float32.
    advantages: A, float32, same shape.
    clip_low: ε_low, in 0..1.
    clip_high: ε_high, ≥ 0.

  Returns:
    The objective of each token, same shape. At a tie, as at ρ = 1, the
    gradient is that of ρ A.
  """
  plain = ratio * advantages
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
  return jnp.where(plain <= clipped, plain, clipped)


def dual_clipped_surrogate(
    ratio: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    *,
    clip_low: float,
    clip_high: float,
    floor: float,
) -> Float[Array, "N T"]:
  """Bounds the clipped objective below where the advantage is negative.

      max(clipped, c A)   where A < 0, else clipped

  Ye et al., arXiv 1912.09729: a token that became much likelier, though it was
  bad, no longer dominates the batch.

  Args:
    ratio: ρ, float32.
    advantages: A, float32, same shape.
    clip_low: ε_low, in 0..1.
    clip_high: ε_high, ≥ 0.
    floor: c, above 1 + ε_high.

  Returns:
    The objective of each token, same shape.
  """
  clipped = clipped_surrogate(
      ratio, advantages, clip_low=clip_low, clip_high=clip_high
  )
  least = floor * advantages
  return jnp.where((advantages < 0) & (clipped < least), least, clipped)


def cispo_surrogate(
    ratio: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Array, "N T"]:
  """Clips the weight of a token's gradient instead of dropping the gradient.

      sg(clip(ρ, 1 - ε_low, 1 + ε_high)) A log π

  CISPO (MiniMax, arXiv 2506.13585, Eq. 4–5).

  Deviation: log π is written as ρ / sg(ρ), whose gradient is that of log ρ, for
  ratios of tokens that of log π; its value is 1, so that the objective has the
  scale of the others'.

  Args:
    ratio: ρ, float32.
    advantages: A, float32, same shape.
    clip_low: ε_low, in 0..1; 1 leaves small ratios alone, as the paper does.
    clip_high: ε_high, ≥ 0.

  Returns:
    The objective of each token, same shape.
  """
  weight = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  here = ratio / jax.lax.stop_gradient(ratio)
  return jax.lax.stop_gradient(weight) * advantages * here


def kl_k1(
    logprobs: Float[Array, "N T"], ref_logprobs: Float[Array, "N T"]
) -> Float[Array, "N T"]:
  """Estimates KL(π ‖ π_ref) from samples of π, unbiased, of either sign.

      k1 = log π - log π_ref

  A measure, not a regulariser: its gradient is ∇ log π, whatever the reference
  is, and has mean zero over samples of π. As a loss use `kl_k2`.

  Args:
    logprobs: float32, nats, of the sampled tokens under π.
    ref_logprobs: float32, nats, under the reference.

  Returns:
    Same shape, nats.
  """
  return logprobs - ref_logprobs


def kl_k2(
    logprobs: Float[Array, "N T"], ref_logprobs: Float[Array, "N T"]
) -> Float[Array, "N T"]:
  """Estimates KL(π ‖ π_ref) from samples of π, ≥ 0, biased.

      k2 = (log π - log π_ref)² / 2

  Its gradient, (log π - log π_ref) ∇ log π, has the mean ∇ KL(π ‖ π_ref) over
  samples of π: as a loss it is what pulls towards the reference, token by
  token.

  Args:
    logprobs: float32, nats, of the sampled tokens under π.
    ref_logprobs: float32, nats, under the reference.

  Returns:
    Same shape, nats.
  """
  return jnp.square(logprobs - ref_logprobs) / 2


def kl_k3(
    logprobs: Float[Array, "N T"], ref_logprobs: Float[Array, "N T"]
) -> Float[Array, "N T"]:
  """Estimates KL(π ‖ π_ref) from samples of π, unbiased and ≥ 0.

      k3 = r - 1 - log r,   r = π_ref / π

  Args:
    logprobs: float32, nats, of the sampled tokens under π.
    ref_logprobs: float32, nats, under the reference.

  Returns:
    Same shape, nats. log r is constant beyond `numerics.LOG_RATIO_BOUND`.
  """
  bound = numerics.LOG_RATIO_BOUND
  log_r = jnp.clip(ref_logprobs - logprobs, -bound, bound)
  # expm1 keeps the digits that exp(log r) - 1 loses near equality; the maximum
  # removes the last bit's rounding.
  return jnp.maximum(jnp.expm1(log_r) - log_r, 0.0)


def token_mean(
    values: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    weight: Float[Array, " N"],
    *,
    totals: Totals | None = None,
) -> Float[Array, ""]:
  """Averages over tokens: a long trajectory counts for more.

      Σ_n w_n Σ_t m v / Σ_n w_n Σ_t m

  Args:
    values: v, float32.
    mask: m, float32, 1 on sampled tokens.
    weight: w, float32, ≥ 0, of each trajectory.
    totals: of the whole optimizer batch, when these rows are part of one;
      None if they are all of it.

  Returns:
    Scalar; summed over micro-batches it is the whole batch's mean.
  """
  whole = _totals(mask, weight) if totals is None else totals
  sums = numerics.masked_sum(values, mask, axis=1)
  return numerics.divide(numerics.masked_sum(sums, weight), whole.tokens)


def sequence_mean_token_mean(
    values: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    weight: Float[Array, " N"],
    *,
    totals: Totals | None = None,
) -> Float[Array, ""]:
  """Averages over tokens, then over trajectories: lengths do not matter.

      Σ_n w_n (Σ_t m v / Σ_t m) / Σ_n w_n

  M-GRPO, arXiv 2511.13288, Eq. 14–19, with the ratio of the sequence.

  Args:
    values: v, float32.
    mask: m, float32, 1 on sampled tokens; an empty row's mean is 0.
    weight: w, float32, ≥ 0, of each trajectory.
    totals: of the whole optimizer batch, when these rows are part of one;
      None if they are all of it.

  Returns:
    Scalar; summed over micro-batches it is the whole batch's mean.
  """
  sums = numerics.masked_sum(values, mask, axis=1)
  means = numerics.divide(sums, jnp.sum(mask, axis=1))
  return _trajectory_mean(means, mask, weight, totals)


def sequence_mean_token_sum(
    values: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    weight: Float[Array, " N"],
    *,
    totals: Totals | None = None,
) -> Float[Array, ""]:
  """Sums over tokens and averages over trajectories.

      Σ_n w_n Σ_t m v / Σ_n w_n

  Args:
    values: v, float32.
    mask: m, float32, 1 on sampled tokens.
    weight: w, float32, ≥ 0, of each trajectory.
    totals: of the whole optimizer batch, when these rows are part of one;
      None if they are all of it.

  Returns:
    Scalar; summed over micro-batches it is the whole batch's mean.
  """
  sums = numerics.masked_sum(values, mask, axis=1)
  return _trajectory_mean(sums, mask, weight, totals)


def sequence_mean_token_sum_norm(
    values: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    weight: Float[Array, " N"],
    *,
    max_tokens: float,
    totals: Totals | None = None,
) -> Float[Array, ""]:
  """Sums over tokens, divides by a constant, averages over trajectories.

      Σ_n w_n (Σ_t m v / L) / Σ_n w_n

  Dr. GRPO (Liu et al., arXiv 2503.20783): no bias towards short answers, at
  the scale of a mean.

  Args:
    values: v, float32.
    mask: m, float32, 1 on sampled tokens.
    weight: w, float32, ≥ 0, of each trajectory.
    max_tokens: L, > 0, the token budget of a trajectory.
    totals: of the whole optimizer batch, when these rows are part of one;
      None if they are all of it.

  Returns:
    Scalar; summed over micro-batches it is the whole batch's mean.

  Raises:
    ValueError: if max_tokens is not positive.
  """
  if not max_tokens > 0:
    raise ValueError(f"max_tokens must be > 0, got {max_tokens!r}")
  total = sequence_mean_token_sum(values, mask, weight, totals=totals)
  return total / max_tokens


def _totals(mask: Array, weight: Array) -> Totals:
  """Counts rows that are a whole batch by themselves."""
  lengths = jnp.sum(mask, axis=1)
  return Totals(
      trajectories=jnp.sum(weight),
      tokens=jnp.sum(weight * lengths),
      context_tokens=jnp.zeros_like(weight, shape=()),
  )


def _trajectory_mean(
    values: Array, mask: Array, weight: Array, totals: Totals | None
) -> Array:
  """Averages one value per trajectory, by weight."""
  whole = _totals(mask, weight) if totals is None else totals
  return numerics.divide(
      numerics.masked_sum(values, weight), whole.trajectories
  )
