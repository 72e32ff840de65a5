"""Products of tokens with kernels, in any of the orders kernels are kept in.

Kernels are [*inputs, *outputs], and that is how they are trained and saved. On
CPUs XLA multiplies few tokens with large kernels 1.3 to 1.6 times faster where
the outputs come first and the tokens are columns (measured, see
experiments/README.md). So a sampler on a CPU may keep kernels turned, and those
that meet the same tokens joined (`arranging`). In bfloat16 it is faster by far
where tokens are rows and sums float32, which CPUs with units for it give as
they are. In float32 it may also keep them in tiles, for products that are not
XLA's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mgrpo_jax import sharding
from mgrpo_jax.policy.native import tiles
from mgrpo_jax.policy.native.tiles import Tiled

FEW = 128  # tokens, at most, that are multiplied as columns
# The same for logits: turning those of more costs as much as it gains.
FEW_FOR_LOGITS = 32


@flax.struct.dataclass
class Turned:
  """Kernels [*inputs, *outputs] of the same inputs as a matrix, outputs first.

  Every product begins and ends with a moment in which not all cores have work,
  so kernels that meet the same tokens are one matrix.
  """

  matrix: Any  # [sum of the kernels' outputs, inputs]
  outputs: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)


Arranged = Turned | Tiled


def multiply_each(
    x: Float[Array, "N T *inputs"],
    weights: Sequence[Any],
    axes: Sequence[Sequence[str]],
) -> list[Float[Array, "N T *outputs"]]:
  """Multiplies tokens with several kernels.

  Args:
    x: tokens.
    weights: [*inputs, *outputs] each; or one that holds all, then None.
    axes: logical names of each result's dimensions.

  Returns:
    The products, in the dtype of both.
  """
  first = weights[0]
  if isinstance(first, Arranged):
    return multiply_arranged(x, first, dtype=x.dtype)
  return [
      multiply(x, weight, *names)
      for weight, names in zip(weights, axes, strict=True)
  ]


def multiply(
    x: Float[Array, "N T *inputs"],
    weight: Float[Array, "*shape"] | Arranged,
    *axes: str,
) -> Float[Array, "N T *outputs"]:
  """Multiplies tokens with a kernel.

  Rows are laid end to end for it: compilers for CPUs bring products over two
  dimensions of tokens, such as a weight's gradient, into that form by copying.

  Args:
    x: tokens.
    weight: [*inputs, *outputs], or arranged.
    *axes: logical names of the result's dimensions.

  Returns:
    The products, in the dtype of both.
  """
  if isinstance(weight, Arranged):
    (product,) = multiply_arranged(x, weight, dtype=x.dtype)
    return product
  product = jnp.tensordot(
      x.reshape(-1, *x.shape[2:]),
      weight,
      axes=x.ndim - 2,
      out_sharding=sharding.out("batch", *axes[2:]),
  )
  shape = (*x.shape[:2], *product.shape[1:])
  return jnp.reshape(product, shape, out_sharding=sharding.out(*axes))


def multiply_arranged(
    x: Float[Array, "N T *inputs"],
    weight: Arranged,
    *,
    dtype: DTypeLike,
    few: int = FEW,
) -> list[Float[Array, "N T *outputs"]]:
  """Multiplies tokens with kernels that are kept turned, or in tiles.

  Args:
    x: tokens.
    weight: the kernels.
    dtype: of the products; they are summed in float32.
    few: tokens, at most, that turned kernels meet as columns, in float32.

  Returns:
    A product for each kernel.
  """
  rows = x.reshape(x.shape[0] * x.shape[1], -1)
  as_columns = False
  if isinstance(weight, Tiled):
    product = tiles.multiply(rows, weight)
  elif as_columns := rows.dtype == jnp.float32 and len(rows) <= few:
    product = _tokens_last(weight.matrix, rows)
  else:
    product = _tokens_first(weight.matrix, rows)
  product = product.astype(dtype)
  ends = itertools.accumulate(map(math.prod, weight.outputs))
  parts = jnp.split(product, list(ends)[:-1], axis=0 if as_columns else 1)
  return [
      (part.T if as_columns else part).reshape(*x.shape[:2], *shape)
      for part, shape in zip(parts, weight.outputs, strict=True)
  ]


def _tokens_last(
    matrix: Float[Array, "outputs inputs"], rows: Float[Array, "N inputs"]
) -> Float[Array, "outputs N"]:
  """Multiplies with tokens as columns, for few of them."""
  # Else the compiler undoes the transpositions, and packs as it would have.
  columns = jax.lax.optimization_barrier(rows.T)
  return jax.lax.optimization_barrier(
      jnp.matmul(matrix, columns, preferred_element_type=jnp.float32)
  )


def _tokens_first(
    matrix: Float[Array, "outputs inputs"], rows: Float[Array, "N inputs"]
) -> Float[Array, "N outputs"]:
  """Multiplies with tokens as rows: transposing many costs more."""
  return jnp.einsum(
      "ni,oi->no", rows, matrix, preferred_element_type=jnp.float32
  )
