"""The golden file is made by tests/golden/make_llama.py."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import transformer as oracle

from mgrpo_jax.policy import attention, logprobs, transformer
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Layer, Params

GOLDEN = pathlib.Path(__file__).parent / "golden/llama.npz"
# float32 against float64: a few hundred roundings of 6e-8 on logits of size 5.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
ROWS = ((5, 1, 7), (13, 2), ())  # lengths of the segments of three rows
LENGTH = 17


@functools.cache
def applied(cfg):
  return jax.jit(functools.partial(transformer.apply, config=cfg))


def logits_of(cfg, rows, seed=0):
  return np.asarray(applied(cfg)(tiny_llama.weights(cfg, seed), *rows))


def expected_logits(cfg, rows, seed=0):
  weights = tiny_llama.oracle_weights(tiny_llama.weights(cfg, seed), cfg)
  return oracle.packed_logits(weights, *rows, cfg.rope_base, cfg.norm_eps)


@st.composite
def cases(draw):
  """Odd sizes, grouped heads, head widths unrelated to E, rows of segments."""
  kv_heads = draw(st.integers(1, 3))
  cfg = tiny_llama.config(
      vocab_size=draw(st.integers(2, 19)),
      embed_dim=draw(st.integers(1, 13)),
      num_layers=draw(st.integers(1, 2)),
      num_heads=kv_heads * draw(st.integers(1, 3)),
      num_kv_heads=kv_heads,
      head_dim=2 * draw(st.integers(1, 5)),
      mlp_dim=draw(st.integers(1, 21)),
      rope_base=draw(st.sampled_from([10.0, 1e4])),
      tied_embeddings=draw(st.booleans()),
  )
  lengths = st.lists(st.integers(1, 6), max_size=3)
  rows = tuple(map(tuple, draw(st.lists(lengths, min_size=1, max_size=3))))
  length = max(1, *map(sum, rows), 1) + draw(st.integers(0, 3))
  seed = draw(st.integers(0, 999))
  return cfg, tiny_llama.packed_rows(rows, length, cfg, seed), seed


@settings(max_examples=4, deadline=None)
@given(cases())
def test_equals_the_oracle(case):
  cfg, rows, seed = case
  actual = logits_of(cfg, rows, seed)
  real = rows[2] > 0
  expected = expected_logits(cfg, rows, seed)
  np.testing.assert_allclose(actual[real], expected[real], **CLOSE)
  assert np.all(np.isfinite(actual))


@pytest.mark.parametrize("length", (1, 65, 530))
def test_attention_blocks_join_without_a_seam(length):
  rng = np.random.default_rng(length)
  query, key, value = (
      rng.normal(size=(1, length, 1, *heads, 4)).astype(np.float32)
      for heads in ((2,), (), ())
  )
  cut = length // 3
  segments = np.where(np.arange(length) < cut, 1, 2)[None].astype(np.int32)
  attend = jax.jit(attention.blockwise, static_argnames="window")
  scaled = query * np.float32(query.shape[-1] ** -0.5)
  actual = attend(scaled, key, value, segments, window=0)[0, :, 0]
  for start, stop in ((0, cut), (cut, length)):
    part = slice(start, stop)
    expected = oracle.attention(query[0, part, 0], key[0, part], value[0, part])
    np.testing.assert_allclose(actual[part], expected, **CLOSE)


def hf_params(arrays, cfg):
  """Transformers' names and [out, in] matrices to ours, spelled out."""
  embed, kv, dim = cfg.embed_dim, cfg.num_kv_heads, cfg.head_dim
  group = cfg.num_heads // kv

  def layer(i):
    def kernel(name):
      return arrays[f"model.layers.{i}.{name}.weight"]

    return Layer(
        attention_norm=kernel("input_layernorm"),
        query=kernel("self_attn.q_proj").T.reshape(embed, kv, group, dim),
        key=kernel("self_attn.k_proj").T.reshape(embed, kv, dim),
        value=kernel("self_attn.v_proj").T.reshape(embed, kv, dim),
        output=kernel("self_attn.o_proj").T.reshape(kv, group, dim, embed),
        mlp_norm=kernel("post_attention_layernorm"),
        gate=kernel("mlp.gate_proj").T,
        up=kernel("mlp.up_proj").T,
        down=kernel("mlp.down_proj").T,
    )

  return Params(
      embedding=arrays["model.embed_tokens.weight"],
      layers=tuple(layer(i) for i in range(cfg.num_layers)),
      final_norm=arrays["model.norm.weight"],
      unembedding=None if cfg.tied_embeddings else arrays["lm_head.weight"].T,
  )


HF_CONFIGS = {
    "grouped": TransformerConfig(
        vocab_size=61,
        embed_dim=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        mlp_dim=40,
        rope_base=500000.0,
        norm_eps=1e-5,
        tied_embeddings=False,
        dtype="float32",
    ),
    "tied": TransformerConfig(
        vocab_size=48,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=24,
        rope_base=100.0,
        norm_eps=1e-2,
        tied_embeddings=True,
        dtype="float32",
    ),
}


@pytest.mark.parametrize("kind", HF_CONFIGS)
def test_equals_transformers(kind):
  cfg = HF_CONFIGS[kind]
  with np.load(GOLDEN) as stored:
    arrays = {
        name.removeprefix(f"{kind}/"): stored[name]
        for name in stored
        if name.startswith(f"{kind}/")
    }
  prompts = [arrays["tokens0"], arrays["tokens1"]]
  sizes = tuple(map(len, prompts))
  tokens, positions, segments = tiny_llama.packed_rows((sizes,), 29, cfg)
  tokens[0, : sum(sizes)] = np.concatenate(prompts)
  rows = (hf_params(arrays, cfg), tokens, positions, segments)
  logits = np.asarray(applied(cfg)(*rows))[0]
  score = functools.partial(
      logprobs.token_logprobs, config=cfg, temperature=1.0
  )
  scores = np.asarray(jax.jit(score)(*rows))[0]
  start = 0
  for n, size in enumerate(sizes):
    # Two float32 programs that sum in different orders.
    np.testing.assert_allclose(
        logits[start : start + size], arrays[f"logits{n}"], atol=2e-5
    )
    np.testing.assert_allclose(
        scores[start + 1 : start + size], arrays[f"logprobs{n}"], atol=2e-5
    )
    start += size


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
    logits = oracle.packed_logits(weights, *rows, cfg.rope_base, cfg.norm_eps)
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
