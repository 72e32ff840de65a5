"""Our advantages in other people's layout, and in their units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.bench.peers.compare import Batch, Numbers
from mgrpo_jax import critic


def advantages(
    function: Callable[..., Any], rewards: Numbers, weights: Numbers
) -> Numbers:
  """Calls a normaliser on groups [B, K].

  Args:
    function: the normaliser.
    rewards: [B, K].
    weights: [B, K], ≥ 0.

  Returns:
    A, [B, K].
  """
  arrays = (
      np.asarray(array, np.float32)[..., None] for array in (rewards, weights)
  )
  return np.asarray(function(*arrays))[..., 0]


def rescaled(
    found: Numbers, rewards: Numbers, weights: Numbers, *, epsilon: float
) -> Numbers:
  """Turns A = deviation / std_n into deviation / (std_{n-1} + ε), by groups.

  Args:
    found: A, [B, K].
    rewards: [B, K].
    weights: [B, K], 1 for members.
    epsilon: ε.

  Returns:
    [B, K].
  """
  population, sample = deviations(rewards, weights)
  return found * population / (sample + epsilon)


def deviations(rewards: Numbers, weights: Numbers) -> tuple[Numbers, Numbers]:
  """Population and sample standard deviation of every group, [B, 1]."""
  count = weights.sum(1, keepdims=True)
  safe = np.maximum(count, 1)
  mean = (rewards * weights).sum(1, keepdims=True) / safe
  squares = ((rewards - mean) ** 2 * weights).sum(1, keepdims=True)
  return np.sqrt(squares / safe), np.sqrt(squares / np.maximum(count - 1, 1))


def spread(rewards: Numbers, weights: Numbers) -> Numbers:
  """Which groups have two members that differ, [B] bool."""
  high = np.where(weights > 0, rewards, -np.inf).max(1)
  low = np.where(weights > 0, rewards, np.inf).min(1)
  return high > low


def token_advantages(
    batch: Batch, rewards: Numbers, *, discount: float, trace: float
) -> Numbers:
  """Our generalised advantages, [N, T], float32.

  Args:
    batch: values and mask.
    rewards: [N].
    discount: γ.
    trace: λ.

  Returns:
    A, 0 where the mask is 0.
  """
  arrays = (rewards, batch.old_values, batch.mask)
  single = [jnp.asarray(array, jnp.float32) for array in arrays]
  return np.asarray(
      critic.generalised_advantages(*single, discount=discount, trace=trace)
  )


def at_last_token(batch: Batch, rewards: Numbers) -> Numbers:
  """Puts each reward at its trajectory's last sampled token, [N, T]."""
  placed = np.zeros(batch.mask.shape)
  length = batch.mask.shape[1]
  last = length - 1 - np.argmax(batch.mask[:, ::-1] > 0, axis=1)
  rows = np.flatnonzero(batch.filled)
  placed[rows, last[rows]] = rewards[rows]
  return placed


def whitened(values: Numbers, mask: Numbers) -> Numbers:
  """Standardises with the sample deviation over all tokens, ε = 1e-8."""
  count = mask.sum()
  mean = (values * mask).sum() / count
  variance = ((values - mean) ** 2 * mask).sum() / (count - 1)
  return (values - mean) / np.sqrt(variance + 1e-8) * mask
