"""One declaration per parameter: shape, dtype, logical axes, initialiser.

Initial values, abstract shapes and shardings (`mgrpo_jax.sharding`) all derive
from `param_specs`. Query heads are stored grouped by the key head they share,
[Hkv, G]: head h of the usual flat order is group member h % G of key head
h // G, so grouped attention and its sharding need no reshape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mgrpo_jax.policy.config import TransformerConfig

Init = Callable[[Any, tuple[int, ...], np.dtype], Array]


@flax.struct.dataclass
class Layer:
  """Weights of one transformer layer, float32; None where it has none.

  In a sparse layer gate, up and down have a leading axis of X experts.
  """

  attention_norm: Any  # [E]
  query: Any  # [E, Hkv, G, D]
  key: Any  # [E, Hkv, D]
  value: Any  # [E, Hkv, D]
  output: Any  # [Hkv, G, D, E]
  mlp_norm: Any  # [E]
  gate: Any  # [E, F] or [X, E, F]
  up: Any  # [E, F] or [X, E, F]
  down: Any  # [F, E] or [X, F, E]
  query_bias: Any = None  # [Hkv, G, D]
  key_bias: Any = None  # [Hkv, D]
  value_bias: Any = None  # [Hkv, D]
  query_norm: Any = None  # [D]
  key_norm: Any = None  # [D]
  attention_post_norm: Any = None  # [E]
  mlp_post_norm: Any = None  # [E]
  router: Any = None  # [E, X]


@flax.struct.dataclass
class Params:
  """Weights of a transformer, float32; L layers."""

  embedding: Any  # [V, E]
  layers: tuple[Layer, ...]
  final_norm: Any  # [E]
  unembedding: Any  # [E, V], or None where tied to the embedding
  value_head: Any = None  # [E], of a critic


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """Everything there is to know about a parameter before it has a value.

  Attributes:
    shape: of the array.
    dtype: of the array.
    logical_axes: a name for each dimension, see `mgrpo_jax.sharding.RULES`.
    init: (key, shape, dtype) -> array.
    inputs: leading axes that a kernel contracts, after that of experts; 0 for
      what is no kernel.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  logical_axes: tuple[str, ...]
  init: Init
  inputs: int


def param_specs(config: TransformerConfig) -> Params:
  """Declares every parameter.

  Kernels start normal with variance 1 / fan-in; the two that write to the
  residual stream are scaled down by sqrt(2 L), so that its variance does not
  grow with depth; the embedding has variance 1 / E, which gives logits of unit
  variance where it is tied. A critic starts at 0.

  Args:
    config: sizes.

  Returns:
    `Params` whose leaves are `ParamSpec`.
  """
  embed = config.embed_dim
  return Params(
      embedding=_normal(embed, 0, vocab=config.vocab_size, embed=embed),
      layers=tuple(_layer_specs(config, i) for i in range(config.num_layers)),
      final_norm=_ones(embed),
      unembedding=None
      if config.tied_embeddings
      else _normal(embed, 1, embed=embed, vocab=config.vocab_size),
      value_head=_zeros(norm=embed) if config.value_head else None,
  )


def init(key: Key[Array, ""], config: TransformerConfig) -> Params:
  """Draws initial weights.

  Args:
    key: PRNG key; each parameter gets its own.
    config: sizes.

  Returns:
    Float32 weights.
  """
  specs = param_specs(config)
  keys = iter(jax.random.split(key, len(jax.tree.leaves(specs))))
  return jax.tree.map(lambda s: s.init(next(keys), s.shape, s.dtype), specs)


def abstract(config: TransformerConfig) -> Params:
  """Gives the weights' shapes without values.

  Args:
    config: sizes.

  Returns:
    `Params` whose leaves are `jax.ShapeDtypeStruct`.
  """
  return jax.tree.map(
      lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype),
      param_specs(config),
  )


def num_params(config: TransformerConfig) -> int:
  """Counts scalars, a tied embedding once.

  Args:
    config: sizes.

  Returns:
    The number of trainable scalars.
  """
  return sum(math.prod(s.shape) for s in jax.tree.leaves(param_specs(config)))


def _layer_specs(config: TransformerConfig, layer: int) -> Layer:
  """Declares one layer."""
  embed, depth = config.embed_dim, 2 * config.num_layers
  key_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
  heads = {
      "kv_heads": config.num_kv_heads,
      "group": config.group_size,
      "head_dim": config.head_dim,
  }
  width = config.num_heads * config.head_dim
  return Layer(
      attention_norm=_ones(embed),
      query=_normal(embed, 1, embed=embed, **heads),
      key=_normal(embed, 1, embed=embed, **key_heads),
      value=_normal(embed, 1, embed=embed, **key_heads),
      output=_normal(width * depth, 3, **heads, embed=embed),
      mlp_norm=_ones(embed),
      **_feed_forward_specs(config, layer),
      query_bias=_zeros(**heads) if config.qkv_bias else None,
      key_bias=_zeros(**key_heads) if config.qkv_bias else None,
      value_bias=_zeros(**key_heads) if config.qkv_bias else None,
      query_norm=_ones(config.head_dim) if config.qk_norm else None,
      key_norm=_ones(config.head_dim) if config.qk_norm else None,
      attention_post_norm=_ones(embed) if config.post_norms else None,
      mlp_post_norm=_ones(embed) if config.post_norms else None,
  )


def _feed_forward_specs(
    config: TransformerConfig, layer: int
) -> dict[str, ParamSpec]:
  """Declares a layer's feed-forward, dense or sparse."""
  embed, mlp = config.embed_dim, config.mlp_dim
  experts: dict[str, int] = {}
  specs = {}
  if config.is_sparse(layer):
    assert config.experts is not None
    mlp, experts = config.experts.mlp_dim, {"expert": config.experts.number}
    specs["router"] = _normal(embed, 1, embed=embed, router=experts["expert"])
  inner = mlp * 2 * config.num_layers
  return specs | {
      "gate": _normal(embed, 1, **experts, embed=embed, mlp=mlp),
      "up": _normal(embed, 1, **experts, embed=embed, mlp=mlp),
      "down": _normal(inner, 1, **experts, mlp=mlp, embed=embed),
  }


def _normal(inverse_variance: int, inputs: int, **axes: int) -> ParamSpec:
  """Declares a kernel; axes are named dimensions in order."""
  draw = functools.partial(_draw_normal, inverse_variance)
  shape = tuple(axes.values())
  return ParamSpec(shape, np.dtype(np.float32), tuple(axes), draw, inputs)


def _ones(size: int) -> ParamSpec:
  """Declares a norm's scale."""
  return ParamSpec((size,), np.dtype(np.float32), ("norm",), _draw_ones, 0)


def _zeros(**axes: int) -> ParamSpec:
  """Declares a bias; axes are named dimensions in order."""
  shape = tuple(axes.values())
  return ParamSpec(shape, np.dtype(np.float32), tuple(axes), _draw_zeros, 0)


def _draw_normal(
    inverse_variance: int, key: Any, shape: tuple[int, ...], dtype: np.dtype
) -> Array:
  """Draws from a normal distribution of the given precision."""
  return jax.random.normal(key, shape, dtype) * inverse_variance**-0.5


def _draw_ones(key: Any, shape: tuple[int, ...], dtype: np.dtype) -> Array:
  """Ignores the key."""
  del key
  return jnp.ones(shape, dtype)


def _draw_zeros(key: Any, shape: tuple[int, ...], dtype: np.dtype) -> Array:
  """Ignores the key."""
  del key
  return jnp.zeros(shape, dtype)
