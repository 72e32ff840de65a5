"""What the gradient of one batch is on average, and how it scatters.

Batches pass through the library's own advantages and loss. The mean and
covariance of the gradient that comes out are exact sums where every batch is
listed, and estimates where batches are random.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mgrpo_jax import losses
from mgrpo_jax.comparison import Comparison
from mgrpo_jax.testing.batches import Enumerated, Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
  """Of a batch's gradient, float64.

  Attributes:
    mean: [P].
    covariance: [P, P], of one batch.
    draws: trace of the part of the covariance that the alignment's draws
      make, the rollouts held fixed.
    samples: batches that were measured; None where the moments are exact.
  """

  mean: np.ndarray
  covariance: np.ndarray
  draws: float
  samples: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
  """A gradient beside what it should be on average, g; errors are standard.

  Attributes:
    scale: g · mean / |g|², what a step along g is multiplied by.
    scale_error: 0 where the moments are exact.
    cosine: between mean and g.
    angle_error: of the mean's direction, radians; 0 where exact.
    noise: trace of the covariance over |mean|²: so many batches must be
      averaged until noise and signal are equal.
    draws: the share of that noise which the alignment's draws make.
  """

  scale: float
  scale_error: float
  cosine: float
  angle_error: float
  noise: float
  draws: float


def gradients(slots: Slots, *, comparison: Comparison) -> Float[Array, "G P"]:
  """Computes the ascent direction of each batch with the library's loss.

  The ratio is 1, as in the first update on a batch; a call is one sampled
  token. The slope of `losses` by each call's log-probability is chained with
  the call's score.

  Args:
    slots: of the batches.
    comparison: what slots are compared with.

  Returns:
    The gradients, flat.
  """

  def one(batch: Slots) -> Array:
    weights = batch.weights
    roots = comparison.root(batch.roots, jnp.ones_like(batch.roots))
    gains = comparison.of_calls(
        batch.rewards, weights, subtasks=batch.subtasks, roots=roots
    ).reshape(-1, 1)
    old = jnp.zeros_like(gains)

    def objective(logprobs: Array) -> Array:
      mask = jnp.ones_like(old)
      ratio = losses.sequence_ratio(logprobs, old, mask)
      values = losses.clipped_surrogate(
          ratio, gains, clip_low=0.2, clip_high=0.2
      )
      return losses.sequence_mean_token_mean(values, mask, weights.reshape(-1))

    slopes = jax.grad(objective)(old).reshape(weights.shape)
    return jnp.einsum("bkd,bkdp->p", slopes, batch.scores)

  found: Array = jax.vmap(one)(slots)
  return found


def given_rollouts(
    gradients: Float[np.ndarray, "G P"], batches: Enumerated
) -> tuple[Float[np.ndarray, "U P"], Float[np.ndarray, " U"]]:
  """Averages over the alignment's draws, the rollouts held fixed.

  Args:
    gradients: of the batches.
    batches: with their probabilities.

  Returns:
    The mean of each of U sets of rollouts, whatever the alignment in the same
    order, and the probability of the set.
  """
  values = np.asarray(gradients, np.float64)
  mass = np.bincount(batches.rollouts, batches.chance)
  sums = np.zeros((len(mass), values.shape[1]))
  np.add.at(sums, batches.rollouts, batches.chance[:, None] * values)
  return sums / np.maximum(mass, np.finfo(np.float64).tiny)[:, None], mass


def exact_moments(
    gradients: Float[np.ndarray, "G P"], batches: Enumerated
) -> Moments:
  """Sums over every batch.

  Args:
    gradients: of the batches.
    batches: with their probabilities.

  Returns:
    The moments.
  """
  values = np.asarray(gradients, np.float64)
  chance = batches.chance
  mean = chance @ values
  second = np.einsum("g,gp,gq->pq", chance, values, values)
  means, mass = given_rollouts(values, batches)
  kept = float(mass @ np.sum(means**2, axis=1))
  return Moments(
      mean=mean,
      covariance=second - np.outer(mean, mean),
      draws=max(float(np.trace(second)) - kept, 0.0),
      samples=None,
  )


def sampled_moments(
    gradients: Float[np.ndarray, "G P"], again: Float[np.ndarray, "G P"]
) -> Moments:
  """Estimates the moments from random batches.

  Args:
    gradients: of the batches.
    again: of the same rollouts under other draws of the alignment.

  Returns:
    The moments.
  """
  values = np.asarray(gradients, np.float64)
  differences = values - np.asarray(again, np.float64)
  return Moments(
      mean=values.mean(0),
      covariance=np.cov(values, rowvar=False),
      draws=float(np.mean(np.sum(differences**2, axis=1)) / 2),
      samples=len(values),
  )


def compare(moments: Moments, target: Float[np.ndarray, " P"]) -> Standing:
  """Sets moments beside the gradient that they should have on average.

  Args:
    moments: of a batch's gradient.
    target: g, not 0.

  Returns:
    Where it stands.
  """
  target = np.asarray(target, np.float64)
  mean, covariance = moments.mean, moments.covariance
  size, length = (float(np.linalg.norm(x)) for x in (target, mean))
  along = float(target @ covariance @ target) / size**2
  across = max(float(np.trace(covariance)) - along, 0.0)
  samples = math.inf if moments.samples is None else moments.samples
  return Standing(
      scale=float(target @ mean) / size**2,
      scale_error=math.sqrt(along / samples) / size,
      cosine=float(target @ mean) / (size * length),
      angle_error=math.sqrt(across / samples) / length,
      noise=float(np.trace(covariance)) / length**2,
      draws=moments.draws / float(np.trace(covariance)),
  )
