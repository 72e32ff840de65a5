"""Attention over packed rows: kernels of one signature.

    out[t] = Σ_s softmax_s(q[t] · k[s]) v[s]

over the tokens s ≤ t of the same segment, with a window only over the last
`window` of them; queries come scaled. Padding is segment 0: it attends to
padding, and nothing else does. `blockwise` can also let segments see another
one before them, the prefix that they share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mgrpo_jax import sharding

# Queries of a row are cut in at most MAX_BLOCKS blocks of at least MIN_BLOCK:
# small blocks skip more of the masked half, many blocks make large programs.
MIN_BLOCK = 64
MAX_BLOCKS = 8
# Scores of a head that exist at once; blocks with more run piece by piece.
MAX_SCORES = 2**22
MASKED = -1e30  # finite, and no real score comes near; its exp is 0
SPLASH_BLOCKS = (512, 256, 128)  # tokens; the largest that divides the length
# Keys that the backward kernel holds at once, at most an eighth of a row: it
# writes the queries' gradient once for each such block, and of those on the
# diagonal it computes the masked half too. 4096 exceed a chip's fast memory.
SPLASH_HELD = (2048, 1024)
# Name, for rematerialisation, of all that the backward pass needs of attention
# beside its arguments: means and normalisers.
ATTENDED = "attended"


def blockwise(
    query: Float[Array, "N T Hkv G D"],
    key: Float[Array, "N T Hkv D"],
    value: Float[Array, "N T Hkv D"],
    segment_ids: Int[Array, "N T"],
    *,
    window: int,
    prefix_ids: Int[Array, "N T"] | None = None,
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
    prefix_ids: [N, T] int32, the segment that a query sees besides its own, 0
      for none; None where no query sees another segment.

  Returns:
    Attended values, in the dtype of `value`; scores and softmax are float32
    or wider.

  Raises:
    ValueError: if there are both a window, which is counted in the row, and
      prefixes, which may stand far from what sees them.
  """
  if window and prefix_ids is not None:
    raise ValueError(f"window must be 0 with prefix_ids, got {window}")
  length = query.shape[1]
  # Heads before tokens: batched products then read contiguous matrices.
  rows = jnp.transpose(query, (0, 2, 3, 1, 4))
  keys = jnp.transpose(key, (0, 2, 1, 3))
  values = jnp.transpose(value, (0, 2, 1, 3))
  blocks = []
  for start, stop in cut(length):
    first = max(0, start - window + 1) if window else 0
    blocks.append(
        _attend_pieces(
            rows[:, :, :, start:stop],
            keys[:, :, first:stop],
            values[:, :, first:stop],
            segment_ids[:, first:stop],
            None if prefix_ids is None else prefix_ids[:, first:stop],
            window,
        )
    )
  attended = jnp.concatenate(blocks, axis=3)
  return jnp.transpose(attended, (0, 3, 1, 2, 4))


def cut(length: int) -> list[tuple[int, int]]:
  """Cuts a row's queries in the blocks in which `blockwise` attends.

  Args:
    length: tokens of the row, >= 1.

  Returns:
    First token of each block, and the one after its last.
  """
  block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
  return [
      (start, min(start + block, length)) for start in range(0, length, block)
  ]


def splash(
    query: Float[Array, "N T Hkv G D"],
    key: Float[Array, "N T Hkv D"],
    value: Float[Array, "N T Hkv D"],
    segment_ids: Int[Array, "N T"],
    *,
    window: int,
    interpret: bool = False,
) -> Float[Array, "N T Hkv G D"]:
  """Attends with JAX's Pallas kernel for TPUs; scores never leave the chip.

  Under a mesh each device attends for the rows and key heads it holds.

  Args:
    query: scaled, grouped by the key head they share.
    key: one per key head.
    value: one per key head.
    segment_ids: [N, T] int32.
    window: tokens that a query sees, itself included; 0 for all before it.
    interpret: runs the kernel as plain operations, anywhere, slowly.

  Returns:
    Attended values, in the dtype of `query`.
  """
  length = query.shape[1]
  padded = -(-length // SPLASH_BLOCKS[-1]) * SPLASH_BLOCKS[-1]
  attend = _splash_kernel(padded, query.shape[3], window, interpret)

  def on_device(query: Array, key: Array, value: Array, ids: Array) -> Array:
    def heads_first(x: Array) -> Array:
      wide = ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2)
      return jnp.moveaxis(jnp.pad(x, wide), 1, -2)

    ids = jnp.pad(ids, ((0, 0), (0, padded - length)))
    arrays = map(heads_first, (query, key, value))
    return jnp.moveaxis(attend(*arrays, ids), -2, 1)[:, :length]

  if jax.sharding.get_abstract_mesh().empty:
    return on_device(query, key, value, segment_ids)
  heads = sharding.spec("batch", "length", "kv_heads", "head_dim")
  grouped = sharding.spec("batch", "length", "kv_heads", "group", "head_dim")
  return jax.shard_map(
      on_device,
      in_specs=(grouped, heads, heads, sharding.spec("batch", "length")),
      out_specs=grouped,
      check_vma=False,  # the kernel does not say what its results vary over
  )(query, key, value, segment_ids)


def _splash_kernel(
    length: int, group: int, window: int, interpret: bool
) -> Callable[..., Array]:
  """Builds the kernel over [N, Hkv, G, T, D] queries and [N, Hkv, T, D]."""
  # Takes most of a second to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as pallas

  shape = (length, length)
  mask = (
      pallas.LocalMask(shape, (window - 1, 0), offset=0)
      if window
      else pallas.CausalMask(shape)
  )
  block = next(size for size in SPLASH_BLOCKS if length % size == 0)
  held = next((size for size in SPLASH_HELD if length % (8 * size) == 0), block)
  # One kernel for all gradients computes scores once, where two do it twice;
  # but it walks over all blocks, of which a window leaves few.
  backward: dict[str, Any] = (
      {"block_kv_dkv": block, "block_q_dq": block, "block_kv_dq": block}
      if window
      else {"block_kv_dkv": held, "use_fused_bwd_kernel": True}
  )
  kernel = pallas.make_splash_mqa_single_device(
      pallas.MultiHeadMask([mask] * group),
      block_sizes=pallas.BlockSizes(
          block_q=block,
          block_kv=block,
          block_q_dkv=block,
          block_kv_dkv_compute=block,
          **backward,
      ),
      residual_checkpoint_name=ATTENDED,
      interpret=interpret,
  )

  def one(query: Array, key: Array, value: Array, ids: Array) -> Array:
    return kernel(query, key, value, pallas.SegmentIds(q=ids, kv=ids))

  of_a_row = jax.vmap(one, in_axes=(0, 0, 0, None))
  return jax.vmap(of_a_row)


def _attend_pieces(
    query: Float[Array, "N Hkv G Q D"],
    key: Float[Array, "N Hkv S D"],
    value: Float[Array, "N Hkv S D"],
    segment_ids: Int[Array, "N S"],
    prefix_ids: Int[Array, "N S"] | None,
    window: int,
) -> Float[Array, "N Hkv G Q D"]:
  """Attends from the last Q of S tokens; in pieces where S is large."""
  size, length = query.shape[3], key.shape[2]
  piece = max(1, MAX_SCORES // length)
  seen = (key, value, segment_ids, prefix_ids)
  if size <= piece:
    return _attend(query, *seen, jnp.int32(length - size), window)
  pieces = -(-size // piece)
  padded = jnp.pad(query, ((0, 0),) * 3 + ((0, pieces * piece - size), (0, 0)))

  def one(number: Int[Array, ""]) -> Array:
    start = number * piece
    rows = jax.lax.dynamic_slice_in_dim(padded, start, piece, axis=3)
    return _attend(rows, *seen, length - size + start, window)

  done = jax.lax.map(one, jnp.arange(pieces))
  joined = jnp.moveaxis(done, 0, 3)
  return joined.reshape(*query.shape[:3], -1, query.shape[4])[:, :, :, :size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    query: Float[Array, "N Hkv G Q D"],
    key: Float[Array, "N Hkv S D"],
    value: Float[Array, "N Hkv S D"],
    segment_ids: Int[Array, "N S"],
    prefix_ids: Int[Array, "N S"] | None,
    first: Int[Array, ""],
    window: int,
) -> Float[Array, "N Hkv G Q D"]:
  """Attends from tokens first..first+Q to those of S that each sees.

  The backward pass computes the softmax again from its normaliser (Dao,
  arXiv 2307.08691), so neither pass leaves scores behind.
  """
  seen = (key, value, segment_ids, prefix_ids)
  return _attend_forward(query, *seen, first, window)[0]


def _attend_forward(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    prefix_ids: Array | None,
    first: Array,
    window: int,
) -> tuple[Array, tuple[Any, ...]]:
  """Attends, and keeps the logarithm of each query's normaliser."""
  where = (segment_ids, prefix_ids, first)
  scores = _scores(query, key, where, window)
  highest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - highest)
  normaliser = jnp.sum(weights, axis=-1, keepdims=True)
  # Dividing the result, not the weights: D numbers a query instead of S.
  total = _product("nkqs,nksd->nkqd", weights.astype(value.dtype), value)
  mean = (total / normaliser).astype(value.dtype).reshape(query.shape)
  log_normaliser = highest + jnp.log(normaliser)
  mean = checkpoint_name(mean, ATTENDED)
  log_normaliser = checkpoint_name(log_normaliser, ATTENDED)
  return mean, (query, key, value, where, mean, log_normaliser)


def _attend_backward(
    window: int, kept: tuple[Any, ...], cotangent: Array
) -> tuple[Array | None, ...]:
  """Pulls a cotangent of the mean back to queries, keys and values."""
  query, key, value, where, mean, log_normaliser = kept
  scores = _scores(query, key, where, window)
  weights = jnp.exp(scores - log_normaliser)
  along = jnp.sum(
      mean.astype(scores.dtype) * cotangent.astype(scores.dtype),
      axis=-1,
      keepdims=True,
  )
  above, rows = _merge(cotangent), _merge(query)
  to_weights = _product("nkqd,nksd->nkqs", above, value)
  to_scores = weights * (to_weights - _merge(along))
  to_scores = to_scores.astype(key.dtype)
  to_query = _product("nkqs,nksd->nkqd", to_scores, key)
  to_key = _product("nkqs,nkqd->nksd", to_scores, rows)
  to_value = _product("nkqs,nkqd->nksd", weights.astype(value.dtype), above)
  return (
      to_query.astype(query.dtype).reshape(query.shape),
      to_key.astype(key.dtype),
      to_value.astype(value.dtype),
      None,
      None,
      None,
  )


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(
    query: Float[Array, "N Hkv G Q D"],
    key: Float[Array, "N Hkv S D"],
    where: tuple[Array, Array | None, Array],
    window: int,
) -> Float[Array, "N Hkv GQ S"]:
  """Scores of the queries of all heads that share a key, MASKED if unseen.

  `where` is segment_ids and prefix_ids, both [N, S], and the first query.
  """
  visible = _visible(*where, query.shape[3], window)
  scores = _product("nkqd,nksd->nkqs", _merge(query), key)
  grouped = scores.reshape(*query.shape[:4], key.shape[2])
  return _merge(jnp.where(visible[:, None, None], grouped, MASKED))


def _merge(x: Float[Array, "N Hkv G Q D"]) -> Float[Array, "N Hkv GQ D"]:
  """Lays the queries of heads that share a key one after the other."""
  return x.reshape(*x.shape[:2], -1, x.shape[4])


def _product(equation: str, left: Array, right: Array) -> Array:
  """Multiplies batches of matrices, adding in float32 or wider."""
  wide = jnp.promote_types(left.dtype, jnp.float32)
  return jnp.einsum(equation, left, right, preferred_element_type=wide)


def _visible(
    segment_ids: Int[Array, "N S"],
    prefix_ids: Int[Array, "N S"] | None,
    first: Int[Array, ""],
    size: int,
    window: int,
) -> Bool[Array, "N Q S"]:
  """Says which of S tokens the queries first..first+size see."""

  def of_queries(ids: Array) -> Array:
    padded = jnp.pad(ids, ((0, 0), (0, size)))
    return jax.lax.dynamic_slice_in_dim(padded, first, size, axis=1)[:, :, None]

  keys = segment_ids[:, None]
  same = of_queries(segment_ids) == keys
  if prefix_ids is not None:
    seen = of_queries(prefix_ids)
    same |= (seen == keys) & (seen > 0)
  age = (
      first + jnp.arange(size)[:, None] - jnp.arange(segment_ids.shape[1])[None]
  )
  near = (age >= 0) & (age < window) if window else age >= 0
  return same & near[None]
