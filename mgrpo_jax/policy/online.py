"""Attention to a cache, block by block.

A layer's blocks are attended one after another by an online softmax. A block
beyond a stream's end multiplies by exp(0) and adds 0, so whether it is
computed, or skipped because no stream needs it, does not change a bit of the
result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mgrpo_jax.policy.attention import MASKED
from mgrpo_jax.policy.cache import Block, Blocks


@flax.struct.dataclass
class Partial:
  """An attention under way, see `attend`."""

  peak: jax.Array  # [P, Hkv, G, T] float32, m
  total: jax.Array  # [P, Hkv, G, T] float32, z
  values: jax.Array  # [P, Hkv, G, T, D] float32, o


def heads_first(
    query: Float[Array, "P T Hkv G D"],
) -> Float[Array, "P Hkv G T D"]:
  """Brings queries into the order in which a cache is attended.

  As the left factor of their product with keys they give scores in the order
  of `attend`; the other way round a CPU computes them turned.

  Args:
    query: as `transformer.project` gives them.

  Returns:
    The same numbers, tokens after heads.
  """
  return jnp.transpose(query, (0, 2, 3, 1, 4))


def attend_streams(
    query: Float[Array, "P T Hkv G D"],
    cached: Blocks,
    own: Block,
    lengths: Int[Array, " P"],
    step: Int[Array, ""],
    *,
    window: int,
    slots: Int[Array, " P"] | None = None,
) -> Float[Array, "P T Hkv G D"]:
  """Attends from each stream's newest T tokens to the stream.

  Args:
    query: scaled.
    cached: a layer's blocks.
    own: of the same layer, tokens that follow those in the cache.
    lengths: [P] int32, tokens in each row's cache; 0 where it sees none.
    step: [] int32, the token of `own` that the first query belongs to.
    window: tokens that a query sees, itself included; 0 for all before it.
    slots: [P] int32, each row's slot of the cache; None where row p has slot p.

  Returns:
    Weighted means of the values, in the dtype of the query.
  """
  queries = heads_first(query)
  fed = step + jnp.arange(query.shape[1], dtype=jnp.int32)

  def rows(block: Array) -> Array:
    if slots is None:
      return block
    return block.at[slots].get(mode="promise_in_bounds")

  part = attend_cached(
      queries,
      cached,
      lengths,
      rows,
      positions=lengths[:, None] + fed[None],
      window=window,
  )
  part = attend_own(part, queries, own, step, window=window)
  return attended(part, query.dtype)


def attend_own(
    part: Partial,
    query: Float[Array, "P Hkv G T D"],
    own: Block,
    step: Int[Array, ""],
    *,
    window: int,
) -> Partial:
  """Adds the tokens beside the cache to an attention; see `attend_streams`.

  Args:
    part: of the cache.
    query: scaled, see `heads_first`.
    own: tokens that follow those in the cache.
    step: [] int32, the token of `own` that the first query belongs to.
    window: tokens that a query sees, itself included; 0 for all before it.

  Returns:
    An attention to all of the streams.
  """
  fed = step + jnp.arange(query.shape[3], dtype=jnp.int32)
  at = jnp.broadcast_to(fed, (len(query), len(fed)))
  columns = jnp.arange(own.size, dtype=jnp.int32)[None, None]
  first = seen_from(at, window=window)[:, :, None]
  seen = (columns <= at[:, :, None]) & (columns >= first)
  return attend(part, query, own, seen)


def attend_cached(
    query: Float[Array, "P Hkv G T D"],
    blocks: Blocks,
    lengths: Int[Array, " P"],
    rows: Callable[[Array], Array],
    *,
    positions: Int[Array, "P T"],
    window: int,
) -> Partial:
  """Attends to cached tokens, skipping blocks that no row needs.

  Args:
    query: of P rows, scaled, see `heads_first`.
    blocks: of a layer, S slots each.
    lengths: [P] int32, tokens in the row's cache; 0 where it sees none.
    rows: picks the P rows out of an array's S slots.
    positions: [P, T] int32, of the queries.
    window: tokens that a query sees, itself included; 0 for all before it.

  Returns:
    An attention to go on with.
  """
  *shape, head_dim = query.shape
  batch, _, _, width = shape
  part = Partial(
      peak=jnp.full(shape, MASKED, jnp.float32),
      total=jnp.zeros(shape, jnp.float32),
      values=jnp.zeros((*shape, head_dim), jnp.float32),
  )
  longest = jnp.max(lengths)
  first = seen_from(positions, window=window)
  earliest = jnp.min(
      jnp.where(lengths > 0, jnp.min(first, axis=1), jnp.max(first))
  )

  def attend_block(index: int, part: Partial) -> Partial:
    size = blocks[index].size
    columns = index * size + jnp.arange(size, dtype=jnp.int32)
    mask = jnp.broadcast_to(
        (columns[None, None] < lengths[:, None, None])
        & (columns[None, None] >= first[:, :, None]),
        (batch, width, size),
    )
    return jax.lax.cond(
        (longest > index * size) & (earliest < (index + 1) * size),
        lambda part, query, block, mask: attend(
            part, query, jax.tree.map(rows, block), mask
        ),
        lambda part, *_: part,
        *(part, query, blocks[index], mask),
    )

  def attend_from(index: int, part: Partial) -> Partial:
    """As many blocks as there are before this one, and those behind them."""
    end = min(2 * max(index, 1), len(blocks))
    for number in range(index, end):
      part = attend_block(number, part)
    if end == len(blocks):
      return part
    # One question for all that is unused, not one a block.
    return jax.lax.cond(
        longest > end * blocks[0].size,
        functools.partial(attend_from, end),
        lambda part: part,
        part,
    )

  return attend_from(0, part)


def seen_from(
    positions: Int[Array, "P T"], *, window: int
) -> Int[Array, "P T"]:
  """Says where what a query sees begins.

  Args:
    positions: of the queries.
    window: tokens that a query sees, itself included; 0 for all before it.

  Returns:
    The earliest position seen; 0 or less where all are.
  """
  return positions - window + 1 if window else jnp.zeros_like(positions)


def attend(
    part: Partial,
    query: Float[Array, "P Hkv G T D"],
    block: Block,
    mask: Bool[Array, "P T C"],
) -> Partial:
  """Adds C tokens to an attention (online softmax, arXiv 1805.02867).

      m' = max(m, max_c s_c),   z' = z e^(m - m') + Σ_c e^(s_c - m'),
      o' = o e^(m - m') + Σ_c e^(s_c - m') v_c,   s_c = q · k_c

  Tokens that the mask excludes add exact zeros.

  Args:
    part: m, z and o so far.
    query: scaled, see `heads_first`.
    block: C tokens of each of the P rows.
    mask: which tokens each query sees.

  Returns:
    m', z' and o', float32.
  """
  scores = jnp.einsum(
      f"pkgtd,pk{block.order}->pkgtc",
      query.astype(block.keys.dtype),
      block.keys,
      preferred_element_type=jnp.float32,
  )
  allowed = jnp.broadcast_to(mask[:, None, None], scores.shape)
  scores = jnp.where(allowed, scores, MASKED)
  peak = jnp.maximum(part.peak, jnp.max(scores, axis=-1))
  scale = jnp.exp(part.peak - peak)
  weights = jnp.where(allowed, jnp.exp(scores - peak[..., None]), 0.0)
  added = jnp.einsum(
      "pkgtc,pkcd->pkgtd",
      weights.astype(block.values.dtype),
      block.values,
      preferred_element_type=jnp.float32,
  )
  return Partial(
      peak=peak,
      total=part.total * scale + jnp.sum(weights, axis=-1),
      values=part.values * scale[..., None] + added,
  )


def attended(part: Partial, dtype: jnp.dtype) -> Float[Array, "P T Hkv G D"]:
  """Finishes an attention: o / z.

  Args:
    part: every query must have seen a token.
    dtype: of the result.

  Returns:
    The weighted means of the values.
  """
  mean = part.values / part.total[..., None]
  return jnp.transpose(mean, (0, 3, 1, 2, 4)).astype(dtype)
