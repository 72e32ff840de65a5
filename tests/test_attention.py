"""Kernels agree; long rows cost what they must, and are cut where they can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from experiments import placing
from mgrpo_jax import sharding
from mgrpo_jax.aot import flops
from mgrpo_jax.policy import attention, transformer
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.policy.params import abstract
from mgrpo_jax.testing.sizes import tiny_config

LONG = 8192


def value_and_gradients(kernel, arrays, segments, window, **more):
  def loss(*arrays):
    attended = kernel(*arrays, segments, window=window, **more)
    real = (segments > 0).reshape((*segments.shape, 1, 1, 1))
    attended = jnp.where(real, attended, 0.0)
    return jnp.sum(attended**2), attended

  step = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  return jax.jit(step)(*arrays)


def whole(query, key, value, segments, *, window, prefix_ids=None):
  """The definition: every score at once, and gradients by autodiff."""
  age = np.arange(segments.shape[1])[:, None] - np.arange(segments.shape[1])
  seen = (age >= 0) & (age < (window or len(age)))
  same = segments[:, :, None] == segments[:, None]
  if prefix_ids is not None:
    prefix = prefix_ids[:, :, None]
    same = same | (prefix == segments[:, None]) & (prefix > 0)
  seen = seen & same
  scores = jnp.einsum("ntkgd,nskd->nkgts", query, key)
  scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
  return jnp.einsum("nkgts,nskd->ntkgd", jax.nn.softmax(scores), value)


@pytest.mark.parametrize("most_scores", (attention.MAX_SCORES, 700))
@pytest.mark.parametrize("window", (0, 40))
def test_blocks_and_pieces_equal_the_whole(window, most_scores, monkeypatch):
  monkeypatch.setattr(attention, "MAX_SCORES", most_scores)
  rng = np.random.default_rng(1)
  length = 150
  query, key, value = (
      0.5 * rng.normal(size=(2, length, 2, *heads, 6)).astype(np.float32)
      for heads in ((3,), (), ())
  )
  segments = np.stack([np.arange(length) // n + 1 for n in (47, 200)])
  segments = segments.astype(np.int32)
  segments[:, -9:] = 0
  expected, actual = (
      value_and_gradients(kernel, (query, key, value), segments, window)
      for kernel in (whole, attention.blockwise)
  )
  for one, other in zip(*map(jax.tree.leaves, (expected, actual)), strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most_scores", (attention.MAX_SCORES, 700))
def test_branches_see_their_prefix(most_scores, monkeypatch):
  monkeypatch.setattr(attention, "MAX_SCORES", most_scores)
  rng = np.random.default_rng(3)
  # (tokens, segment, prefix): two branches, a lone one, another prefix's; no
  # block begins where a segment does, the last of them is padding's.
  row = ((40, 1, 0), (30, 2, 1), (33, 3, 1), (9, 4, 0), (20, 5, 0), (11, 6, 5))
  sizes, *ids = zip(*row, (7, 0, 0), strict=True)
  segments, prefix_ids = (np.repeat(np.int32(one), sizes)[None] for one in ids)
  arrays = tuple(
      0.5 * rng.normal(size=(1, 150, 2, *heads, 6)).astype(np.float32)
      for heads in ((3,), (), ())
  )
  expected, actual = (
      value_and_gradients(kernel, arrays, segments, 0, prefix_ids=prefix_ids)
      for kernel in (whole, attention.blockwise)
  )
  for one, other in zip(*map(jax.tree.leaves, (expected, actual)), strict=True):
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)
  apart = value_and_gradients(attention.blockwise, arrays, segments, 0)
  assert not np.allclose(apart[0][1], actual[0][1])
  with pytest.raises(ValueError, match="window must be 0 with prefix_ids"):
    attention.blockwise(*arrays, segments, window=9, prefix_ids=prefix_ids)


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
  rng = np.random.default_rng(2)
  length = 130
  arrays = [
      0.5 * jnp.asarray(rng.normal(size=(1, length, 2, *heads, 8)), "bfloat16")
      for heads in ((2,), (), ())
  ]
  segments = (np.arange(length) // 60 + 1)[None].astype(np.int32)
  exact, rounded = (
      value_and_gradients(
          attention.blockwise,
          [one.astype(dtype) for one in arrays],
          segments,
          0,
      )
      for dtype in ("float32", "bfloat16")
  )
  for one, other in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True):
    error = np.abs(np.asarray(other, np.float32) - one).max()
    assert error < 0.02 * np.abs(one).max()


@pytest.mark.parametrize(
    ("length", "window"),
    (
        (130, 0),
        (130, 40),
        (2040, 0),  # the backward kernel holds two blocks of keys at once
    ),
)
def test_splash_equals_blockwise(length, window, monkeypatch):
  monkeypatch.setattr(attention, "SPLASH_BLOCKS", (128,))
  monkeypatch.setattr(attention, "SPLASH_HELD", (256,))
  rng = np.random.default_rng(0)
  width = 6  # no length or width here fits the kernel's tiles
  query, key, value = (
      0.5 * rng.normal(size=(1, length, 2, *heads, width)).astype(np.float32)
      for heads in ((2,), (), ())
  )
  segments = (np.arange(length) // 50 + 1)[None].astype(np.int32)
  segments[:, -9:] = 0
  splash = functools.partial(attention.splash, interpret=True)
  results = [
      value_and_gradients(kernel, (query, key, value), segments, window)
      for kernel in (attention.blockwise, splash)
  ]
  for expected, actual in zip(*map(jax.tree.leaves, results), strict=True):
    # Sums of up to 130 float32 terms, in another order.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "window", "kernels"),
    # Forward, and all gradients at once; or with a window those of queries,
    # and those of keys and values.
    ((64, 0, 2), (128, 0, 2), (128, 40, 3)),
)
def test_splash_lowers_for_a_sharded_tpu(width, window, kernels):
  mesh = AbstractMesh(
      (2, 2, 2, 1), sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * 4
  )

  def shape(sizes, dtype, *axes):
    where = NamedSharding(mesh, sharding.spec(*axes))
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

  def loss(*arrays):
    attended = attention.splash(*arrays, window=window)
    return jnp.sum(attended.astype(jnp.float32))

  rows = ("batch", "length", "kv_heads")
  key = shape((8, 384, 2, width), "bfloat16", *rows, "head_dim")
  query = shape((8, 384, 2, 4, width), "bfloat16", *rows, "group", "head_dim")
  segments = shape((8, 384), "int32", *rows[:2])
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(
        query, key, key, segments
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == kernels
  for result, argument in zip(
      traced.jaxpr.out_avals, (query, key, key), strict=True
  ):
    assert result.sharding.spec == argument.sharding.spec


@functools.cache
def attended_gradient(window, length=LONG):
  """Of one long row, compiled; a head of queries, 16 wide."""
  row = jax.ShapeDtypeStruct((1, length, 1, 16), np.float32)
  query = jax.ShapeDtypeStruct((1, length, 1, 1, 16), np.float32)
  segments = jax.ShapeDtypeStruct((1, length), np.int32)

  def loss(*arrays):
    return jnp.sum(attention.blockwise(*arrays, window=window) ** 2)

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  return gradient.lower(query, row, row, segments).compile()


def test_the_scores_of_a_long_row_never_all_exist():
  memory, longer = (
      attended_gradient(0, length).memory_analysis().temp_size_in_bytes
      for length in (LONG, 2 * LONG)
  )
  assert memory < LONG * LONG * 4  # not even of the smaller row
  assert longer < 1.5 * memory  # though it has four times as many


def test_a_window_is_not_paid_for_in_full():
  whole, near = (
      attended_gradient(window).cost_analysis()["flops"]
      for window in (0, LONG // 8)
  )
  # Loops are counted once: what is compared is one piece of each block.
  assert near < 0.6 * whole


@pytest.mark.parametrize(
    ("kernel", "window"),
    (
        (attention.blockwise, 0),
        (functools.partial(attention.splash, interpret=True), 0),
        (functools.partial(attention.splash, interpret=True), 200),
    ),
)
def test_what_was_attended_to_need_not_be_attended_to_again(kernel, window):
  length = 2048
  row = jax.ShapeDtypeStruct((1, length, 1, 8), np.float32)
  query = jax.ShapeDtypeStruct((1, length, 1, 2, 8), np.float32)
  segments = jax.ShapeDtypeStruct((1, length), np.int32)

  def work(remat):
    layer = jax.checkpoint(
        lambda *arrays: kernel(*arrays, window=window),
        policy=placing.REMATS[remat],
    )
    gradient = jax.value_and_grad(
        lambda *arrays: jnp.sum(layer(*arrays) ** 2), argnums=(0, 1, 2)
    )
    traced = jax.jit(gradient).trace(query, row, row, segments)
    done = flops.traced(traced.jaxpr)
    return done.products + done.kernels

  # Passes over the scores: two forward; backward five, in two kernels seven.
  backward = 7 if window else 5
  assert work("layer") / work("attention") == pytest.approx(
      (4 + backward) / (2 + backward), rel=1e-3
  )


def test_rematerialisation_takes_less_memory():
  tokens = jax.ShapeDtypeStruct((2, 256), np.int32)

  def peak(remat):
    config = tiny_config(
        num_layers=6,
        embed_dim=64,
        mlp_dim=256,
        execution=Execution(remat=remat, scan_layers=True),
    )

    def loss(params, tokens, segment_ids):
      hidden = transformer.hidden_states(
          params, tokens, tokens, segment_ids, config=config
      )
      return jnp.sum(hidden**2)

    lowered = jax.jit(jax.grad(loss)).lower(abstract(config), tokens, tokens)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  policies = jax.checkpoint_policies
  kept = peak(None)
  assert peak(policies.nothing_saveable) < 0.6 * kept
