"""Kernels turned or in tiles: the same numbers, in another order of storage."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from compiled import needs_compiler

from mgrpo_jax.policy import (
    arranging,
    decode,
    params,
    products,
    sampling,
    transformer,
)
from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.engine import Engine

FAMILIES = sorted(tiny_llama.FAMILIES)
ARRANGED = ("turned", pytest.param("tiled", marks=needs_compiler))
AXES = [("batch", "length")] * 3  # with no mesh they mean nothing


def configs(family, kernels="turned"):
  """A family as it is trained, and as a sampler on a CPU may run it."""
  kept = tiny_llama.config(**tiny_llama.FAMILIES[family])
  arranged = dataclasses.replace(kept, execution=Execution(kernels=kernels))
  return kept, arranged


def turned_back(held):
  """The matrix, outputs first, that was turned or cut into tiles."""
  if isinstance(held, products.Turned):
    return held.matrix
  assert held.tiles.dtype == np.float32
  side_by_side = np.concatenate(held.tiles, axis=1).T
  number = sum(int(np.prod(shape)) for shape in held.outputs)
  assert not side_by_side[number:].any()
  return side_by_side[:number]


@pytest.mark.parametrize("kernels", ARRANGED)
@pytest.mark.parametrize("family", FAMILIES)
def test_arranged_kernels_hold_the_same_numbers(family, kernels):
  _, config = configs(family, kernels)
  weights = tiny_llama.weights(config)
  arranged = arranging.arrange(weights, config=config)
  for one, specs, layer in zip(
      arranged.layers,
      params.param_specs(config).layers,
      weights.layers,
      strict=True,
  ):
    joined = [("query", "key", "value"), ("output",)]
    if layer.router is None:
      joined += [("gate", "up"), ("down",)]
    else:
      assert (one.gate, one.up, one.down) == (layer.gate, layer.up, layer.down)
    for names in joined:
      held = getattr(one, names[0])
      assert all(getattr(one, name) is None for name in names[1:])
      matrix = turned_back(held)
      start = 0
      for name, outputs in zip(names, held.outputs, strict=True):
        kernel, inputs = getattr(layer, name), getattr(specs, name).inputs
        assert outputs == kernel.shape[inputs:]
        stop = start + int(np.prod(outputs))
        back = np.asarray(matrix[start:stop]).T.reshape(kernel.shape)
        np.testing.assert_array_equal(back, kernel)
        start = stop
      assert start == len(matrix)


@pytest.mark.parametrize("kernels", ARRANGED)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_arranged_head_holds_the_same_numbers(family, kernels):
  _, config = configs(family, kernels)
  weights = tiny_llama.weights(config)
  head = arranging.arrange(weights, config=config).unembedding
  assert head.outputs == ((config.vocab_size,),)
  if not config.tied_embeddings:
    np.testing.assert_array_equal(turned_back(head).T, weights.unembedding)
  elif kernels == "turned":
    assert head.matrix is weights.embedding
  else:
    np.testing.assert_array_equal(turned_back(head), weights.embedding)


def logits(family, kernels="turned", **changes):
  """Of random tokens, as trained and with kernels arranged."""
  kept, config = (
      dataclasses.replace(one, **changes) for one in configs(family, kernels)
  )
  weights = tiny_llama.weights(kept)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, kept.vocab_size, (3, 7)).astype(np.int32)
  positions = np.tile(np.arange(7, dtype=np.int32), (3, 1))
  segments = np.ones((3, 7), np.int32)
  apply = jax.jit(transformer.apply, static_argnames="config")
  plain = apply(weights, tokens, positions, segments, config=kept)
  arranged = arranging.arrange(weights, config=config)
  return plain, apply(arranged, tokens, positions, segments, config=config)


@pytest.mark.parametrize("kernels", ARRANGED)
@pytest.mark.parametrize("family", FAMILIES)
def test_arranged_layers_compute_the_same_logits(family, kernels):
  plain, found = logits(family, kernels)
  # Sums of at most 24 terms of size 1, associated otherwise, in a few layers.
  np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_turned_layers_are_as_exact_in_half_precision(family):
  exact, _ = logits(family)
  errors = [
      np.sqrt(np.mean((one - exact) ** 2))
      for one in logits(family, dtype="bfloat16")
  ]
  # A few layers of roundings to 8 bits, none of them the other's; where one
  # sends a token to another expert, both are far off.
  assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("number", [1, products.FEW, products.FEW + 1])
def test_few_and_many_tokens_are_multiplied_alike(number):
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
  x = rng.normal(size=(1, number, 2, 3)).astype(np.float32)
  turned = products.Turned(
      matrix=kernel.reshape(6, 20).T.copy(), outputs=((4, 5),)
  )
  found = jax.jit(products.multiply)(x, turned)
  expected = np.tensordot(x.astype(np.float64), kernel, axes=2)
  # Six terms of size 1 in float32.
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("number", [1, products.FEW, products.FEW + 1])
def test_joined_kernels_are_multiplied_apart(number):
  rng = np.random.default_rng(0)
  kernels = [
      rng.normal(size=(6, *shape)).astype(np.float32)
      for shape in ((2, 3), (5,), (1, 2))
  ]
  x = rng.normal(size=(1, number, 6)).astype(np.float32)
  joined = products.Turned(
      matrix=np.concatenate([kernel.reshape(6, -1).T for kernel in kernels]),
      outputs=((2, 3), (5,), (1, 2)),
  )
  multiply = jax.jit(
      lambda x, weights: products.multiply_each(x, weights, AXES)
  )
  for weights in ((joined, None, None), kernels):
    for found, kernel in zip(multiply(x, weights), kernels, strict=True):
      expected = np.tensordot(x.astype(np.float64), kernel, axes=1)
      # Six terms of size 1 in float32.
      np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("number", [1, 3, products.FEW, products.FEW + 1])
def test_half_precision_is_rounded_once_at_the_end(number):
  rng = np.random.default_rng(0)
  matrix = rng.normal(size=(20, 300)).astype(jnp.bfloat16)
  x = rng.normal(size=(1, number, 300)).astype(jnp.bfloat16)
  turned = products.Turned(matrix=matrix, outputs=((20,),))
  found = jax.jit(products.multiply)(x, turned)
  assert found.dtype == jnp.bfloat16
  expected = x.astype(np.float64) @ matrix.astype(np.float64).T
  # A rounding of sums of size 17, whose parts are 300 in float32.
  np.testing.assert_allclose(
      np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-4
  )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("number", [2, 12, 31, 32, 64, products.FEW])
@pytest.mark.parametrize("sizes", [(24, 40), (96, 288), (576, 192)])
def test_a_product_does_not_depend_on_the_row_it_stands_in(
    number, sizes, dtype
):
  rng = np.random.default_rng(0)
  turned = products.Turned(
      matrix=rng.normal(size=sizes[::-1]).astype(dtype),
      outputs=(sizes[1:],),
  )
  x = np.tile(rng.normal(size=sizes[0]).astype(dtype), (1, number, 1))
  found = np.asarray(jax.jit(products.multiply)(x, turned))[0]
  np.testing.assert_array_equal(found, np.tile(found[:1], (number, 1)))


def compiled_prefill(config, weights, cache):
  """The program that adds three tokens to each of two slots."""
  tokens, row = np.zeros((2, 3), np.int32), np.zeros(2, np.int32)
  prefill = jax.jit(decode.prefill, static_argnames="config")
  return prefill.lower(weights, cache, tokens, row, row, row, config=config)


def compiled_decode(config, weights, cache):
  """The program that samples three tokens in each of two slots."""
  row = np.zeros(2, np.int32)
  slots = decode.Slots(
      token=row, length=row, budget=row, seed=np.zeros((2, 2), np.uint32),
      drawing=sampling.plainly(2), stop_ids=np.zeros((2, 1), np.int32),
  )  # fmt: skip
  sample = jax.jit(
      decode.decode, static_argnames=("config", "num_steps", "num_rows")
  )
  return sample.lower(
      weights, cache, slots, config=config, num_steps=3, num_rows=2
  )


@pytest.mark.parametrize("kernels", ARRANGED)
@pytest.mark.parametrize("lower", [compiled_prefill, compiled_decode])
def test_angles_are_computed_once_for_all_layers(lower, kernels):
  _, config = configs("llama", kernels)
  weights = arranging.arrange(tiny_llama.weights(config), config=config)
  cache = caching.init(config, num_slots=2, length=16, block=8, num_rows=2)
  program = lower(config, weights, cache).compile().as_text()
  assert config.num_layers > 1
  assert program.count(" cosine(") == program.count(" sine(") == 1


def sampled(config, mesh=None):
  """What an engine says to two prompts."""
  engine = Engine(
      config, tiny_llama.weights(config), 0, num_slots=4, context=32, block=8,
      prefill_tokens=16, prefill_buckets=(8,), decode_steps=4, decode_rows=0,
      mesh=mesh,
  )  # fmt: skip
  sampling = Sampling(temperature=1.0, max_new_tokens=9, stop_ids=())

  async def ask():
    async with engine:
      asked = (engine.generate(p, sampling, 7) for p in ([1, 2], [3, 4, 5, 6]))
      first = await asyncio.gather(*asked)
      engine.update(tiny_llama.weights(config, 1), 1)
      return [*first, await engine.generate([1, 2], sampling, 7)]

  return asyncio.run(ask())


@pytest.mark.parametrize("kernels", ARRANGED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_an_engine_that_arranges_kernels_samples_the_same(family, kernels):
  kept, config = configs(family, kernels)
  for one, other in zip(sampled(kept), sampled(config), strict=True):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert one.version_max == other.version_max


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_a_turned_engine_in_half_precision_samples_from_the_same(family):
  """Its cache and embedding are wide; what it computes with them is not."""
  kept, config = (
      dataclasses.replace(one, dtype="bfloat16") for one in configs(family)
  )
  assert (kept.cache_dtype, config.cache_dtype) == ("bfloat16", "float32")
  for one, other in zip(sampled(kept), sampled(config), strict=True):
    alike = [*(one.tokens == other.tokens), False]
    until = alike.index(False)  # rounded otherwise, another token is drawn
    np.testing.assert_allclose(
        one.logprobs[:until], other.logprobs[:until], atol=0.05
    )
    assert until > 1


def test_a_wide_embedding_is_rounded_where_it_is_looked_up():
  _, config = configs("llama")
  config = dataclasses.replace(config, dtype="bfloat16")
  weights = jax.tree.map(
      lambda one: jnp.asarray(one, jnp.bfloat16), tiny_llama.weights(config)
  )
  turned = arranging.arrange(weights, config=config)
  assert turned.embedding.dtype == jnp.float32
  rows = transformer.embed(turned, np.array([[3, 5]]), config=config)
  assert rows.dtype == jnp.bfloat16
  np.testing.assert_array_equal(rows[0], weights.embedding[np.array([3, 5])])


@pytest.mark.parametrize("kernels", ARRANGED)
def test_kernels_on_a_mesh_are_not_arranged(kernels):
  mesh = jax.make_mesh((2,), ("tensor",))
  with pytest.raises(ValueError, match=f"'{kernels}' are for samplers without"):
    sampled(configs("llama", kernels)[1], mesh)
