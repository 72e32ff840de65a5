"""The cache of keys and values: S slots, in blocks of fixed width.

Blocks are attended one after another (`policy.online`), so those that no stream
needs are skipped; they are written and copied one by one for the same reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax.policy.config import TransformerConfig

Blocks = tuple[Array, ...]


@flax.struct.dataclass
class KVCache:
  """Rotated keys, and values, of S slots; C tokens a block."""

  keys: tuple[Blocks, ...]  # L × blocks of [S, Hkv, C, D]
  values: tuple[Blocks, ...]  # L × blocks of [S, Hkv, C, D]
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
    config: sizes; the cache has its activations' dtype.
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
    shape = (number, config.num_kv_heads, block, config.cache_dim)
    blocks = range(-(-length // block))

    def layers() -> tuple[Blocks, ...]:
      return tuple(
          tuple(jnp.zeros(shape, config.dtype) for _ in blocks)
          for _ in range(config.num_layers)
      )

    return KVCache(keys=layers(), values=layers(), tile=tile)

  tile = slots(num_rows, None) if num_rows < num_slots else None
  return slots(num_slots, tile)


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
    keys, values = jax.tree.map(
        lambda block: _with_slot(block, target, block, source),
        (cache.keys, cache.values),
    )
    return dataclasses.replace(cache, keys=keys, values=values)

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
  if held is None or len(held.keys[0][0]) != len(rows):
    raise ValueError(f"the cache must be made with num_rows={len(rows)}")
  longest = jnp.max(lengths)
  size = held.keys[0][0].shape[2]
  sources, places = [*cache.keys, *cache.values], [*held.keys, *held.values]

  def take_block(index: int) -> list[Array]:
    def put(place: Array, taken: list[Array]) -> list[Array]:
      return [
          _with_slot(old, place, layer[index], rows[place])
          for old, layer in zip(taken, sources, strict=True)
      ]

    # One gather would be hoisted out, and done for unused blocks, too.
    count = jnp.where(longest > index * size, len(rows), 0)
    return jax.lax.fori_loop(0, count, put, [one[index] for one in places])

  sides = tuple(zip(*map(take_block, range(len(sources[0]))), strict=True))
  return KVCache(keys=sides[: len(cache.keys)], values=sides[len(cache.keys) :])


def _with_slot(
    block: Array, index: Array, other: Array, source: Array
) -> Array:
  """A block with a slot of another one in place of one of its own."""
  slot = jax.lax.dynamic_index_in_dim(other, source, keepdims=False)
  return jax.lax.dynamic_update_index_in_dim(block, slot, index, axis=0)


def heads_first(x: Float[Array, "P T Hkv D"]) -> Float[Array, "P Hkv T D"]:
  """Brings keys or values into the order that the cache has.

  Args:
    x: as `transformer.project` gives them.

  Returns:
    The same numbers, tokens after heads.
  """
  return jnp.swapaxes(x, 1, 2)


def write(
    cache: KVCache,
    keys: Sequence[Float[Array, "P Hkv T D"]],
    values: Sequence[Float[Array, "P Hkv T D"]],
    slots: Int[Array, " P"],
    starts: Int[Array, " P"],
    lengths: Int[Array, " P"],
) -> KVCache:
  """Puts tokens into their slots; in place where the cache is donated.

  Each block is written by a loop of its own over the rows with tokens for it,
  so that the others cost nothing.

  Args:
    cache: to write to.
    keys: one array a layer, P rows of T tokens.
    values: likewise.
    slots: [P] int32, the row's slot; distinct where lengths are positive.
    starts: [P] int32, where in the slot the row's tokens go.
    lengths: [P] int32, how many of them.

  Returns:
    The cache.
  """
  layers, news = [*cache.keys, *cache.values], [*keys, *values]
  number, size = len(layers[0]), layers[0][0].shape[2]
  firsts = size * jnp.arange(number, dtype=jnp.int32)[:, None]
  ends = (starts + lengths)[None]
  touched = (starts[None] < firsts + size) & (
      jnp.maximum(starts[None], firsts) < ends
  )
  order = jnp.argsort(~touched, axis=1)
  counts = jnp.sum(touched, axis=1)

  def write_block(index: int) -> list[Array]:
    def put(place: Array, blocks: list[Array]) -> list[Array]:
      row = order[index, place]
      start = starts[row] - index * size
      return [
          _put(block, new, row, slots[row], start, lengths[row])
          for block, new in zip(blocks, news, strict=True)
      ]

    blocks = [layer[index] for layer in layers]
    return jax.lax.fori_loop(0, counts[index], put, blocks)

  sides = tuple(zip(*map(write_block, range(number)), strict=True))
  return dataclasses.replace(
      cache, keys=sides[: len(keys)], values=sides[len(keys) :]
  )


def _put(
    block: Float[Array, "S Hkv C D"],
    new: Float[Array, "P Hkv T D"],
    row: Int[Array, ""],
    slot: Int[Array, ""],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> Float[Array, "S Hkv C D"]:
  """Writes the part of a row that falls into a block `start` tokens before."""
  _, heads, width, head_dim = new.shape
  size = block.shape[2]
  window = min(width, size)
  begin = jnp.clip(start, 0, size - window)
  offsets = begin + jnp.arange(window) - start
  tokens = jax.lax.dynamic_index_in_dim(new, row, keepdims=True)
  tokens = jnp.take(tokens, offsets, axis=2, mode="clip")
  real = (offsets >= 0) & (offsets < length)
  corner = (slot, 0, begin, 0)
  old = jax.lax.dynamic_slice(block, corner, (1, heads, window, head_dim))
  merged = jnp.where(real[None, None, :, None], tokens, old)
  return jax.lax.dynamic_update_slice(block, merged, corner)
