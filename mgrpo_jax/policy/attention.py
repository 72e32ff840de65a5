"""Attention over packed rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Queries of a row are cut in at most MAX_BLOCKS blocks of at least MIN_BLOCK:
# small blocks skip more of the masked half, many blocks make large programs.
MIN_BLOCK = 64
MAX_BLOCKS = 8
MASKED = -1e30  # a score that no real one comes near, and whose exp is 0


def packed(
    query: Float[Array, "N T Hkv G D"],
    key: Float[Array, "N T Hkv D"],
    value: Float[Array, "N T Hkv D"],
    segment_ids: Int[Array, "N T"],
) -> Float[Array, "N T Hkv G D"]:
  """Attends causally within segments, a block of queries at a time.

      out[t] = Σ_s softmax_s(q[t] · k[s] / sqrt(D)) v[s],   s ≤ t, same segment

  A block of queries meets only the keys up to its own end, so nearly half of
  the score matrix is never computed, and what is computed is computed again in
  the backward pass instead of kept. Padding is segment 0: it attends to
  padding, and nothing else does.

  Args:
    query: grouped by the key head they share.
    key: one per key head.
    value: one per key head.
    segment_ids: [N, T] int32.

  Returns:
    Attended values, in the dtype of `value`; scores and softmax are float32
    or wider.
  """
  length, head_dim = query.shape[1], query.shape[-1]
  # Heads before tokens: batched products then read contiguous matrices.
  rows = jnp.transpose(query * head_dim**-0.5, (0, 2, 3, 1, 4))
  keys = jnp.transpose(key, (0, 2, 1, 3))
  values = jnp.transpose(value, (0, 2, 1, 3))
  block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
  blocks = []
  for start in range(0, length, block):
    stop = min(start + block, length)
    blocks.append(
        _attend(
            rows[:, :, :, start:stop],
            keys[:, :, :stop],
            values[:, :, :stop],
            _visible(segment_ids, start, stop),
        )
    )
  attended = jnp.concatenate(blocks, axis=3)
  return jnp.transpose(attended, (0, 3, 1, 2, 4))


def _visible(
    segment_ids: Int[Array, "N T"], start: int, stop: int
) -> Bool[Array, "N Q S"]:
  """Says which of the first `stop` keys queries start..stop see."""
  queries = segment_ids[:, start:stop, None]
  keys = segment_ids[:, None, :stop]
  causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
  return (queries == keys) & causal[None]


@jax.checkpoint
def _attend(
    query: Float[Array, "N Hkv G Q D"],
    key: Float[Array, "N Hkv S D"],
    value: Float[Array, "N Hkv S D"],
    visible: Bool[Array, "N Q S"],
) -> Float[Array, "N Hkv G Q D"]:
  """Attends to visible keys; every query sees at least itself."""
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum(
      "nkgqd,nksd->nkgqs", query, key, preferred_element_type=wide
  )
  scores = jnp.where(visible[:, None, None], scores, MASKED)
  highest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - jax.lax.stop_gradient(highest))
  # Dividing the result, not the weights: D numbers a query instead of S.
  total = jnp.einsum(
      "nkgqs,nksd->nkgqd",
      weights.astype(value.dtype),
      value,
      preferred_element_type=wide,
  )
  mean = total / jnp.sum(weights, axis=-1, keepdims=True)
  return mean.astype(value.dtype)
