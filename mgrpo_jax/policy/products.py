"""Products of tokens with kernels, in either of the orders kernels are kept in.

Kernels are [*inputs, *outputs], and that is how they are trained and saved. On
CPUs XLA multiplies few tokens with large kernels 1.3 to 1.6 times faster where
the outputs come first and the tokens are columns (measured, see
experiments/README.md). So a sampler on a CPU may keep kernels turned.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgrpo_jax import sharding
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Layer, Params, ParamSpec, param_specs

FEW = 128  # tokens, at most, that are multiplied as columns


@flax.struct.dataclass
class Turned:
  """A kernel [*inputs, *outputs] as a matrix, outputs first."""

  matrix: Any  # [outputs, inputs]
  outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)


def turn(params: Params, *, config: TransformerConfig) -> Params:
  """Turns the kernels of every layer, those of experts excepted.

  Args:
    params: weights, on the default device.
    config: their sizes.

  Returns:
    The same numbers; `multiply` takes either.
  """
  layers = tuple(
      _turn_layer(layer, specs)
      for layer, specs in zip(
          params.layers, param_specs(config).layers, strict=True
      )
  )
  return dataclasses.replace(params, layers=layers)


def _turn_layer(layer: Layer, specs: Layer) -> Layer:
  """Turns what contracts inputs, but for a sparse layer's feed-forward."""
  dense = ["query", "key", "value", "output"]
  if layer.router is None:
    dense += ["gate", "up", "down"]
  turned = {
      name: _turn(getattr(layer, name), getattr(specs, name)) for name in dense
  }
  return dataclasses.replace(layer, **turned)


def _turn(kernel: Array, spec: ParamSpec) -> Turned:
  """Turns a kernel."""
  outputs = spec.shape[spec.inputs :]
  matrix = kernel.reshape(-1, math.prod(outputs)).T
  return Turned(matrix=jnp.array(matrix), outputs=outputs)


def multiply(
    x: Float[Array, "N T *inputs"],
    weight: Float[Array, "*shape"] | Turned,
    *axes: str,
) -> Float[Array, "N T *outputs"]:
  """Multiplies tokens with a kernel.

  Rows are laid end to end for it: compilers for CPUs bring products over two
  dimensions of tokens, such as a weight's gradient, into that form by copying.

  Args:
    x: tokens.
    weight: [*inputs, *outputs], or turned.
    *axes: logical names of the result's dimensions.

  Returns:
    The products, in the dtype of both.
  """
  if isinstance(weight, Turned):
    rows = x.reshape(x.shape[0] * x.shape[1], -1)
    by = _tokens_last if len(rows) <= FEW else _tokens_first
    return by(weight.matrix, rows).reshape(*x.shape[:2], *weight.outputs)
  product = jnp.tensordot(
      x.reshape(-1, *x.shape[2:]),
      weight,
      axes=x.ndim - 2,
      out_sharding=sharding.out("batch", *axes[2:]),
  )
  shape = (*x.shape[:2], *product.shape[1:])
  return jnp.reshape(product, shape, out_sharding=sharding.out(*axes))


def _tokens_last(
    matrix: Float[Array, "outputs inputs"], rows: Float[Array, "N inputs"]
) -> Float[Array, "N outputs"]:
  """Multiplies with tokens as columns, for few of them."""
  # Else the compiler undoes the transpositions, and packs as it would have.
  columns = jax.lax.optimization_barrier(rows.T)
  return jax.lax.optimization_barrier(matrix @ columns).T


def _tokens_first(
    matrix: Float[Array, "outputs inputs"], rows: Float[Array, "N inputs"]
) -> Float[Array, "N outputs"]:
  """Multiplies with tokens as rows: transposing many costs more."""
  return jnp.einsum("ni,oi->no", rows, matrix)
