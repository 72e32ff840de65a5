"""Attention over packed rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax import sharding

BLOCK = 128  # query rows that share one score matrix


def packed(
    query: Float[Array, "N T Hkv G D"],
    key: Float[Array, "N T Hkv D"],
    value: Float[Array, "N T Hkv D"],
    segment_ids: Int[Array, "N T"],
) -> Float[Array, "N T Hkv G D"]:
  """Attends causally within segments, a block of queries at a time.

      out[t] = Σ_s softmax_s(q[t] · k[s] / sqrt(D)) v[s],   s ≤ t, same segment

  A block of queries meets only the keys up to its own end, so nearly half of
  the score matrix is never computed. Padding is segment 0: it attends to
  padding, and nothing else does.

  Args:
    query: grouped by the key head they share.
    key: one per key head.
    value: one per key head.
    segment_ids: [N, T] int32.

  Returns:
    Attended values, in the dtype of `value`; scores and softmax are float32.
  """
  length = query.shape[1]
  blocks = []
  for start in range(0, length, BLOCK):
    stop = min(start + BLOCK, length)
    mask = _mask(segment_ids, start, stop)
    rows = query[:, start:stop]
    blocks.append(_attend(rows, key[:, :stop], value[:, :stop], mask))
  return jnp.concatenate(blocks, axis=1)


def _mask(segment_ids: Int[Array, "N T"], start: int, stop: int) -> Array:
  """Says which of the first `stop` keys queries start..stop see."""
  queries = segment_ids[:, start:stop, None]
  keys = segment_ids[:, None, :stop]
  causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
  return (queries == keys) & causal[None]


def _attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
  """Attends to keys where mask [N, T, S] allows."""
  heads = ("batch", "kv_heads", "group", "length", "length")
  scores = jnp.einsum(
      "ntkgd,nskd->nkgts",
      query * query.shape[-1] ** -0.5,
      key,
      preferred_element_type=jnp.float32,
      out_sharding=sharding.out(*heads),
  )
  weights = jax.nn.softmax(scores, axis=-1, where=mask[:, None, None])
  return jnp.einsum(
      "nkgts,nskd->ntkgd",
      weights.astype(value.dtype),
      value,
      out_sharding=sharding.out(
          "batch", "length", "kv_heads", "group", "head_dim"
      ),
  )
