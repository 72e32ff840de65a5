"""The kernel for TPUs, simulated, against attention block by block."""

import asyncio
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgrpo_jax import sharding
from mgrpo_jax.policy import online, paged, params
from mgrpo_jax.policy.cache import Block
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.testing.sizes import tiny_config

SIMULATED = dataclasses.replace(
    paged.ATTENTION,
    attend=functools.partial(paged.attend_streams, interpret=True),
)
SIZES = {
    "num_slots": 2,
    "context": 48,
    "block": 48,
    "prefill_tokens": 32,
    "prefill_buckets": (16, 32),
    "decode_steps": 4,
    "decode_rows": 0,
}


def drawn(seed, slots, heads, group, length, head_dim):
  """Queries, keys and values; what no stream has cached is large."""
  rng = np.random.default_rng(seed)
  query = rng.normal(size=(slots, heads, group, 1, head_dim))
  query *= head_dim**-0.5
  sides = rng.normal(size=(2, slots, heads, length, head_dim))
  lengths = rng.integers(0, length + 1, slots).astype(np.int32)
  lengths[: min(3, slots)] = [0, length, 1][: min(3, slots)]
  unused = np.arange(length) >= lengths[:, None]
  sides = np.where(unused[:, None, :, None], 1e3, sides)
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in (query, *sides)]
  return arrays, lengths


def by_blocks(query, keys, values, lengths):
  positions = jnp.maximum(lengths, 1)[:, None]
  return online.attend_cached(
      query, (Block(keys, values, "cd"),), lengths, lambda block: block,
      positions=positions, window=0,
  )  # fmt: skip


@pytest.mark.parametrize(
    ("slots", "heads", "group", "length", "head_dim"),
    [
        (4, 2, 3, 48, 64),  # pages of 16, all three at a time
        (3, 1, 8, 640, 128),  # five of 128, one at a time
    ],
)
def test_the_kernel_attends_as_blocks_do(slots, heads, group, length, head_dim):
  (query, keys, values), lengths = drawn(
      0, slots, heads, group, length, head_dim
  )
  wanted = by_blocks(query, keys, values, lengths)
  actual = paged.attend(
      query, (Block(keys, values, "cd"),), lengths, window=0, interpret=True
  )
  some = np.asarray(lengths) > 0
  for name in ("peak", "total"):
    one, other = getattr(wanted, name), getattr(actual, name)
    assert one.shape == other.shape
    np.testing.assert_allclose(other[some], one[some], rtol=1e-4, atol=1e-4)
  means = [
      np.asarray(part.values)[some] / np.asarray(part.total)[some][..., None]
      for part in (wanted, actual)
  ]
  # Blocks round weights to bfloat16 before they meet values, the kernel not.
  np.testing.assert_allclose(means[1], means[0], atol=2e-2)
  # Nothing seen: it adds nothing to what comes after.
  assert (np.asarray(actual.total)[~some] == 0).all()
  assert (np.asarray(actual.values)[~some] == 0).all()
  own = jnp.ones((slots, heads, 1, head_dim), jnp.bfloat16)
  seen = jnp.ones((slots, 1, 1), bool)
  after = online.attend(actual, query, Block(own, own, "cd"), seen)
  mean = online.attended(after, jnp.float32)
  np.testing.assert_allclose(mean[~some], 1.0, atol=1e-6)


async def completions(config, weights):
  engine = Engine(config, weights, 0, **SIZES)
  sampling = Sampling(temperature=1.0, max_new_tokens=9, stop_ids=())
  async with engine:
    return await asyncio.gather(
        *(
            engine.generate(list(range(4, 5 + 7 * number)), sampling, number)
            for number in (0, 1, 2)
        )
    )


def test_an_engine_with_the_kernel_draws_what_one_without_draws():
  config = tiny_config(
      num_heads=4, num_kv_heads=2, head_dim=8, num_layers=1, dtype="bfloat16"
  )
  weights = jax.jit(params.init, static_argnums=1)(jax.random.key(0), config)
  kernel = dataclasses.replace(
      config, execution=Execution(decode_attention=SIMULATED)
  )
  wanted = asyncio.run(completions(config, weights))
  actual = asyncio.run(completions(kernel, weights))
  for one, other in zip(wanted, actual, strict=True):
    np.testing.assert_array_equal(other.tokens, one.tokens)
    # bfloat16 has 8 bits: weights of attention are rounded on one side only.
    np.testing.assert_allclose(other.logprobs, one.logprobs, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "sizes", "hint"),
    [
        ({"dtype": "float32"}, {}, "for dtype bfloat16, to which it rounds"),
        ({"windows": (8, 0)}, {}, "layers without a window"),
        ({}, {"block": 16}, "block >= context"),
        ({}, {"decode_rows": 1}, "decode_rows 0"),
        ({}, {"context": 40, "block": 40}, "a multiple of 16 tokens, not 40"),
        ({}, {"num_slots": 63_000}, "bytes of lengths and page"),
    ],
)
def test_what_the_kernel_cannot_do_is_said_before_anything_is_made(
    changes, sizes, hint
):
  config = tiny_config(
      **{"dtype": "bfloat16"} | changes,
      execution=Execution(decode_attention=paged.ATTENTION),
  )
  with pytest.raises(ValueError, match=hint):
    Engine(config, None, 0, **SIZES | sizes)


def test_the_kernel_is_for_one_device():
  config = tiny_config(
      dtype="bfloat16", execution=Execution(decode_attention=paged.ATTENTION)
  )
  mesh = sharding.sampler_mesh(jax.devices()[:2])
  with pytest.raises(ValueError, match="a sampler of one device, not 2"):
    Engine(config, None, 0, mesh=mesh, **SIZES)


def test_a_kernel_called_for_what_it_cannot_do_says_so():
  side = jnp.zeros((2, 1, 16, 8))
  block, turned = Block(side, side, "cd"), Block(side, side, "dc")
  query = jnp.zeros((2, 1, 1, 1, 8))
  lengths = jnp.zeros(2, jnp.int32)
  for blocks, window in (
      ((block,), 4),
      ((block, block), 0),
      ((turned,), 0),
  ):
    with pytest.raises(ValueError, match="window must be 0 and the cache one"):
      paged.attend(query, blocks, lengths, window=window)
