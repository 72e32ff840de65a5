"""What is written to a cache, copied and taken, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy import paged
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.testing.sizes import tiny_config

SLOTS, ROWS, SIZE, BLOCKS = 5, 3, 8, 3
CONFIGS = {
    order: tiny_config(
        num_kv_heads=2, execution=Execution(decode_attention=kernel)
    )
    for order, kernel in (("dc", None), ("cd", paged.ATTENTION))
}
WRITE = jax.jit(caching.write)


@pytest.fixture(params=CONFIGS)
def config(request):
  return CONFIGS[request.param]


def empty(config):
  return caching.init(
      config,
      num_slots=SLOTS,
      length=SIZE * BLOCKS - 3,  # rounded up
      block=SIZE,
      num_rows=ROWS,
  )


def read(cache):
  """Keys and values as [L, 2, S, tokens, Hkv, D]."""

  def side(keys, order):
    return np.einsum(f"pk{order}->pckd", keys)

  return np.stack(
      [
          [
              np.concatenate([side(b.keys, b.order) for b in layer], 1),
              np.concatenate([side(b.values, "cd") for b in layer], 1),
          ]
          for layer in cache.layers
      ]
  )


def filled(config, *, times, width):
  """A cache after random writes, and what it should hold."""
  rng = np.random.default_rng(width)
  cache = empty(config)
  expected = read(cache).copy()
  for number in range(times):
    slots = rng.permutation(SLOTS)[:4].astype(np.int32)
    lengths = rng.integers(0, width + 1, 4).astype(np.int32)
    if number % 2:
      slots[0], lengths[0] = SLOTS, 0  # a row that stands for none
    starts = [rng.integers(0, SIZE * BLOCKS - one + 1) for one in lengths]
    shape = (config.num_layers, 2, 4, width, 2, config.cache_dim)
    new = rng.normal(size=shape).astype(np.float32)
    cache = WRITE(
        cache,
        tuple(
            caching.arranged(*map(jnp.asarray, one), config=config)
            for one in new
        ),
        slots,
        np.asarray(starts, np.int32),
        lengths,
    )
    for row, (slot, start, length) in enumerate(
        zip(slots, starts, lengths, strict=True)
    ):
      if length:
        tokens = new[:, :, row, :length]
        expected[:, :, slot, start : start + length] = tokens
  return cache, expected


# Of a part of a block, of a block, and over two borders.
@pytest.mark.parametrize("width", [3, SIZE, 2 * SIZE + 3])
def test_rows_stand_where_they_were_written(config, width):
  cache, expected = filled(config, times=12, width=width)
  np.testing.assert_array_equal(read(cache), expected)


def test_slots_are_copied(config):
  cache, expected = filled(config, times=6, width=11)
  copied = jax.jit(caching.copy_slots)(
      cache, np.array([1, 3], np.int32), np.array([0, 4], np.int32)
  )
  expected[:, :, [0, 4]] = expected[:, :, [1, 3]]
  np.testing.assert_array_equal(read(copied), expected)


def test_a_tile_has_the_blocks_that_its_rows_fill(config):
  cache, expected = filled(config, times=6, width=11)
  rows = np.array([3, 1, SLOTS], np.int32)  # beyond the last: any
  tile = jax.jit(caching.take)(cache, rows, np.array([9, 2, 0], np.int32))
  found = read(tile)
  taken = expected[:, :, [3, 1], : 2 * SIZE]
  np.testing.assert_array_equal(found[:, :, :2, : 2 * SIZE], taken)
  assert not found[..., 2 * SIZE :, :, :].any()


def test_tokens_are_put_into_a_block(config):
  rng = np.random.default_rng(0)
  keys, values = rng.normal(size=(2, SLOTS, SIZE, 2, config.cache_dim)).astype(
      np.float32
  )
  block = caching.empty(config, streams=SLOTS, size=SIZE)
  for place in range(SIZE):
    new = caching.arranged(
        jnp.asarray(keys[:, [place]]),
        jnp.asarray(values[:, [place]]),
        config=config,
    )
    block = caching.put(block, new, jnp.int32(place))
  whole = caching.arranged(
      jnp.asarray(keys), jnp.asarray(values), config=config
  )
  jax.tree.map(np.testing.assert_array_equal, block, whole)
  assert block.size == SIZE and block.order == config.key_order
