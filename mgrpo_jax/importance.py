"""Off-policy correction: what a sampled token counts, trainer over sampler.

Engines round otherwise than the trainer, and may have sampled from older
weights. Functions act on trajectory-major arrays [N, T], like those of
`losses`; what lies under a zero of the mask may be NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgrpo_jax import losses


def by_token(
    old_logprobs: Float[Array, "N T"],
    sampler_logprobs: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    *,
    cap: float,
) -> Float[Array, "N T"]:
  """Weighs each token by how much likelier the trainer found it, truncated.

      min(exp(log π_old - log π_sampler), cap)

  Args:
    old_logprobs: float32, nats, trainer's, before the batch's updates.
    sampler_logprobs: float32, nats, recorded when the token was sampled.
    mask: float32, 1 on sampled tokens.
    cap: > 0, largest weight.

  Returns:
    Weights, float32, without gradient.
  """
  ratio = losses.token_ratio(old_logprobs, sampler_logprobs, mask)
  return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def by_sequence(
    old_logprobs: Float[Array, "N T"],
    sampler_logprobs: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    *,
    cap: float,
) -> Float[Array, "N T"]:
  """Weighs each trajectory by how much likelier the trainer found it.

      min(exp Σ_t (log π_old - log π_sampler), cap)

  Args:
    old_logprobs: float32, nats, trainer's, before the batch's updates.
    sampler_logprobs: float32, nats, recorded when the token was sampled.
    mask: float32, 1 on sampled tokens.
    cap: > 0, largest weight.

  Returns:
    Weights, float32, without gradient, the same at every token of a
    trajectory.
  """
  ratio = losses.sequence_ratio(old_logprobs, sampler_logprobs, mask)
  return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def reject_sequences(
    old_logprobs: Float[Array, "N T"],
    sampler_logprobs: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    *,
    cap: float,
) -> Float[Array, "N T"]:
  """Drops trajectories on which trainer and sampler disagree.

      1 if 1/cap ≤ exp Σ_t (log π_old - log π_sampler) ≤ cap, else 0

  Args:
    old_logprobs: float32, nats, trainer's, before the batch's updates.
    sampler_logprobs: float32, nats, recorded when the token was sampled.
    mask: float32, 1 on sampled tokens.
    cap: ≥ 1, largest ratio either way.

  Returns:
    Weights 0 or 1, float32, the same at every token of a trajectory.
  """
  ratio = losses.sequence_ratio(old_logprobs, sampler_logprobs, mask)
  kept = (ratio <= cap) & (ratio >= 1 / cap)
  return kept.astype(ratio.dtype)
