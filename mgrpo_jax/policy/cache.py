"""The cache of keys and values: S slots, in blocks of fixed width.

Blocks are attended one after another (`policy.online`), so those that no stream
needs are skipped; they are written and copied one by one for the same reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax.policy.config import TransformerConfig


@flax.struct.dataclass
class Block:
  """Rotated keys, and values, of C tokens of each of S streams."""

  keys: Any  # [S, Hkv, D, C] or [S, Hkv, C, D], as `order` says
  values: Any  # [S, Hkv, C, D]
  order: Literal["dc", "cd"] = flax.struct.field(pytree_node=False)

  @property
  def size(self) -> int:
    """C, the number of its tokens."""
    return self.values.shape[2]

  @property
  def axes(self) -> Block:
    """The axis of the tokens, in place of each array."""
    return Block(keys=2 + self.order.index("c"), values=2, order=self.order)


Blocks = tuple[Block, ...]  # of one layer, or one of each


@flax.struct.dataclass
class KVCache:
  """What S slots hold of every layer, block after block."""

  layers: tuple[Blocks, ...]  # L × blocks of S streams
  # Where R of the slots are copied to, see `take`; None where none ever are.
  # Kept, not made anew, because new memory costs by its size, used or not.
  tile: KVCache | None = None


def init(
    config: TransformerConfig,
    *,
    num_slots: int,
    length: int,
    block: int,
    num_rows: int,
) -> KVCache:
  """Makes an empty cache.

  Args:
    config: sizes; the cache has `config.cache_dtype`.
    num_slots: S.
    length: tokens a slot can hold, rounded up to whole blocks.
    block: C, tokens in a block, the unit in which unused cache is skipped.
    num_rows: R, slots that `decode` computes together; fewer than S need a
      tile.

  Returns:
    Zeros.

  Raises:
    ValueError: if a size is not positive.
  """
  sizes = {"num_slots": num_slots, "length": length, "block": block}
  for name, size in (sizes | {"num_rows": num_rows}).items():
    if size < 1:
      raise ValueError(f"{name} must be >= 1, got {size!r}")

  def slots(number: int, tile: KVCache | None) -> KVCache:
    layers = tuple(
        tuple(
            empty(config, streams=number, size=block)
            for _ in range(-(-length // block))
        )
        for _ in range(config.num_layers)
    )
    return KVCache(layers=layers, tile=tile)

  tile = slots(num_rows, None) if num_rows < num_slots else None
  return slots(num_slots, tile)


def empty(config: TransformerConfig, *, streams: int, size: int) -> Block:
  """Makes an empty block.

  Args:
    config: sizes, and the dtype of a cache.
    streams: S.
    size: C, tokens.

  Returns:
    Zeros.
  """
  shape = (streams, size, config.num_kv_heads, config.cache_dim)
  zeros = jnp.zeros(shape, config.cache_dtype)
  return arranged(zeros, zeros, config=config)


def copy_slots(
    cache: KVCache, sources: Int[Array, " R"], targets: Int[Array, " R"]
) -> KVCache:
  """Copies whole slots, one after another.

  Args:
    cache: of S slots.
    sources: [R] int32 slots.
    targets: [R] int32 slots; equal to the source where nothing is to do.

  Returns:
    The cache.
  """

  def copy(index: Array, cache: KVCache) -> KVCache:
    source, target = sources[index], targets[index]
    layers = jax.tree.map(
        lambda block: _with_slot(block, target, block, source), cache.layers
    )
    return dataclasses.replace(cache, layers=layers)

  return jax.lax.fori_loop(0, len(sources), copy, cache)


def take(
    cache: KVCache, rows: Int[Array, " R"], lengths: Int[Array, " R"]
) -> KVCache:
  """Copies some slots into the tile, as far as the longest of them is filled.

  Gathering once what many steps read costs less than gathering at each step.

  Args:
    cache: of S slots, with a tile of R.
    rows: [R] int32 slots; beyond the last one, any.
    lengths: [R] int32, tokens in use.

  Returns:
    The tile, in place where the cache is donated; blocks that none of the
    slots fills are left as they were.

  Raises:
    ValueError: the cache has no tile of R slots.
  """
  held = cache.tile
  if held is None or len(held.layers[0][0].values) != len(rows):
    raise ValueError(f"the cache must be made with num_rows={len(rows)}")
  longest = jnp.max(lengths)
  size = held.layers[0][0].size

  def take_block(index: int) -> Blocks:
    def put_slot(place: Array, taken: Blocks) -> Blocks:
      return jax.tree.map(
          lambda old, block: _with_slot(old, place, block, rows[place]),
          taken,
          tuple(layer[index] for layer in cache.layers),
      )

    # One gather would be hoisted out, and done for unused blocks, too.
    count = jnp.where(longest > index * size, len(rows), 0)
    taken = tuple(layer[index] for layer in held.layers)
    return jax.lax.fori_loop(0, count, put_slot, taken)

  return KVCache(layers=_by_layer(take_block, len(held.layers[0])))


def _by_layer(
    of_block: Callable[[int], Blocks], number: int
) -> tuple[Blocks, ...]:
  """Layers of blocks, from a function that gives a block of every layer."""
  return tuple(zip(*map(of_block, range(number)), strict=True))


def _with_slot(
    block: Array, index: Array, other: Array, source: Array
) -> Array:
  """A block with a slot of another one in place of one of its own."""
  slot = jax.lax.dynamic_index_in_dim(other, source, keepdims=False)
  return jax.lax.dynamic_update_index_in_dim(block, slot, index, axis=0)


def arranged(
    key: Float[Array, "P T Hkv D"],
    value: Float[Array, "P T Hkv D"],
    *,
    config: TransformerConfig,
) -> Block:
  """Brings keys and values into the order that the cache has.

  Args:
    key: as `transformer.project` gives them.
    value: likewise.
    config: says which order keys have, and the dtype of both.

  Returns:
    A block of T tokens of each of P streams.
  """
  order = config.key_order
  return Block(
      keys=jnp.einsum(f"pckd->pk{order}", key).astype(config.cache_dtype),
      values=jnp.swapaxes(value, 1, 2).astype(config.cache_dtype),
      order=order,
  )


def put(block: Block, new: Block, start: Int[Array, ""]) -> Block:
  """Puts tokens into a block.

  Args:
    block: of C tokens.
    new: of as many streams; all of its tokens fit in behind `start`.
    start: [] int32, where in the block they go.

  Returns:
    The block, in place where it can be.
  """
  return jax.tree.map(
      lambda axis, old, added: jax.lax.dynamic_update_slice_in_dim(
          old, added, start, axis
      ),
      block.axes,
      block,
      new,
  )


def write(
    cache: KVCache,
    news: Blocks,
    slots: Int[Array, " P"],
    starts: Int[Array, " P"],
    lengths: Int[Array, " P"],
) -> KVCache:
  """Puts tokens into their slots; in place where the cache is donated.

  Each block is written by a loop of its own over the rows with tokens for it,
  so that the others cost nothing.

  Args:
    cache: to write to.
    news: one a layer, T tokens of each of P rows.
    slots: [P] int32, the row's slot; distinct where lengths are positive.
    starts: [P] int32, where in the slot the row's tokens go.
    lengths: [P] int32, how many of them.

  Returns:
    The cache.
  """
  number, size = len(cache.layers[0]), cache.layers[0][0].size
  firsts = size * jnp.arange(number, dtype=jnp.int32)[:, None]
  ends = (starts + lengths)[None]
  touched = (starts[None] < firsts + size) & (
      jnp.maximum(starts[None], firsts) < ends
  )
  order = jnp.argsort(~touched, axis=1)
  counts = jnp.sum(touched, axis=1)

  def write_block(index: int) -> Blocks:
    def put_row(place: Array, blocks: Blocks) -> Blocks:
      row = order[index, place]
      start = starts[row] - index * size
      return jax.tree.map(
          lambda axis, old, new: _put_row(
              old, new, row, slots[row], start, lengths[row], axis
          ),
          tuple(new.axes for new in news),
          blocks,
          news,
      )

    blocks = tuple(layer[index] for layer in cache.layers)
    return jax.lax.fori_loop(0, counts[index], put_row, blocks)

  return dataclasses.replace(cache, layers=_by_layer(write_block, number))


def _put_row(
    block: Float[Array, "S Hkv ..."],
    new: Float[Array, "P Hkv ..."],
    row: Int[Array, ""],
    slot: Int[Array, ""],
    start: Int[Array, ""],
    length: Int[Array, ""],
    axis: int,
) -> Float[Array, "S Hkv ..."]:
  """Writes the part of a row that falls into a block `start` tokens before."""
  width, size = new.shape[axis], block.shape[axis]
  window = min(width, size)
  begin = jnp.clip(start, 0, size - window)
  offsets = begin + jnp.arange(window) - start
  tokens = jax.lax.dynamic_index_in_dim(new, row, keepdims=True)
  tokens = jnp.take(tokens, offsets, axis, mode="clip")
  real = (offsets >= 0) & (offsets < length)
  real = jnp.expand_dims(
      real, [one for one in range(block.ndim) if one != axis]
  )
  corner: list[Any] = [slot, *[0] * (block.ndim - 1)]
  corner[axis] = begin
  old = jax.lax.dynamic_slice(block, corner, tokens.shape)
  merged = jnp.where(real, tokens, old)
  return jax.lax.dynamic_update_slice(block, merged, corner)
