import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import transformer as oracle

from mgrpo_jax.policy import params, rotary, transformer
from mgrpo_jax.policy.rotary import LinearScaling, Llama3Scaling
from mgrpo_jax.testing.sizes import tiny_config

# Llama 3.1's own, and what its reference code makes of its frequencies.
LLAMA3 = Llama3Scaling(
    factor=8.0, low_frequency=1.0, high_frequency=4.0, original_context=8192
)
POSITIONS = np.arange(7, dtype=np.int32).reshape(1, 7)


def plain(head_dim, base):
  return np.float32(oracle.frequencies(head_dim, base, None))


@pytest.mark.parametrize("scaling", (None, LinearScaling(factor=8.0), LLAMA3))
def test_angles_equal_the_oracles(scaling):
  told = None
  if scaling is not None:
    told = {"kind": "linear", "factor": scaling.factor}
  if scaling is LLAMA3:
    told |= {"kind": "llama3", "low": 1.0, "high": 4.0, "context": 8192}
  expected = POSITIONS[..., None] * oracle.frequencies(12, 500000.0, told)
  cos, sin = rotary.rotations(
      POSITIONS, head_dim=12, base=500000.0, scaling=scaling
  )
  assert cos.dtype == sin.dtype == np.float32
  # A float32 power of a large base; angles are at most 6.
  np.testing.assert_allclose(cos, np.cos(expected), atol=3e-6)
  np.testing.assert_allclose(sin, np.sin(expected), atol=3e-6)


def test_llama3_by_hand():
  # Turns in 8192 tokens: 1303.8 (kept), 2.5 (halfway), 0.5 (divided by 8).
  kept, halfway, divided = np.float32([1.0, 2.5, 0.5]) * np.float32(
      [1.0, 2 * math.pi / 8192, 2 * math.pi / 8192]
  )
  scaled = LLAMA3(np.float32([kept, halfway, divided]))
  np.testing.assert_allclose(
      scaled, [kept, halfway * (0.5 + 0.5 / 8), divided / 8], rtol=1e-6
  )


@settings(max_examples=30, deadline=None)
@given(
    st.floats(1, 64),
    st.floats(0.1, 2),
    st.floats(2.5, 40),
    st.integers(1, 100_000),
)
def test_llama3_is_monotone_and_between_its_ends(factor, low, high, context):
  scaling = Llama3Scaling(
      factor=factor,
      low_frequency=low,
      high_frequency=high,
      original_context=context,
  )
  frequencies = plain(64, 500000.0)
  told = {
      "kind": "llama3",
      "factor": factor,
      "low": low,
      "high": high,
      "context": context,
  }
  with jax.numpy_rank_promotion("allow"):
    scaled = np.asarray(scaling(frequencies))
  np.testing.assert_allclose(
      scaled, oracle.frequencies(64, 500000.0, told), rtol=2e-5
  )
  assert np.all(scaled <= frequencies * (1 + 1e-6))
  assert np.all(scaled >= frequencies / factor * (1 - 1e-6))
  assert np.all(np.diff(scaled) <= 0)  # no two rotations change places


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 1, 1, 3, 10)).astype(np.float32)

  def at(vector, position):
    where = np.full((1, 1), position, np.int32)
    rotation = rotary.rotations(
        where, head_dim=10, base=100.0, scaling=LinearScaling(factor=2.0)
    )
    return np.asarray(rotary.rotate(vector, rotation))

  np.testing.assert_allclose(
      np.linalg.norm(at(query, 9), axis=-1), np.linalg.norm(query, axis=-1),
      rtol=1e-6,
  )  # fmt: skip
  near = np.sum(at(query, 5) * at(key, 2), axis=-1)
  far = np.sum(at(query, 45) * at(key, 42), axis=-1)
  np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-4)


def test_linear_scaling_of_n_puts_token_n_where_token_1_was():
  scaled = rotary.rotations(
      4 * POSITIONS, head_dim=8, base=50.0, scaling=LinearScaling(factor=4.0)
  )
  unscaled = rotary.rotations(POSITIONS, head_dim=8, base=50.0, scaling=None)
  np.testing.assert_allclose(scaled, unscaled, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", 0.5),
        ("factor", math.inf),
        ("factor", math.nan),
        ("low_frequency", 0.0),
        ("low_frequency", 4.0),
        ("high_frequency", math.inf),
        ("original_context", 0),
    ],
)
def test_impossible_scalings_are_named(field, value):
  with pytest.raises(ValueError, match=f"{field}.*{value!r}"):
    dataclasses.replace(LLAMA3, **{field: value})
  if field == "factor":
    with pytest.raises(ValueError, match=f"factor.*{value!r}"):
      LinearScaling(factor=value)


def test_angles_are_computed_once_however_many_layers_use_them():
  def cosines(layers):
    config = tiny_config(num_layers=layers)
    hidden = functools.partial(transformer.hidden_states, config=config)
    ids = jnp.ones((2, 32), jnp.int32)

    def total(weights):
      return jnp.sum(hidden(weights, ids, ids, ids))

    weights = params.init(jax.random.key(0), config)
    text = jax.jit(jax.grad(total)).lower(weights).compile().as_text()
    return len(re.findall(r" cosine\(", text))

  assert cosines(4) == cosines(2) > 0
