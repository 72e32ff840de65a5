"""Inverse CDF, uniforms per (seed, position), filters."""

import jax
import jax.numpy as jnp
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
  token, _ = SAMPLE(
      np.tile(logits, (count, 1)), uniform, np.full(count, 0.7, np.float32)
  )
  expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
  got = np.bincount(np.asarray(token), minlength=40) / count
  np.testing.assert_allclose(got, expected, atol=1.5 / count)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 3))
def test_logprobs_are_of_the_distribution_drawn_from(seed, temperature):
  rng = np.random.default_rng(seed)
  logits = (5 * rng.normal(size=(ROWS, 50))).astype(np.float32)
  temperatures = np.full(ROWS, temperature, np.float32)
  temperatures[::2] = 0
  token, logprob = (
      np.asarray(x)
      for x in SAMPLE(logits, rng.random(ROWS, np.float32), temperatures)
  )
  assert (token[::2] == logits.argmax(axis=1)[::2]).all()
  scaled = logits.astype(np.float64)
  scaled[1::2] /= np.float64(np.float32(temperature))
  expected = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
  # float32 logits of size 20 / temperature round to 1e-6 · 20 / temperature
  np.testing.assert_allclose(
      logprob, expected[np.arange(ROWS), token], atol=3e-5 / temperature
  )


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_keeps_the_k_likeliest(k):
  logits = np.random.default_rng(k).normal(size=(ROWS, 50)).astype(np.float32)
  kept = np.isfinite(
      np.asarray(jax.jit(sampling.top_k, static_argnums=1)(logits, k))
  )
  rank = np.argsort(np.argsort(-logits, axis=1), axis=1)
  np.testing.assert_array_equal(kept, rank < k)


@pytest.mark.parametrize("p", [1e-6, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_smallest_sufficient_set(p):
  logits = np.random.default_rng(1).normal(size=(ROWS, 50)).astype(np.float32)
  kept = np.isfinite(
      np.asarray(jax.jit(sampling.top_p, static_argnums=1)(logits, p))
  )
  probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  for row in range(ROWS):
    order = np.argsort(-probability[row])
    mass = np.cumsum(probability[row][order])
    size = 50 if p == 1 else np.searchsorted(mass, p) + 1
    np.testing.assert_array_equal(
        np.sort(order[:size]), np.flatnonzero(kept[row])
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sampling.top_k(jnp.zeros((1, 4)), 0), "k must"),
        (lambda: sampling.top_k(jnp.zeros((1, 4)), 5), "k must"),
        (lambda: sampling.top_p(jnp.zeros((1, 4)), 0.0), "p must"),
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
    ],
)
def test_sampling_names_the_field(field, value):
  right = {"temperature": 1.0, "max_new_tokens": 1, "stop_ids": ()}
  Sampling(**right)
  with pytest.raises(ValueError, match=field):
    Sampling(**right | {field: value})
