import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import transformer as oracle

from experiments import placing
from mgrpo_jax.policy import attention, transformer
from mgrpo_jax.policy.config import Execution, Experts
from mgrpo_jax.policy.rotary import LinearScaling, Llama3Scaling

# float32 against float64: a few hundred roundings of 6e-8 on logits of size 5.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
ROWS = ((5, 1, 7), (13, 2), ())  # lengths of the segments of three rows
LENGTH = 17
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3")
MOE_UNNORMALISED = dataclasses.replace(tiny_llama.MOE, normalised=False)


@functools.cache
def applied(cfg):
  return jax.jit(functools.partial(transformer.apply, config=cfg))


def logits_of(cfg, rows, seed=0):
  return np.asarray(applied(cfg)(tiny_llama.weights(cfg, seed), *rows))


def expected_logits(cfg, rows, seed=0):
  weights = tiny_llama.oracle_weights(tiny_llama.weights(cfg, seed), cfg)
  return oracle.packed_logits(weights, *rows, tiny_llama.oracle_model(cfg))


def scalings():
  linear = st.builds(LinearScaling, factor=st.floats(1, 8))
  llama3 = st.builds(
      Llama3Scaling,
      factor=st.floats(1, 8),
      low_frequency=st.floats(0.5, 1),
      high_frequency=st.floats(1.5, 8),
      original_context=st.integers(1, 99),
  )
  return st.one_of(st.none(), linear, llama3)


@st.composite
def mixtures(draw, layers):
  number = draw(st.integers(1, 5))
  return Experts(
      number=number,
      per_token=draw(st.integers(1, number)),
      mlp_dim=draw(st.integers(1, 9)),
      normalised=draw(st.booleans()),
      dense_layers=draw(st.sampled_from([(), (layers - 1,)])),
  )


@st.composite
def features(draw, family, layers):
  """What a family adds; windows shorter and longer than the segments."""
  windows = st.tuples(*[st.integers(0, 7)] * layers)
  if family == "llama":
    return {"rope_scaling": draw(scalings())}
  if family == "qwen2":
    return {"qkv_bias": True, "windows": draw(windows)}
  if family == "qwen3":
    return {"qk_norm": True, "windows": draw(windows)}
  if family == "qwen3_moe":
    return {"qk_norm": True, "experts": draw(mixtures(layers))}
  return {
      "qk_norm": True,
      "post_norms": True,
      "activation": "gelu_tanh",
      "embedding_scale": draw(st.floats(0.5, 4)),
      "attention_scale": draw(st.floats(0.1, 1)),
      "windows": draw(windows),
      "local_rope_base": draw(st.sampled_from([3.0, 1e4])),
      "rope_scaling": draw(scalings()),
  }


@st.composite
def cases(draw, family):
  """Odd sizes, grouped heads, head widths unrelated to E, rows of segments."""
  kv_heads = draw(st.integers(1, 3))
  layers = draw(st.integers(1, 2))
  cfg = tiny_llama.config(
      vocab_size=draw(st.integers(2, 19)),
      embed_dim=draw(st.integers(1, 13)),
      num_layers=layers,
      num_heads=kv_heads * draw(st.integers(1, 3)),
      num_kv_heads=kv_heads,
      head_dim=2 * draw(st.integers(1, 5)),
      mlp_dim=draw(st.integers(1, 21)),
      rope_base=draw(st.sampled_from([10.0, 1e4])),
      tied_embeddings=draw(st.booleans()),
      **draw(features(family, layers)),
  )
  lengths = st.lists(st.integers(1, 9), max_size=3)
  rows = tuple(map(tuple, draw(st.lists(lengths, min_size=1, max_size=3))))
  length = max(1, *map(sum, rows), 1) + draw(st.integers(0, 3))
  seed = draw(st.integers(0, 999))
  return cfg, tiny_llama.packed_rows(rows, length, cfg, seed), seed


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_equals_the_oracle(family, data):
  cfg, rows, seed = data.draw(cases(family))
  actual = logits_of(cfg, rows, seed)
  real = rows[2] > 0
  expected = expected_logits(cfg, rows, seed)
  np.testing.assert_allclose(actual[real], expected[real], **CLOSE)
  assert np.all(np.isfinite(actual))


ODD = {
    name: tiny_llama.config(**changes)
    for name, changes in tiny_llama.FAMILIES.items()
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("qwen2", {"windows": ()}),
        ("qwen3_moe", {"experts": MOE_UNNORMALISED}),
        ("gemma3", {"windows": ()}),
        ("gemma3", {"local_rope_base": None}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"attention_scale": None}),
        ("gemma3", {"embedding_scale": 1.0}),
        ("gemma3", {"activation": "silu"}),
    ],
)
def test_every_feature_is_felt_by_the_oracle(name, change):
  rows = tiny_llama.packed_rows(ROWS, LENGTH, ODD[name])
  real = rows[2] > 0
  weights = tiny_llama.oracle_weights(tiny_llama.weights(ODD[name]), ODD[name])
  without = dataclasses.replace(ODD[name], **change)
  with_it, without_it = (
      oracle.packed_logits(weights, *rows, tiny_llama.oracle_model(cfg))[real]
      for cfg in (ODD[name], without)
  )
  assert np.max(np.abs(with_it - without_it)) > 100 * CLOSE["atol"]


def looped(cfg, remat="layer"):
  execution = Execution(scan_layers=True, remat=placing.REMATS[remat])
  return dataclasses.replace(cfg, execution=execution)


def test_layers_in_a_loop_change_no_value():
  plain = tiny_llama.config(
      num_layers=5,  # two periods of two layers, and one left over
      windows=(3, 0, 3, 0, 3),
      experts=dataclasses.replace(tiny_llama.MOE, dense_layers=(0, 2, 4)),
      qk_norm=True,
  )
  assert plain.period == 2
  rows = tiny_llama.packed_rows(ROWS, LENGTH, plain)
  # The same sums in programs that fuse differently.
  np.testing.assert_allclose(
      logits_of(looped(plain), rows), logits_of(plain, rows), **CLOSE
  )


@pytest.mark.parametrize("remat", placing.REMATS)
def test_rematerialisation_in_a_loop_changes_no_gradient(remat):
  plain = SHARED
  rows = tiny_llama.packed_rows(ROWS, LENGTH, plain)

  def loss(tree, cfg):
    logits = transformer.apply(tree, *rows, config=cfg)
    return jnp.mean(jnp.where(rows[2][..., None] > 0, jnp.sin(logits), 0.0))

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6),
      gradient(tiny_llama.weights(plain), looped(plain, remat)),
      gradient(tiny_llama.weights(plain), plain),
  )


def two_segments(length):
  rng = np.random.default_rng(length)
  query, key, value = (
      rng.normal(size=(1, length, 1, *heads, 4)).astype(np.float32)
      for heads in ((2,), (), ())
  )
  cut = length // 3
  segments = np.where(np.arange(length) < cut, 1, 2)[None].astype(np.int32)
  scaled = query * np.float32(query.shape[-1] ** -0.5)
  parts = (slice(0, cut), slice(cut, length))
  return (scaled, key, value, segments), query, parts


@pytest.mark.parametrize(
    ("length", "window", "pieces"),
    [(1, 0, 1), (65, 0, 1), (530, 0, 1), (65, 1, 1), (530, 70, 3)],
)
def test_attention_blocks_join_without_a_seam(
    length, window, pieces, monkeypatch
):
  inputs, query, parts = two_segments(length)
  # A block of queries meets at most all keys; a third of that runs at once.
  block = max(attention.MIN_BLOCK, -(-length // attention.MAX_BLOCKS))
  monkeypatch.setattr(attention, "MAX_SCORES", block * length // pieces)
  attend = jax.jit(functools.partial(attention.blockwise, window=window))
  actual = attend(*inputs)[0, :, 0]
  for part in parts:
    expected = oracle.attention(
        query[0, part, 0], *(x[0, part] for x in inputs[1:3]), window=window
    )
    np.testing.assert_allclose(actual[part], expected, **CLOSE)


def test_windows_are_not_paid_for_in_full():
  def flops(window):
    inputs = two_segments(1024)[0]
    attend = jax.jit(functools.partial(attention.blockwise, window=window))
    return attend.lower(*inputs).cost_analysis()["flops"]

  # 8 blocks of 128 queries meet 128 + 127 keys instead of 576 on average.
  assert flops(128) < 0.5 * flops(0)


SHARED = tiny_llama.config()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, LENGTH - 1), st.integers(0, 99))
def test_a_token_changes_its_own_future_only(column, seed):
  rows = tiny_llama.packed_rows(ROWS, LENGTH, SHARED, seed)
  tokens, positions, segments = rows
  changed = tokens.copy()
  changed[:, column] = (tokens[:, column] + 1) % SHARED.vocab_size
  before = logits_of(SHARED, rows)
  after = logits_of(SHARED, (changed, positions, segments))
  own = segments == segments[:, column][:, None]
  future = own & (np.arange(LENGTH) >= column)
  np.testing.assert_array_equal(before[~future], after[~future])
  real = future & (segments > 0)
  assert np.all(np.any(before[real] != after[real], axis=-1))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_padding_may_hold_anything(data):
  rows = tiny_llama.packed_rows(ROWS, LENGTH, SHARED)
  real = rows[2] > 0
  garbage = data.draw(
      st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=2)
  )
  tokens = np.where(real, rows[0], np.int32(garbage[0]))
  positions = np.where(real, rows[1], np.int32(garbage[1]))
  before = logits_of(SHARED, rows)
  after = logits_of(SHARED, (tokens, positions, rows[2]))
  np.testing.assert_array_equal(before, after)


def test_packing_changes_nothing():
  rows = tiny_llama.packed_rows(((LENGTH,),), LENGTH, SHARED)
  tokens = rows[0][0]
  alone = logits_of(SHARED, rows)[0]
  for start in (0, 3, 11):
    packed = tiny_llama.packed_rows(((start, LENGTH - start),), LENGTH, SHARED)
    packed[0][0] = np.roll(tokens, start)
    together = logits_of(SHARED, packed)[0, start:]
    np.testing.assert_allclose(together, alone[: LENGTH - start], **CLOSE)


def test_gradient_equals_finite_differences_of_the_oracle():
  cfg = tiny_llama.config(num_layers=1, tied_embeddings=False)
  rows = tiny_llama.packed_rows(((3, 2), (4,)), 6, cfg)
  tree = tiny_llama.weights(cfg)
  real = rows[2] > 0
  cotangent = np.random.default_rng(1).normal(size=(2, 6, cfg.vocab_size))
  cotangent[~real] = 0

  def loss(tree):
    logits = transformer.apply(tree, *rows, config=cfg)
    return jnp.sum(logits * np.float32(cotangent))

  gradient = tiny_llama.oracle_weights(jax.jit(jax.grad(loss))(tree), cfg)
  weights = tiny_llama.oracle_weights(tree, cfg)

  def expected():
    logits = oracle.packed_logits(weights, *rows, tiny_llama.oracle_model(cfg))
    return np.sum(logits[real] * cotangent[real])

  def check(name, array, slope):
    index = tuple(np.random.default_rng(2).integers(array.shape))
    if name == "embedding":
      index = (rows[0][0, 0], 1)
    value, step = array[index], 1e-5
    array[index] = value + step
    above = expected()
    array[index] = value - step
    difference = (above - expected()) / (2 * step)
    array[index] = value
    # 1e-10 relative from the step; the rest is the float32 gradient.
    np.testing.assert_allclose(
        slope[index], difference, rtol=1e-3, atol=1e-3, err_msg=name
    )
    assert abs(difference) > 1e-2, f"{name} hardly matters: pick another"

  for name in ("embedding", "final_norm", "unembedding"):
    check(name, weights[name], gradient[name])
  for name, array in weights["layers"][0].items():
    check(name, array, gradient["layers"][0][name])


def test_bfloat16_runs_narrow_and_answers_wide():
  cfg = tiny_llama.config(dtype="bfloat16")
  rows = tiny_llama.packed_rows(ROWS, LENGTH, cfg)
  hidden = jax.eval_shape(
      functools.partial(transformer.hidden_states, config=cfg),
      tiny_llama.weights(cfg),
      *rows,
  )
  assert hidden.dtype == jnp.bfloat16
  narrow = logits_of(cfg, rows)
  assert narrow.dtype == np.float32
  wide = logits_of(SHARED, rows)
  error = np.abs(narrow - wide)[rows[2] > 0].mean() / wide.std()
  # bfloat16 keeps 8 bits; rounding some ten times a layer leaves about 1%.
  assert 1e-4 < error < 0.03


@pytest.mark.parametrize("token", (-1, SHARED.vocab_size))
def test_a_token_outside_the_vocabulary_is_not_silent(token):
  tokens, positions, segments = tiny_llama.packed_rows(ROWS, LENGTH, SHARED)
  tokens[0, 0] = token
  with jax.debug_nans(False):
    logits = logits_of(SHARED, (tokens, positions, segments))
  tainted = np.isnan(logits).any(axis=-1)
  assert np.all(tainted[0, :5]) and not np.any(tainted[1:])


def test_norms_scale_in_float32():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 5, 16)), "bfloat16")
  scale = np.float32(1 + 0.02 * rng.normal(size=16))  # as Gemma's are
  exact = transformer.rms_norm(x.astype("float32"), scale, config=SHARED)
  found = transformer.rms_norm(x, scale, config=SHARED)
  assert found.dtype == x.dtype
  np.testing.assert_array_equal(found, exact.astype("bfloat16"))
