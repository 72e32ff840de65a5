"""Attention over packed rows: kernels of one signature.

    out[t] = Σ_s softmax_s(q[t] · k[s]) v[s]

over the tokens s ≤ t of the same segment, with a window only over the last
`window` of them; queries come scaled. Padding is segment 0: it attends to
padding, and nothing else does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Queries of a row are cut in at most MAX_BLOCKS blocks of at least MIN_BLOCK:
# small blocks skip more of the masked half, many blocks make large programs.
MIN_BLOCK = 64
MAX_BLOCKS = 8
# Scores of a head that exist at once; blocks with more run piece by piece.
MAX_SCORES = 2**22
MASKED = -1e30  # a score that no real one comes near, and whose exp is 0


def blockwise(
    query: Float[Array, "N T Hkv G D"],
    key: Float[Array, "N T Hkv D"],
    value: Float[Array, "N T Hkv D"],
    segment_ids: Int[Array, "N T"],
    *,
    window: int,
) -> Float[Array, "N T Hkv G D"]:
  """Attends a block of queries at a time, on any device.

  A block of queries meets only the keys between its first window and its own
  end, so nearly half of the score matrix is never computed, with a window
  nearly all of it; and what is computed is computed again in the backward pass
  instead of kept.

  Args:
    query: scaled, grouped by the key head they share.
    key: one per key head.
    value: one per key head.
    segment_ids: [N, T] int32.
    window: tokens that a query sees, itself included; 0 for all before it.

  Returns:
    Attended values, in the dtype of `value`; scores and softmax are float32
    or wider.
  """
  length = query.shape[1]
  # Heads before tokens: batched products then read contiguous matrices.
  rows = jnp.transpose(query, (0, 2, 3, 1, 4))
  keys = jnp.transpose(key, (0, 2, 1, 3))
  values = jnp.transpose(value, (0, 2, 1, 3))
  block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
  blocks = []
  for start in range(0, length, block):
    stop = min(start + block, length)
    first = max(0, start - window + 1) if window else 0
    blocks.append(
        _attend_pieces(
            rows[:, :, :, start:stop],
            keys[:, :, first:stop],
            values[:, :, first:stop],
            segment_ids[:, first:stop],
            window,
        )
    )
  attended = jnp.concatenate(blocks, axis=3)
  return jnp.transpose(attended, (0, 3, 1, 2, 4))


def _attend_pieces(
    query: Float[Array, "N Hkv G Q D"],
    key: Float[Array, "N Hkv S D"],
    value: Float[Array, "N Hkv S D"],
    segment_ids: Int[Array, "N S"],
    window: int,
) -> Float[Array, "N Hkv G Q D"]:
  """Attends from the last Q of S tokens; in pieces where S is large."""
  size, length = query.shape[3], key.shape[2]
  piece = max(1, MAX_SCORES // length)
  if size <= piece:
    visible = _visible(segment_ids, length - size, size, window)
    return _attend(query, key, value, visible)
  pieces = -(-size // piece)
  padded = jnp.pad(query, ((0, 0),) * 3 + ((0, pieces * piece - size), (0, 0)))

  def one(number: Int[Array, ""]) -> Array:
    start = number * piece
    rows = jax.lax.dynamic_slice_in_dim(padded, start, piece, axis=3)
    visible = _visible(segment_ids, length - size + start, piece, window)
    return _attend(rows, key, value, visible)

  done = jax.lax.map(one, jnp.arange(pieces))
  joined = jnp.moveaxis(done, 0, 3)
  return joined.reshape(*query.shape[:3], -1, query.shape[4])[:, :, :, :size]


def _visible(
    segment_ids: Int[Array, "N S"],
    start: int | Int[Array, ""],
    size: int,
    window: int,
) -> Bool[Array, "N Q S"]:
  """Says which of S tokens the queries start..start+size see."""
  padded = jnp.pad(segment_ids, ((0, 0), (0, size)))
  queries = jax.lax.dynamic_slice_in_dim(padded, start, size, axis=1)
  same = queries[:, :, None] == segment_ids[:, None]
  age = (
      start + jnp.arange(size)[:, None] - jnp.arange(segment_ids.shape[1])[None]
  )
  near = (age >= 0) & (age < window) if window else age >= 0
  return same & near[None]


@jax.checkpoint
def _attend(
    query: Float[Array, "N Hkv G Q D"],
    key: Float[Array, "N Hkv S D"],
    value: Float[Array, "N Hkv S D"],
    visible: Bool[Array, "N Q S"],
) -> Float[Array, "N Hkv G Q D"]:
  """Attends to visible keys; every real query sees at least itself."""
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
