import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import transformer as oracle

from mgrpo_jax.aot import flops
from mgrpo_jax.policy import logprobs, transformer
from mgrpo_jax.policy.config import Execution

ROWS = ((5, 1, 7), (13, 2), ())
LENGTH = 17
CHUNK = 5  # does not divide the length
CFG = tiny_llama.config(num_layers=1, execution=Execution(logit_columns=CHUNK))
# float32 against float64: log-probabilities of size 5, some hundred roundings.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def rows(seed=0):
  return tiny_llama.packed_rows(ROWS, LENGTH, CFG, seed)


@functools.cache
def scorer(function, config):
  return jax.jit(functools.partial(function, config=config))


def score(function, batch, *, temperature, config=CFG):
  values = scorer(function, config)(
      tiny_llama.weights(CFG), *batch, temperature=np.float32(temperature)
  )
  return jax.tree.map(np.asarray, values)


def expected(batch, temperature):
  weights = tiny_llama.oracle_weights(tiny_llama.weights(CFG), CFG)
  logits = oracle.packed_logits(weights, *batch, tiny_llama.oracle_model(CFG))
  return oracle.token_logprobs(logits, batch[0], batch[2], temperature)


WITH_ENTROPY = functools.partial(logprobs.predict, entropy=True)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.3, 1.0, 2.5]))
def test_equals_the_oracle(seed, temperature):
  batch = rows(seed)
  values, entropies = expected(batch, temperature)
  alone = score(logprobs.token_logprobs, batch, temperature=temperature)
  both = score(WITH_ENTROPY, batch, temperature=temperature)
  np.testing.assert_allclose(alone, values, **CLOSE)
  np.testing.assert_allclose(both.logprobs, values, **CLOSE)
  np.testing.assert_allclose(both.entropy, entropies, **CLOSE)
  assert both.values is None


def test_zero_exactly_where_nothing_is_predicted():
  batch = rows()
  values = score(logprobs.token_logprobs, batch, temperature=1.0)
  starts = batch[1] == 0  # of segments; padding has position 0 as well
  np.testing.assert_array_equal(values == 0, starts)
  np.testing.assert_array_equal(logprobs.has_past(batch[2]), ~starts)


@pytest.mark.parametrize("columns", (1, 1000))
def test_how_many_logits_exist_at_once_changes_nothing(columns):
  batch = rows()
  values = score(logprobs.token_logprobs, batch, temperature=1.0)
  other = score(
      logprobs.token_logprobs,
      batch,
      temperature=1.0,
      config=dataclasses.replace(
          CFG, execution=Execution(logit_columns=columns)
      ),
  )
  np.testing.assert_allclose(values, other, **CLOSE)


def test_logits_are_computed_again_only_where_they_came_in_chunks():
  batch, products = rows(), {}
  for columns in (LENGTH, LENGTH - 1):
    config = dataclasses.replace(
        CFG, execution=Execution(logit_columns=columns)
    )

    def loss(tree, config=config):
      return logprobs.token_logprobs(
          tree, *batch, config=config, temperature=1.0
      ).sum()

    traced = jax.make_jaxpr(jax.value_and_grad(loss))(tiny_llama.weights(CFG))
    products[columns] = flops.traced(traced).products
  head = 2 * len(ROWS) * CFG.embed_dim * CFG.vocab_size
  # Forward, and backward by both factors; in chunks once more, and padded.
  more = 4 * 2 * (LENGTH - 1) - 3 * LENGTH
  assert products[LENGTH - 1] - products[LENGTH] == head * more


def total(tree, batch):
  """A loss with a weight of its own on every token."""
  values = logprobs.token_logprobs(tree, *batch, config=CFG, temperature=0.7)
  return jnp.sum(values * np.cos(np.arange(LENGTH, dtype=np.float32))[None])


def total_at_once(tree, batch):
  """The same from all logits."""
  tokens, _, segments = batch
  logits = transformer.apply(tree, *batch, config=CFG)
  logps = jax.nn.log_softmax(logits[:, :-1] / 0.7)
  values = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
  same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  weights = np.cos(np.arange(1, LENGTH, dtype=np.float32))[None]
  return jnp.sum(jnp.where(same, values * weights, 0.0))


gradient = jax.jit(jax.grad(total))


def test_gradient_equals_that_of_all_logits_at_once():
  tree, batch = tiny_llama.weights(CFG), rows()
  reference = jax.jit(jax.grad(total_at_once))(tree, batch)
  for actual, wanted in zip(
      jax.tree.leaves(gradient(tree, batch)),
      jax.tree.leaves(reference),
      strict=True,
  ):
    # Two float32 programs that sum some 40 terms in different orders.
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_padding_reaches_no_gradient(token, position):
  tree, batch = tiny_llama.weights(CFG), rows()
  real = batch[2] > 0
  garbage = (
      np.where(real, batch[0], np.int32(token)),
      np.where(real, batch[1], np.int32(position)),
      batch[2],
  )
  jax.tree.map(
      np.testing.assert_array_equal,
      gradient(tree, batch),
      gradient(tree, garbage),
  )


def largest_logits(function, *args):
  """Elements of the largest array with a vocabulary axis, by compiler view."""
  program = jax.jit(function).lower(*args)
  text = program.as_text(debug_info=False) + program.compile().as_text()
  shapes = re.findall(r"tensor<([\dx]+)xf32>", text)
  shapes = [shape.split("x") for shape in shapes]
  shapes += [shape.split(",") for shape in re.findall(r"f32\[([\d,]+)\]", text)]
  sizes = [
      np.prod([int(size) for size in shape])
      for shape in shapes
      if str(CFG.vocab_size) in shape
  ]
  return max(sizes)


def test_all_logits_never_exist():
  tree, batch = tiny_llama.weights(CFG), rows()
  everything = len(ROWS) * LENGTH * CFG.vocab_size
  chunk = len(ROWS) * CHUNK * CFG.vocab_size
  assert largest_logits(jax.value_and_grad(total), tree, batch) == chunk
  # The search does find them where they do exist.
  assert largest_logits(jax.grad(total_at_once), tree, batch) >= (
      everything - len(ROWS) * CFG.vocab_size
  )


@pytest.mark.parametrize("most", (8, 13))
def test_wanted_tokens_alone_score_alike(most):
  batch = rows()
  wanted = np.random.default_rng(4).random(batch[0].shape) < 0.5
  everywhere = score(logprobs.token_logprobs, batch, temperature=0.7)
  real = wanted & (everywhere != 0)
  assert 2 <= np.max(np.sum(real, axis=1)) <= most

  def said(tree):
    return WITH_ENTROPY(
        tree,
        *batch,
        config=CFG,
        temperature=0.7,
        wanted=wanted,
        most_wanted=most,
    )

  def some(tree):
    return said(tree).logprobs

  tree = tiny_llama.weights(CFG)
  np.testing.assert_allclose(
      jax.jit(said)(tree).entropy,
      np.where(real, score(WITH_ENTROPY, batch, temperature=0.7).entropy, 0.0),
      **CLOSE,
  )
  np.testing.assert_allclose(
      jax.jit(some)(tree), np.where(real, everywhere, 0.0), **CLOSE
  )
  # Logits exist for wanted tokens only, and their gradient is the same.
  slopes = jax.jit(jax.grad(lambda tree: some(tree).sum()))(tree)
  whole = jax.jit(
      jax.grad(
          lambda tree: jnp.where(
              real,
              logprobs.token_logprobs(
                  tree, *batch, config=CFG, temperature=0.7
              ),
              0.0,
          ).sum()
      )
  )(tree)
  for actual, wanted_slope in zip(
      jax.tree.leaves(slopes), jax.tree.leaves(whole), strict=True
  ):
    np.testing.assert_allclose(actual, wanted_slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", (0, 13))
def test_a_critic_expects_what_stands_before_a_token(most):
  batch, tree = rows(), tiny_llama.weights(CFG)
  head = np.random.default_rng(0).normal(size=CFG.embed_dim)
  tree = dataclasses.replace(tree, value_head=np.float32(head))
  config = dataclasses.replace(CFG, value_head=True)
  wanted = np.random.default_rng(4).random(batch[0].shape) < 0.5

  def said(tree):
    return logprobs.predict(
        tree,
        *batch,
        config=config,
        temperature=0.7,
        wanted=wanted,
        most_wanted=most,
    )

  hidden = jax.jit(functools.partial(transformer.hidden_states, config=config))(
      tree, *batch
  )
  expected = np.roll(np.asarray(hidden) @ head, 1, axis=1)
  asked = wanted | (most == 0)
  expected = np.where(logprobs.has_past(batch[2]) & asked, expected, 0.0)
  found = jax.jit(said)(tree)
  np.testing.assert_allclose(found.values, expected, **CLOSE)
  everywhere = score(logprobs.token_logprobs, batch, temperature=0.7)
  np.testing.assert_allclose(
      found.logprobs, np.where(asked, everywhere, 0.0), **CLOSE
  )
