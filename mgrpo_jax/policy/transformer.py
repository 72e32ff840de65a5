"""The Llama family as pure functions; one layer for trainer and sampler.

A layer is `project` (norm, queries, keys, values, rotation), an attention that
the caller chooses (packed rows here, a cache in `decode`), and `finish` (output
projection and feed-forward, both added to the residual stream). The three work
on any leading dimensions: [N, T] packed rows, or [S, 1] slots being decoded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax import sharding
from mgrpo_jax.policy import attention
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Layer, Params

Rotation = tuple[Float[Array, "N T half"], Float[Array, "N T half"]]


def apply(
    params: Params,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    segment_ids: Int[Array, "N T"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T V"]:
  """Computes next-token logits of packed rows.

  Args:
    params: weights.
    tokens: [N, T] int32 ids in 0..V-1; padding may hold anything.
    positions: [N, T] int32, position in the segment, for the rotations.
    segment_ids: [N, T] int32, 0 is padding; a token attends to itself and to
      the earlier tokens of its own segment.
    config: sizes.

  Returns:
    [N, T, V] float32 logits of the token that follows; arbitrary but finite
    on padding.
  """
  hidden = hidden_states(params, tokens, positions, segment_ids, config=config)
  return unembed(params, hidden, config=config)


def hidden_states(
    params: Params,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    segment_ids: Int[Array, "N T"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T E"]:
  """Runs every layer and the final norm; see `apply` for the arguments."""
  real = segment_ids > 0
  x = embed(params, jnp.where(real, tokens, 0), config=config)
  rotation = rotations(jnp.where(real, positions, 0), config=config)
  for layer in params.layers:
    query, key, value = project(layer, x, rotation, config=config)
    attended = attention.packed(query, key, value, segment_ids)
    x = finish(layer, x, attended, config=config)
  return rms_norm(x, params.final_norm, config=config)


def embed(
    params: Params, tokens: Int[Array, "N T"], *, config: TransformerConfig
) -> Float[Array, "N T E"]:
  """Looks tokens up.

  Args:
    params: weights.
    tokens: ids; one outside 0..V-1 gives NaN, which nothing hides.
    config: sizes.

  Returns:
    The residual stream before the first layer, in `config.dtype`.
  """
  table = sharding.constrain(
      jnp.asarray(params.embedding, config.dtype), "vocab", "hidden"
  )
  return table.at[tokens].get(
      mode="fill",
      fill_value=jnp.nan,
      wrap_negative_indices=False,
      out_sharding=sharding.out("batch", "length", "hidden"),
  )


def rotations(
    positions: Int[Array, "N T"], *, config: TransformerConfig
) -> Rotation:
  """Computes the rotary angles' cosines and sines (Su et al., 2104.09864).

      angle[i] = position · base^(-2 i / D),   i < D / 2

  Args:
    positions: tokens from the start of the segment.
    config: head_dim D and rope_base.

  Returns:
    Cosine and sine, each [N, T, D / 2] float32.
  """
  half = config.head_dim // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / half
  angles = positions[..., None].astype(jnp.float32) * (
      config.rope_base**-exponents
  ).reshape((1,) * positions.ndim + (half,))
  return jnp.cos(angles), jnp.sin(angles)


def project(
    layer: Layer,
    x: Float[Array, "N T E"],
    rotation: Rotation,
    *,
    config: TransformerConfig,
) -> tuple[
    Float[Array, "N T Hkv G D"],
    Float[Array, "N T Hkv D"],
    Float[Array, "N T Hkv D"],
]:
  """Computes a layer's queries, keys and values, rotated.

  Args:
    layer: weights.
    x: residual stream.
    rotation: of the same tokens, from `rotations`.
    config: sizes.

  Returns:
    Queries grouped by the key head they share, keys, values.
  """
  normed = rms_norm(x, layer.attention_norm, config=config)
  heads = ("batch", "length", "kv_heads", "head_dim")
  grouped = ("batch", "length", "kv_heads", "group", "head_dim")
  query = _weight(
      layer.query, "hidden", "kv_heads", "group", "head_dim", config=config
  )
  key = _weight(layer.key, "hidden", "kv_heads", "head_dim", config=config)
  value = _weight(layer.value, "hidden", "kv_heads", "head_dim", config=config)
  q = jnp.einsum(
      "nte,ekgd->ntkgd", normed, query, out_sharding=sharding.out(*grouped)
  )
  k = jnp.einsum(
      "nte,ekd->ntkd", normed, key, out_sharding=sharding.out(*heads)
  )
  v = jnp.einsum(
      "nte,ekd->ntkd", normed, value, out_sharding=sharding.out(*heads)
  )
  return rotate(q, rotation), rotate(k, rotation), v


def finish(
    layer: Layer,
    x: Float[Array, "N T E"],
    attended: Float[Array, "N T Hkv G D"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T E"]:
  """Adds what was attended to, then the gated feed-forward (SwiGLU).

  Args:
    layer: weights.
    x: residual stream that `project` was given.
    attended: mean values, one per query head.
    config: sizes.

  Returns:
    The residual stream after the layer.
  """
  stream = sharding.out("batch", "length", "hidden")
  output = _weight(
      layer.output, "kv_heads", "group", "head_dim", "hidden", config=config
  )
  x = x + jnp.einsum("ntkgd,kgde->nte", attended, output, out_sharding=stream)
  normed = rms_norm(x, layer.mlp_norm, config=config)
  inner = sharding.out("batch", "length", "mlp")
  gate = _weight(layer.gate, "hidden", "mlp", config=config)
  up = _weight(layer.up, "hidden", "mlp", config=config)
  down = _weight(layer.down, "mlp", "hidden", config=config)
  gated = jax.nn.silu(
      jnp.einsum("nte,ef->ntf", normed, gate, out_sharding=inner)
  ) * jnp.einsum("nte,ef->ntf", normed, up, out_sharding=inner)
  return x + jnp.einsum("ntf,fe->nte", gated, down, out_sharding=stream)


def unembed(
    params: Params,
    hidden: Float[Array, "N T E"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T V"]:
  """Turns normed hidden states into logits.

  Args:
    params: weights.
    hidden: output of `hidden_states`.
    config: sizes; tied_embeddings picks the kernel.

  Returns:
    Float32 logits.
  """
  return logits(unembedding(params, config=config), hidden, config=config)


def unembedding(
    params: Params, *, config: TransformerConfig
) -> Float[Array, "rows columns"]:
  """Gathers the kernel of the last product, once for many uses.

  Args:
    params: weights.
    config: tied_embeddings says which kernel it is.

  Returns:
    Float32, [V, E] where tied and [E, V] where not; for `logits`.
  """
  if config.tied_embeddings:
    return sharding.gather(params.embedding, "vocab", "hidden")
  return sharding.gather(params.unembedding, "hidden", "vocab")


def logits(
    kernel: Float[Array, "rows columns"],
    hidden: Float[Array, "N T E"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T V"]:
  """Multiplies normed hidden states with the kernel from `unembedding`.

  Args:
    kernel: [V, E] where tied, [E, V] where not.
    hidden: output of `hidden_states`.
    config: sizes.

  Returns:
    Float32 logits.
  """
  return jnp.einsum(
      "nte,ve->ntv" if config.tied_embeddings else "nte,ev->ntv",
      hidden,
      jnp.asarray(kernel, config.dtype),
      preferred_element_type=jnp.float32,
      out_sharding=sharding.out("batch", "length", "vocab"),
  )


def rms_norm(
    x: Float[Array, "N T E"],
    scale: Float[Array, " E"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T E"]:
  """Divides by the root mean square, in float32 (Zhang & Sennrich, 1910.07467).

  Args:
    x: of any dtype, which the result shares.
    scale: float32.
    config: norm_eps.

  Returns:
    scale · x / sqrt(mean(x²) + eps).
  """
  wide = x.astype(jnp.float32)
  mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean_square + config.norm_eps)
  return normed.astype(x.dtype) * jnp.asarray(scale, x.dtype).reshape(
      (1,) * (x.ndim - 1) + (-1,)
  )


def rotate(
    x: Float[Array, "N T *heads D"], rotation: Rotation
) -> Float[Array, "N T *heads D"]:
  """Rotates pairs (i, i + D / 2) of every head, the half-split convention.

  Args:
    x: queries or keys.
    rotation: cosine and sine of the same tokens.

  Returns:
    The same shape and dtype; computed in float32.
  """
  heads = tuple(range(2, x.ndim - 1))
  cos, sin = (jnp.expand_dims(part, heads) for part in rotation)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def _weight(
    value: Float[Array, "*shape"], *axes: str, config: TransformerConfig
) -> Float[Array, "*shape"]:
  """Casts a parameter for compute, then gathers its fully sharded axis."""
  return sharding.gather(jnp.asarray(value, config.dtype), *axes)
