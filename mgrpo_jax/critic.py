"""A critic: what it makes of rewards, and what it is trained with.

Functions act on trajectory-major arrays [N, T], like those of `losses`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgrpo_jax import fields, numerics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critic:
  """How a value head takes part in an objective (PPO, arXiv 1707.06347).

  Attributes:
    coefficient: of the critic's error beside the policy's objective, > 0.
    discount: γ, in (0, 1]; 1 unless time costs.
    trace: λ, in [0, 1].
    clip: ε, how far a value moves in an update before it stops to gain, > 0.

  Raises:
    ValueError: if a field is out of range, naming the field.
  """

  coefficient: float
  discount: float
  trace: float
  clip: float

  def __post_init__(self) -> None:
    """Checks every field."""
    for name in ("coefficient", "clip"):
      value = getattr(self, name)
      fields.check(name, value, 0 < value < math.inf, "> 0")
    fields.check("discount", self.discount, 0 < self.discount <= 1, "in (0, 1]")
    fields.check("trace", self.trace, 0 <= self.trace <= 1, "in [0, 1]")


def generalised_advantages(
    rewards: Float[Array, " N"],
    values: Float[Array, "N T"],
    mask: Float[Array, "N T"],
    *,
    discount: float,
    trace: float,
) -> Float[Array, "N T"]:
  """Estimates each sampled token's advantage from a critic's values.

      δ_i = r_i + γ V_{i+1} - V_i,   A_i = δ_i + γ λ A_{i+1}

  over the sampled tokens i of a trajectory; r is the reward at the last one and
  0 before, V beyond it is 0. Schulman et al., arXiv 1506.02438, Eq. 16.

  Args:
    rewards: of each trajectory, float32.
    values: V, float32, expected reward before each token.
    mask: float32, 1 on sampled tokens.
    discount: γ, in (0, 1]; 1 unless time costs.
    trace: λ, in [0, 1].

  Returns:
    A, float32, in units of reward, without gradient; 0 where the mask is 0.
    A plus V is what the critic should have expected.
  """

  def step(
      after: tuple[Array, Array, Array], token: tuple[Array, Array]
  ) -> tuple[tuple[Array, Array, Array], Array]:
    reward, value_after, gain_after = after
    value, sampled = token
    error = reward + discount * value_after - value
    gain = error + discount * trace * gain_after
    return jax.tree.map(
        functools.partial(jnp.where, sampled > 0),
        (jnp.zeros_like(reward), value, gain),
        after,
    ), jnp.where(sampled > 0, gain, 0.0)

  values = jax.lax.stop_gradient(numerics.masked(values, mask))
  nothing = 0.0 * values[:, 0]
  _, gains = jax.lax.scan(
      step, (rewards, nothing, nothing), (values.T, mask.T), reverse=True
  )
  return gains.T


def clipped_value_loss(
    values: Float[Array, "N T"],
    old_values: Float[Array, "N T"],
    returns: Float[Array, "N T"],
    *,
    clip: float,
) -> Float[Array, "N T"]:
  """Computes a critic's squared error, pessimistic about large moves.

      1/2 max((V - G)², (V_old + clip(V - V_old, -ε, ε) - G)²)

  PPO2 (Dhariwal et al., OpenAI Baselines, 2017).

  Args:
    values: V, float32.
    old_values: V_old, float32, before the batch's updates.
    returns: G, float32.
    clip: ε, > 0, in units of reward.

  Returns:
    The error of each token, same shape.
  """
  near = old_values + jnp.clip(values - old_values, -clip, clip)
  worse = jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
  return worse / 2
