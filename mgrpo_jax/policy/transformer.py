"""Transformers as pure functions; one layer for trainer and sampler.

A layer is `project` (norm, queries, keys, values, rotation), an attention that
the caller chooses (packed rows here, a cache in `decode`), and `finish` (output
projection and feed-forward, both added to the residual stream). The three work
on any leading dimensions: [N, T] packed rows, or [S, 1] slots being decoded.
A family is a `TransformerConfig`: what its layers add to Llama's is a field
there and one line here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax import sharding
from mgrpo_jax.policy import experts, products, rotary
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Layer, Params
from mgrpo_jax.policy.products import Arranged
from mgrpo_jax.policy.rotary import Rotation

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


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
    prefix_ids: Int[Array, "N T"] | None = None,
) -> Float[Array, "N T E"]:
  """Runs every layer and the final norm; see `apply` for the arguments.

  With prefix_ids a token also attends to the earlier tokens of that segment,
  which `config` must be able to do, see `TransformerConfig.shares_nothing`.
  """
  real = segment_ids > 0
  attend = config.execution.attention
  if prefix_ids is not None:
    attend = functools.partial(attend, prefix_ids=prefix_ids)
  x = embed(params, jnp.where(real, tokens, 0), config=config)
  rotation = rotations(jnp.where(real, positions, 0), config=config)

  def run(layer: Layer, x: Array, window: int) -> Array:
    query, key, value = project(layer, x, rotation[window > 0], config=config)
    attended = attend(query, key, value, segment_ids, window=window)
    return finish(layer, x, attended, config=config)

  x = _run_layers(run, params.layers, x, config=config)
  return rms_norm(x, params.final_norm, config=config)


def _run_layers(
    run: Callable[..., Array],
    layers: Sequence[Layer],
    x: Float[Array, "N T E"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T E"]:
  """Runs layers in order: one by one, or whole periods of them as a loop."""
  execution, period = config.execution, config.period

  def block(x: Array, layers: Sequence[Layer]) -> Array:
    for number, layer in enumerate(layers):
      one: Callable[..., Array] = functools.partial(
          run, window=config.window(number)
      )
      if execution.remat is not None:
        one = jax.checkpoint(one, policy=execution.remat)
      x = one(layer, x)
    return x

  repeats = len(layers) // period if execution.scan_layers else 0
  if repeats > 1:
    looped, layers = layers[: period * repeats], layers[period * repeats :]
    stacked = [
        jax.tree.map(
            lambda *same: jnp.stack([_for_compute(w, x) for w in same]),
            *looped[first::period],
        )
        for first in range(period)
    ]
    x, _ = jax.lax.scan(lambda x, part: (block(x, part), None), x, stacked)
  return block(x, layers)  # what is left begins with a period's first layer


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
  table = params.embedding
  if config.execution.kernels == "trained":  # else `arranging` did
    table = sharding.constrain(
        jnp.asarray(table, config.dtype), "vocab", "hidden"
    )
  rows = table.at[tokens].get(
      mode="fill",
      fill_value=jnp.nan,
      wrap_negative_indices=False,
      out_sharding=sharding.out("batch", "length", "hidden"),
  )
  rows = rows.astype(config.dtype)
  if config.embedding_scale == 1.0:
    return rows
  return rows * jnp.asarray(config.embedding_scale, rows.dtype)


def rotations(
    positions: Int[Array, "N T"], *, config: TransformerConfig
) -> tuple[Rotation, Rotation]:
  """Computes the rotary angles' cosines and sines; see `rotary.rotations`.

  Args:
    positions: tokens from the start of the segment.
    config: head_dim, bases and scaling.

  Returns:
    For layers that see all tokens, and for layers with a window.
  """
  whole = rotary.rotations(
      positions,
      head_dim=config.head_dim,
      base=config.rope_base,
      scaling=config.rope_scaling,
  )
  if config.local_rope_base is None:
    return whole, whole
  local = rotary.rotations(
      positions,
      head_dim=config.head_dim,
      base=config.local_rope_base,
      scaling=None,
  )
  return whole, local


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
    rotation: of the same tokens, the one of `rotations` for this layer.
    config: sizes.

  Returns:
    Queries grouped by the key head they share, and scaled; keys; values.
  """
  normed = rms_norm(x, layer.attention_norm, config=config)
  heads = ("batch", "length", "kv_heads", "head_dim")
  grouped = ("batch", "length", "kv_heads", "group", "head_dim")
  query = _weight(
      layer.query, "hidden", "kv_heads", "group", "head_dim", config=config
  )
  key = _weight(layer.key, "hidden", "kv_heads", "head_dim", config=config)
  value = _weight(layer.value, "hidden", "kv_heads", "head_dim", config=config)
  q, k, v = products.multiply_each(
      normed, (query, key, value), (grouped, heads, heads)
  )
  if layer.query_bias is not None:
    q = q + _bias(layer.query_bias, config=config)
    k = k + _bias(layer.key_bias, config=config)
    v = v + _bias(layer.value_bias, config=config)
  if layer.query_norm is not None:
    q = rms_norm(q, layer.query_norm, config=config)
    k = rms_norm(k, layer.key_norm, config=config)
  q, k = rotary.rotate(q, rotation), rotary.rotate(k, rotation)
  return q * config.query_scale, k, v


def finish(
    layer: Layer,
    x: Float[Array, "N T E"],
    attended: Float[Array, "N T Hkv G D"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T E"]:
  """Adds what was attended to, then the feed-forward.

  Args:
    layer: weights.
    x: residual stream that `project` was given.
    attended: mean values, one per query head.
    config: sizes.

  Returns:
    The residual stream after the layer.
  """
  output = _weight(
      layer.output, "kv_heads", "group", "head_dim", "hidden", config=config
  )
  added = products.multiply(attended, output, "batch", "length", "hidden")
  if layer.attention_post_norm is not None:
    added = rms_norm(added, layer.attention_post_norm, config=config)
  x = x + added
  normed = rms_norm(x, layer.mlp_norm, config=config)
  activation = ACTIVATIONS[config.activation]
  if layer.router is None:
    added = _feed_forward(layer, normed, activation, config=config)
  else:
    added = experts.mix(layer, normed, activation, config=config)
  if layer.mlp_post_norm is not None:
    added = rms_norm(added, layer.mlp_post_norm, config=config)
  return x + added


def _feed_forward(
    layer: Layer,
    normed: Float[Array, "N T E"],
    activation: Callable[[Array], Array],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T E"]:
  """The gated feed-forward (Shazeer, arXiv 2002.05202)."""
  inner = ("batch", "length", "mlp")
  gate = _weight(layer.gate, "hidden", "mlp", config=config)
  up = _weight(layer.up, "hidden", "mlp", config=config)
  down = _weight(layer.down, "mlp", "hidden", config=config)
  opening, content = products.multiply_each(normed, (gate, up), (inner, inner))
  gated = activation(opening) * content
  return products.multiply(gated, down, "batch", "length", "hidden")


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
) -> Float[Array, "rows columns"] | Arranged:
  """Gathers the kernel of the last product, once for many uses.

  Args:
    params: weights.
    config: tied_embeddings says which kernel it is.

  Returns:
    Float32, [V, E] where tied and [E, V] where not; for `logits`. As it is
    where it was arranged.
  """
  if isinstance(params.unembedding, Arranged):
    return params.unembedding
  if config.tied_embeddings:
    return sharding.gather(params.embedding, "vocab", "hidden")
  return sharding.gather(params.unembedding, "hidden", "vocab")


def logits(
    kernel: Float[Array, "rows columns"] | Arranged,
    hidden: Float[Array, "N T E"],
    *,
    config: TransformerConfig,
) -> Float[Array, "N T V"]:
  """Multiplies normed hidden states with the kernel from `unembedding`.

  Args:
    kernel: [V, E] where tied, [E, V] where not; or arranged.
    hidden: output of `hidden_states`.
    config: sizes.

  Returns:
    Float32 logits.
  """
  if isinstance(kernel, Arranged):
    (product,) = products.multiply_arranged(
        hidden, kernel, dtype=jnp.float32, few=products.FEW_FOR_LOGITS
    )
    return product
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
  per_feature = (1,) * (x.ndim - 1) + (-1,)
  scaled = normed * jnp.asarray(scale, jnp.float32).reshape(per_feature)
  return scaled.astype(x.dtype)


def _for_compute(
    value: Float[Array, "*shape"], x: Float[Array, "N T E"]
) -> Float[Array, "*shape"]:
  """Casts a parameter like the residual stream, but for scales of norms."""
  wide = jnp.ndim(value) == 1
  return jnp.asarray(value, jnp.float32 if wide else x.dtype)


def _weight(
    value: Float[Array, "*shape"] | Arranged | None,
    *axes: str,
    config: TransformerConfig,
) -> Any:
  """Casts a parameter for compute, then gathers its fully sharded axis."""
  if value is None or isinstance(value, Arranged):  # the sampler has cast it
    return value
  return sharding.gather(jnp.asarray(value, config.dtype), *axes)


def _bias(
    value: Float[Array, "*heads"], *, config: TransformerConfig
) -> Float[Array, "1 1 *heads"]:
  """Casts a bias of heads for compute, and gives it rows and tokens."""
  return jnp.expand_dims(jnp.asarray(value, config.dtype), (0, 1))
