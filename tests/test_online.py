"""Attention to a cache against NumPy, in both orders of its keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy import online, paged
from mgrpo_jax.policy.cache import Block
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.testing.sizes import tiny_config

CONFIGS = {
    order: tiny_config(
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        execution=Execution(decode_attention=kernel),
    )
    for order, kernel in (("dc", None), ("cd", paged.ATTENTION))
}
SIZE, BLOCKS = 8, 3
LENGTHS = (0, 17, 24, 6)  # tokens cached; SIZE * BLOCKS at most
STEPS = 4  # tokens of each stream beside the cache


def of(order, keys, values):
  """A block of [S, C, Hkv, D] keys and values."""
  return caching.arranged(
      jnp.asarray(keys), jnp.asarray(values), config=CONFIGS[order]
  )


@pytest.fixture(params=CONFIGS)
def order(request):
  return request.param


def drawn(order):
  """Queries, cached keys and values, and those beside the cache."""
  rng = np.random.default_rng(0)
  config = CONFIGS[order]
  streams, heads, dim = len(LENGTHS), config.num_kv_heads, config.cache_dim
  query = rng.normal(size=(streams, STEPS, heads, 3, dim)) * dim**-0.5
  cached = rng.normal(size=(2, streams, SIZE * BLOCKS, heads, dim))
  own = rng.normal(size=(2, streams, STEPS, heads, dim))
  return (one.astype(np.float32) for one in (query, cached, own))


def mean_of(query, keys, values):
  """One query's [D] attention to [n, D] keys and values."""
  weights = np.exp(keys @ query - np.max(keys @ query))
  return weights @ values / np.sum(weights)


def test_scores_are_softmax_over_what_is_seen(order):
  query, cached, own = drawn(order)
  picked = np.array([2, 0, 3, 1])  # streams do not stand in the rows' order
  lengths = np.asarray(LENGTHS, np.int32)[picked]
  positions = lengths[:, None] + np.arange(STEPS, dtype=np.int32)
  blocks = tuple(
      of(order, *cached[:, :, start : start + SIZE])
      for start in range(0, SIZE * BLOCKS, SIZE)
  )
  for window in (0, 1, 5, 13):

    attend = jax.jit(functools.partial(online.attend_streams, window=window))
    found = attend(
        query, blocks, of(order, *own), lengths, jnp.int32(0), slots=picked
    )
    for row, time, head, one in np.ndindex(*found.shape[:-1]):
      cut = lengths[row]
      keys, values = (
          np.concatenate([old[picked[row], :cut, head], new[row, :, head]])
          for old, new in zip(cached, own, strict=True)
      )
      last = positions[row, time] + 1
      seen = slice(max(0, last - window) if window else 0, last)
      np.testing.assert_allclose(
          found[row, time, head, one],
          mean_of(query[row, time, head, one], keys[seen], values[seen]),
          atol=2e-6,
      )


def test_two_tokens_by_hand():
  """Scores 0 and log 3: weights a quarter and three."""
  block = Block(
      jnp.array([[[[0.0, np.log(3.0)]]]]), jnp.array([[[[4.0], [8.0]]]]), "dc"
  )
  part = online.Partial(
      peak=jnp.full((1, 1, 1, 1), -1e9),
      total=jnp.zeros((1, 1, 1, 1)),
      values=jnp.zeros((1, 1, 1, 1, 1)),
  )
  part = online.attend(
      part, jnp.ones((1, 1, 1, 1, 1)), block, jnp.ones((1, 1, 2), bool)
  )
  assert online.attended(part, jnp.float32).item() == pytest.approx(7.0)


def test_tokens_that_are_masked_change_no_bit(order):
  query, cached, _ = drawn(order)
  block = of(order, *cached[:, :, :SIZE])
  before = online.Partial(
      peak=jnp.zeros((4, 2, 3, STEPS)),
      total=jnp.ones((4, 2, 3, STEPS)),
      values=jnp.asarray(query).transpose(0, 2, 3, 1, 4),
  )
  after = online.attend(
      before,
      online.heads_first(jnp.asarray(query)),
      block,
      jnp.zeros((4, STEPS, SIZE), bool),
  )
  pairs = zip(*map(jax.tree.leaves, (before, after)), strict=True)
  assert all(np.array_equal(*pair) for pair in pairs)


def test_nothing_is_turned(order):
  """Neither what is cached nor a product of it."""
  query, cached, _ = drawn(order)
  part = online.Partial(
      peak=jnp.zeros((4, 2, 3, STEPS)),
      total=jnp.zeros((4, 2, 3, STEPS)),
      values=jnp.zeros((4, 2, 3, STEPS, query.shape[-1])),
  )
  made = jax.make_jaxpr(online.attend)(
      part,
      online.heads_first(jnp.asarray(query)),
      of(order, *cached[:, :, :SIZE]),
      jnp.ones((4, STEPS, SIZE), bool),
  )
  names = [equation.primitive.name for equation in made.eqns]
  assert names.count("dot_general") == 2 and "transpose" not in names
