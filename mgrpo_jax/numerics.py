"""Masked and weighted reductions that garbage cannot enter.

A value under a zero mask or weight may be NaN or infinite: it is replaced
before it is used, so neither the result nor a gradient sees it.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Tree = TypeVar("Tree")

# Rewards that differ by no more than this many units in the last place of the
# largest one are equal: they are the same sum, rounded differently.
SPREAD_ULPS = 8
# exp(40)**2 still fits float32, so a gradient norm stays finite.
LOG_RATIO_BOUND = 40.0


def masked(
    values: Float[Array, "*shape"], mask: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """Zeroes what is masked, whatever it holds.

  Args:
    values: any shape, float32.
    mask: same shape; where it is not positive, the value does not count.

  Returns:
    values where the mask is positive, 0 elsewhere.
  """
  return jnp.where(mask > 0, values, 0.0)


def masked_sum(
    values: Float[Array, "*shape"],
    weights: Float[Array, "*shape"],
    *,
    axis: int | tuple[int, ...] | None = None,
) -> Float[Array, "*rest"]:
  """Computes Σ w v over the entries with w > 0.

  Args:
    values: any shape, float32.
    weights: same shape, ≥ 0.
    axis: reduced axes; None for all.

  Returns:
    The sum, without the reduced axes.
  """
  return jnp.sum(masked(values, weights) * weights, axis=axis)


def divide(
    numerator: Float[Array, "*shape"], denominator: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """Divides, with x / 0 = 0 in value and gradient.

  Args:
    numerator: any shape, float32.
    denominator: same shape, ≥ 0.

  Returns:
    The quotient where the denominator is positive, 0 elsewhere.
  """
  positive = denominator > 0
  safe = jnp.where(positive, denominator, 1.0)
  return jnp.where(positive, numerator / safe, 0.0)


def bounded_exp(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Computes exp within float32's range.

  Args:
    log_ratio: nats.

  Returns:
    exp(log_ratio) for |log_ratio| ≤ `LOG_RATIO_BOUND`; constant, with zero
    gradient, beyond.
  """
  return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def unit_scaled(
    values: Float[Array, "*shape"],
    weights: Float[Array, "*shape"],
    *,
    axis: int | tuple[int, ...],
) -> tuple[
    Float[Array, "*shape"], Float[Array, "*group"], Bool[Array, "*group"]
]:
  """Maps each group onto [0, 1], so that its scale costs no precision.

      x = (v - min v) / (max v - min v)      over the entries with w > 0

  Args:
    values: any shape, float32.
    weights: same shape, ≥ 0.
    axis: the axes of a group; kept with size 1 in what is returned of it.

  Returns:
    x, 0 on entries of weight 0 and in groups without spread; the spread
    max v - min v; and whether it is more than rounding of equal values. A
    group with fewer than two weighted entries has none, nor has one whose
    spread float32 cannot hold.
  """
  values = jnp.asarray(values, jnp.float32)
  counted = jnp.asarray(weights) > 0
  high = jnp.max(
      values, axis=axis, keepdims=True, where=counted, initial=-jnp.inf
  )
  low = jnp.min(
      values, axis=axis, keepdims=True, where=counted, initial=jnp.inf
  )
  spread = high - low  # -inf where nothing is counted
  size = jnp.maximum(jnp.abs(high), jnp.abs(low))
  spreads = jnp.isfinite(spread) & (
      spread > SPREAD_ULPS * jnp.finfo(values.dtype).eps * size
  )
  safe = jnp.where(spreads, spread, 1.0)
  scaled = jnp.where(counted & spreads, (values - low) / safe, 0.0)
  return scaled, jnp.where(spreads, spread, 0.0), spreads


def tree_norm(tree: object) -> Float[Array, ""]:
  """Computes the Euclidean norm of all leaves together.

  Args:
    tree: pytree of float32 arrays.

  Returns:
    The square root of the sum of all squares.
  """
  squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def tree_where(condition: Bool[Array, ""], chosen: Tree, other: Tree) -> Tree:
  """Selects one of two equal pytrees.

  Args:
    condition: a scalar.
    chosen: pytree of arrays.
    other: same structure and shapes.

  Returns:
    chosen where the condition holds, else other, in every leaf.
  """
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)
