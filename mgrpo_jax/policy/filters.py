"""Which tokens may be drawn: top-k, top-p and min-p, row by row.

Each is a lower bound on a token's weight, so a row has one bound, the largest
of the three. It is found by bisection over the bits of a float instead of by
sorting the vocabulary: thirty sums a row, and none where no row is filtered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

_BITS = 30  # of a float in [0, 1]: 1.0 is 0x3f800000, below 2^30


@flax.struct.dataclass
class Filters:
  """What may be drawn in each of S rows, on host or device."""

  top_k: Any  # [S] int32, tokens; 0 for all
  top_p: Any  # [S] float32, in (0, 1]; 1 for all
  min_p: Any  # [S] float32, in [0, 1]; 0 for all

  def active(self) -> Bool[Array, " S"]:
    """Says which rows are filtered at all."""
    return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


def none(num_rows: int) -> Filters:
  """Filters that keep everything.

  Args:
    num_rows: S.

  Returns:
    Arrays on the host, to be written to.
  """
  return Filters(
      top_k=np.zeros(num_rows, np.int32),
      top_p=np.ones(num_rows, np.float32),
      min_p=np.zeros(num_rows, np.float32),
  )


def bounds(
    weights: Float[Array, "S V"], filters: Filters
) -> Float[Array, " S"]:
  """Finds the smallest weight that may be drawn in each row.

  In the order of vLLM's sampler, after the temperature: min-p (Nguyen et al.,
  arXiv 2407.01082) keeps tokens of at least `min_p` times the likeliest one's
  probability; top-k the k likeliest; top-p (Holtzman et al., arXiv 1904.09751)
  the smallest set of the likeliest tokens that holds `top_p` of what the other
  two have left. Only top-p depends on the order.

  Deviation: tokens of equal weight are kept or dropped together, where vLLM
  cuts through ties under top-p in the order that its sort leaves.

  Args:
    weights: float32 in [0, 1], with a 1 in each row: exp(score - best score).
    filters: of the rows.

  Returns:
    float32, 0 where everything may be drawn.
  """
  wanted = filters.top_k.astype(jnp.int32)

  def enough(bound: Array) -> Array:
    kept = jnp.sum(weights >= bound[:, None], axis=-1, dtype=jnp.int32)
    return kept >= wanted

  likeliest = jnp.where(wanted > 0, _largest(enough, len(weights)), 0.0)
  bound = jnp.maximum(likeliest, filters.min_p)
  left = _above(weights, bound)
  mass = filters.top_p * jnp.sum(left, axis=-1)

  def heavy(bound: Array) -> Array:
    return jnp.sum(_above(left, bound), axis=-1) >= mass

  nucleus = jnp.where(filters.top_p < 1, _largest(heavy, len(weights)), 0.0)
  return jnp.maximum(bound, jnp.minimum(nucleus, 1.0))  # the likeliest stays


def _above(
    weights: Float[Array, "S V"], bound: Float[Array, " S"]
) -> Float[Array, "S V"]:
  """Weights, 0 where below the row's bound."""
  return jnp.where(weights >= bound[:, None], weights, 0.0)


def _largest(
    holds: Callable[[Array], Array], num_rows: int
) -> Float[Array, " S"]:
  """Finds the largest float in [0, 1] for which something holds in each row.

  Floats that are not negative are ordered as their bits are, and sums of what
  is above a bound never grow with it, however they are rounded.
  """

  def add_bit(index: Array, bits: Array) -> Array:
    tried = bits | (1 << (_BITS - 1 - index))
    bound = jax.lax.bitcast_convert_type(tried, jnp.float32)
    return jnp.where(holds(bound), tried, bits)

  bits = jax.lax.fori_loop(0, _BITS, add_bit, jnp.zeros(num_rows, jnp.int32))
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
