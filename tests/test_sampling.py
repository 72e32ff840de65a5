"""Inverse CDF, uniforms per (seed, position), log-probabilities."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo_jax.policy import sampling
from mgrpo_jax.policy.sampling import Sampling

SAMPLE = jax.jit(sampling.sample)
INVERT = jax.jit(sampling.inverse_cdf)
UNIFORMS = jax.jit(sampling.uniforms)
LARGEST = np.float32(1 - 2**-24)  # that `uniforms` yields
ROWS = 16


def threefry(key, counter):
  """Threefry-2x32, 20 rounds (Salmon et al., 2011), on Python integers."""
  mask = 2**32 - 1
  keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
  x, y = (counter[0] + keys[0]) & mask, (counter[1] + keys[1]) & mask
  rotations = [(13, 15, 26, 6), (17, 29, 16, 24)]
  for group in range(5):
    for turn in rotations[group % 2]:
      x = (x + y) & mask
      y = ((y << turn | y >> (32 - turn)) & mask) ^ x
    x = (x + keys[(group + 1) % 3]) & mask
    y = (y + keys[(group + 2) % 3] + group + 1) & mask
  return x, y


def test_the_oracle_is_threefry():
  assert threefry((0, 0), (0, 0)) == (0x6B200159, 0x99BA4EFE)  # Random123


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1))
def test_uniforms_hash_seed_and_position(seed, position):
  words = sampling.split_seed(seed)
  bits, _ = threefry(words, (position, 0))
  row = seed % ROWS
  seeds = np.zeros((ROWS, 2), np.uint32)
  positions = np.zeros(ROWS, np.int32)
  seeds[row], positions[row] = words, position
  got = np.asarray(UNIFORMS(seeds, positions))[row]
  assert got == np.float32((bits >> 8) * 2**-24)
  assert 0 <= got <= LARGEST


def test_uniforms_are_uniform():
  seeds = np.random.default_rng(0).integers(
      0, 2**32, (20_000, 2), dtype=np.uint32
  )
  values = np.asarray(UNIFORMS(seeds, np.full(20_000, 7, np.int32)))
  counts, _ = np.histogram(values, bins=20, range=(0, 1))
  # chi-square with 19 degrees of freedom: P(> 43.8) = 0.001
  assert np.sum((counts - 1000) ** 2 / 1000) < 43.8


@pytest.mark.parametrize("size", [1, 2, 7, 512, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_inverse_cdf_is_the_inverse(size, seed):
  rng = np.random.default_rng(seed)
  weights = np.exp(3 * rng.normal(size=(ROWS, size))).astype(np.float32)
  weights[rng.random((ROWS, size)) < 0.3] = 0
  weights[:, rng.integers(size)] = 1
  uniform = rng.random(ROWS, np.float32)
  uniform[:2] = 0, LARGEST
  token = np.asarray(INVERT(weights, uniform))
  cdf = np.cumsum(weights.astype(np.float64), axis=1)
  cdf /= cdf[:, -1:]
  row = np.arange(ROWS)
  assert (weights[row, token] > 0).all()
  # float32 prefix sums: an uniform may fall this close to the wrong side
  assert (cdf[row, token] > uniform - 1e-5).all()
  assert (
      cdf[row, token] - weights[row, token] / weights.sum(1) <= uniform + 1e-5
  ).all()


@pytest.mark.parametrize("only", [0, 1, 21, 22, 23, 510, 511])
def test_an_entry_of_weight_zero_is_never_drawn(only):
  weights = np.zeros((ROWS, 512), np.float32)
  weights[:, only] = 1e-30
  uniform = np.linspace(0, 1, ROWS).astype(np.float32)
  uniform[-1] = LARGEST
  assert (np.asarray(INVERT(weights, uniform)) == only).all()


@pytest.mark.parametrize("seed", range(8))
def test_rounding_at_the_edge_of_a_block_draws_no_weight_zero(seed):
  rng = np.random.default_rng(seed)
  weights = np.exp(3 * rng.normal(size=(ROWS, 32, 16))).astype(np.float32)
  weights[:, :, :3] = 0  # blocks are 16 wide; each begins with zeros
  prefix = np.cumsum(weights.sum(axis=2), axis=1, dtype=np.float32)
  edge = rng.integers(0, 31, ROWS)
  uniform = prefix[np.arange(ROWS), edge] / prefix[:, -1]
  weights = weights.reshape(ROWS, 512)
  for _ in range(4):
    token = np.asarray(INVERT(weights, uniform))
    assert (weights[np.arange(ROWS), token] > 0).all()
    uniform = np.nextafter(uniform, np.float32(0))


def test_frequencies_are_the_probabilities():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=40).astype(np.float32)
  count = 4096
  uniform = ((np.arange(count) + 0.5) / count).astype(np.float32)
  drawing = sampling.plainly(count)
  drawing.temperature[:] = 0.7
  token, _, _ = SAMPLE(np.tile(logits, (count, 1)), uniform, drawing)
  expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
  got = np.bincount(np.asarray(token), minlength=40) / count
  np.testing.assert_allclose(got, expected, atol=1.5 / count)


def log_softmax(logits):
  logits = logits.astype(np.float64)
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 3))
def test_logprobs_are_of_the_distribution_drawn_from(seed, temperature):
  rng = np.random.default_rng(seed)
  logits = (5 * rng.normal(size=(ROWS, 50))).astype(np.float32)
  drawing = sampling.plainly(ROWS)
  drawing.temperature[:] = temperature
  drawing.temperature[::2] = 0
  token, logprob, raw = (
      np.asarray(x)
      for x in SAMPLE(logits, rng.random(ROWS, np.float32), drawing)
  )
  assert (token[::2] == logits.argmax(axis=1)[::2]).all()
  plain = log_softmax(logits)[np.arange(ROWS), token]
  np.testing.assert_allclose(raw, plain, atol=3e-5)
  np.testing.assert_array_equal(raw[::2], logprob[::2])
  scaled = logits.astype(np.float64)
  scaled[1::2] /= np.float64(np.float32(temperature))
  expected = log_softmax(scaled)
  # float32 logits of size 20 / temperature round to 1e-6 · 20 / temperature
  np.testing.assert_allclose(
      logprob, expected[np.arange(ROWS), token], atol=3e-5 / temperature
  )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sampling.split_seed(-1), "seed must"),
        (lambda: sampling.split_seed(2**64), "seed must"),
    ],
)
def test_arguments_out_of_range(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("max_new_tokens", 0),
        ("stop_ids", tuple(range(9))),
        ("stop_ids", (-1,)),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_sampling_names_the_field(field, value):
  right = {"temperature": 1.0, "max_new_tokens": 1, "stop_ids": ()}
  Sampling(**right)
  with pytest.raises(ValueError, match=field):
    Sampling(**right | {field: value})


def test_a_row_does_not_notice_how_the_others_are_drawn():
  rng = np.random.default_rng(0)
  logits = (5 * rng.normal(size=(ROWS, 50))).astype(np.float32)
  uniform = rng.random(ROWS, np.float32)
  drawing = sampling.plainly(ROWS)
  drawing.temperature[1::4] = 0
  before = jax.tree.map(np.asarray, SAMPLE(logits, uniform, drawing))
  drawing.temperature[::2] = 0.7
  drawing.filters.top_k[::4] = 3
  drawing.filters.top_p[2::4] = 0.5
  after = jax.tree.map(np.asarray, SAMPLE(logits, uniform, drawing))
  for old, new in zip(before, after, strict=True):
    np.testing.assert_array_equal(old[1::2], new[1::2])
    assert (old[::2] != new[::2]).any()
  # and in rows that are not drawn, nothing is done
  idle = jax.tree.map(np.asarray, drawing.where(np.arange(ROWS) % 2 == 1))
  assert not idle.filters.active().any()
  np.testing.assert_array_equal(idle.temperature[::2], 1)
  np.testing.assert_array_equal(
      idle.temperature[1::2], drawing.temperature[1::2]
  )


def test_greedy_rows_are_never_filtered():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(ROWS, 50)).astype(np.float32)
  uniform = np.zeros(ROWS, np.float32)
  drawing = sampling.plainly(ROWS)
  drawing.temperature[:] = 0
  plain = jax.tree.map(np.asarray, SAMPLE(logits, uniform, drawing))
  drawing.filters.top_k[:] = 2
  told = jax.tree.map(np.asarray, SAMPLE(logits, uniform, drawing))
  for one, other in zip(plain, told, strict=True):
    np.testing.assert_array_equal(one, other)
