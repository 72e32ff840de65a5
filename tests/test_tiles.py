"""Products of a CPU's own: exact, and alike for all."""

import concurrent.futures
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from compiled import needs_compiler

from mgrpo_jax.policy import products
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.policy.native import build, tiles
from mgrpo_jax.sampler.engine import Engine

pytestmark = needs_compiler
multiply = jax.jit(tiles.multiply)


def columns():
  """Outputs of a tile."""
  return int(build.library().MgrpoTileColumns())


def cut(kernels, outputs):
  return tiles.cut(kernels, outputs, columns=columns())


def whole_numbers(rng, *shape):
  """Of which sums of products are exact in float32, in any order."""
  return rng.integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("outputs", [1, 15, 16, 31, 33, 192, 960])
@pytest.mark.parametrize("inputs", [0, 1, 7, 64, 577])
def test_products_are_exact_for_all_shapes(inputs, outputs):
  rng = np.random.default_rng((inputs, outputs))
  kernel = whole_numbers(rng, inputs, outputs)
  kept = cut([kernel], [(outputs,)])
  for number in (0, 1, 2, 3, 5, 6, 7, 11, 12, 13, 25, 64, 101):
    rows = whole_numbers(rng, number, inputs)
    found = multiply(rows, kept)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, rows @ kernel)


def test_no_share_goes_beyond_the_last_tile():
  """Three tiles a share, and one that is left over."""
  rng = np.random.default_rng(0)
  outputs = columns() * ((os.cpu_count() or 1) * 8 * 3 + 1)
  kernel = whole_numbers(rng, 24, outputs)
  rows = whole_numbers(rng, 5, 24)
  found = multiply(rows, cut([kernel], [(outputs,)]))
  np.testing.assert_array_equal(found, rows @ kernel)


def test_kernels_are_kept_in_float32():
  kept = cut([np.ones((3, 2), np.float16)], [(2,)])
  assert kept.tiles.dtype == jnp.float32


@pytest.mark.parametrize("number", [2, 5, 7, 12, 13, 32, 100])
def test_a_token_has_the_same_products_whoever_stands_beside_it(number):
  rng = np.random.default_rng(number)
  kept = cut([rng.normal(size=(576, 192))], [(192,)])
  rows = rng.normal(size=(number, 576)).astype(np.float32)
  together = np.asarray(multiply(rows, kept))
  for row in range(number):
    np.testing.assert_array_equal(
        multiply(rows[row : row + 1], kept)[0], together[row]
    )


def test_what_is_not_finite_stays_in_its_row_and_column():
  rng = np.random.default_rng(0)
  kernel = whole_numbers(rng, 20, 40)
  kernel[3, 7] = np.inf
  rows = np.abs(whole_numbers(rng, 9, 20)) + 1
  rows[4, 11] = np.nan
  with jax.debug_nans(False):
    found = np.asarray(multiply(rows, cut([kernel], [(40,)])))
  expected = rows @ kernel
  np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
  np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
  assert np.isnan(found[4]).all() and np.isinf(np.delete(found[:, 7], 4)).all()


def test_many_programs_at_once_all_come_to_their_end():
  """More than there are threads, so some find their helpers busy."""
  rng = np.random.default_rng(0)
  kernel = whole_numbers(rng, 300, 500)
  kept = cut([kernel], [(500,)])

  @jax.jit
  def several(rows):
    return [tiles.multiply(rows + i, kept) for i in range(8)]

  rows = whole_numbers(rng, 24, 300)
  expected = [(rows + i) @ kernel for i in range(8)]
  several(rows)
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    for found in pool.map(lambda _: several(rows), range(200), timeout=120):
      for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tokens_that_do_not_fit_are_refused():
  kept = cut([np.ones((4, 3), np.float32)], [(3,)])
  for rows in (np.ones((2, 5), np.float32), np.ones((2, 4), np.float16)):
    with pytest.raises(ValueError, match="rows must be float32 .N, 4., got"):
      multiply(rows, kept)
  with pytest.raises(ValueError, match="outputs .* are not those of"):
    cut([np.ones((4, 3), np.float32)], [(2,)])


def test_tiles_of_another_width_are_refused():
  kept = tiles.Tiled(
      tiles=np.ones((1, 4, columns() + 1), np.float32), outputs=((3,),)
  )
  with pytest.raises(Exception, match="tokens, tiles and products differ"):
    jax.block_until_ready(multiply(np.ones((2, 4), np.float32), kept))


def test_tiles_are_for_float32_alone():
  config = tiny_llama.config(
      dtype="bfloat16", execution=Execution(kernels="tiled")
  )
  with pytest.raises(ValueError, match="'tiled' are for float32"):
    Engine(config, tiny_llama.weights(config), 0, num_slots=2, context=16,
           block=8, prefill_tokens=8, prefill_buckets=(8,), decode_steps=2,
           decode_rows=0)  # fmt: skip
  with pytest.raises(ValueError, match="kernels must be one of"):
    Execution(kernels="outputs_first")


def test_arranging_is_for_whole_teams_of_kernels():
  rng = np.random.default_rng(0)
  kernels = [whole_numbers(rng, 12, number) for number in (20, 7)]
  kept = cut(kernels, [(4, 5), (7,)])
  x = whole_numbers(rng, 2, 3, 12)
  found = products.multiply_each(x, (kept, None), [(), ()])
  assert [one.shape for one in found] == [(2, 3, 4, 5), (2, 3, 7)]
  for one, kernel in zip(found, kernels, strict=True):
    np.testing.assert_array_equal(one.reshape(2, 3, -1), x @ kernel)
