import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import losses as oracle

from mgrpo_jax import losses, numerics

RATIOS = ("token_ratio", "sequence_ratio", "geometric_ratio")
KLS = ("kl_k1", "kl_k2", "kl_k3")
AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_sum_norm",
)
SHAPE = (3, 5)


def norm(name, max_tokens):
  """The constant that one of the aggregations divides by."""
  return {"max_tokens": max_tokens} if name.endswith("norm") else {}


@functools.cache
def jitted(name, **keywords):
  return jax.jit(functools.partial(getattr(losses, name), **keywords))


def call(name, *arrays, **keywords):
  arrays = [np.asarray(array, np.float32) for array in arrays]
  return np.asarray(jitted(name, **keywords)(*arrays), np.float64)


def table(elements, shape=SHAPE):
  size = int(np.prod(shape))
  return st.lists(elements, min_size=size, max_size=size).map(
      lambda values: np.float32(values).astype(np.float64).reshape(shape)
  )


LOGPROBS = table(st.floats(-6.0, 0.0))
MASK = table(st.sampled_from([0.0, 1.0]))
WEIGHT = table(st.sampled_from([0.0, 0.5, 1.0, 2.0]), (3,))


@pytest.mark.parametrize("name", RATIOS)
@given(LOGPROBS, LOGPROBS, MASK)
@settings(max_examples=40, deadline=None)
def test_ratio_equals_a_product_of_probabilities(name, now, old, mask):
  # |log ratio| ≤ 30, summed in float32: 30 · 2^-23 · a few roundings.
  expected = getattr(oracle, name)(now, old, mask)
  np.testing.assert_allclose(call(name, now, old, mask), expected, rtol=3e-5)


@pytest.mark.parametrize("name", RATIOS)
def test_long_sequences_have_finite_ratios_and_gradients(name):
  now, mask = np.full((2, 4000), -0.1, np.float32), np.ones((2, 4000))
  old = now + np.array([[1.0], [-1.0]], np.float32)

  def total(now):
    return getattr(losses, name)(now, old, np.float32(mask)).sum()

  value, slope = jax.jit(jax.value_and_grad(total))(now)
  assert np.isfinite(value) and np.isfinite(slope).all()
  bound = np.exp(numerics.LOG_RATIO_BOUND)
  assert value <= 4000 * (bound + 1) * 1.001


@given(
    table(st.floats(0.0, 3.0)),
    table(st.floats(-2.0, 2.0)),
    st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0)]),
)
@settings(max_examples=40, deadline=None)
def test_surrogate_equals_the_equation(ratio, advantages, clip):
  keywords = {"clip_low": clip[0], "clip_high": clip[1]}
  np.testing.assert_allclose(
      call("clipped_surrogate", ratio, advantages, **keywords),
      oracle.clipped_surrogate(ratio, advantages, **keywords),
      rtol=1e-6,
      atol=1e-7,
  )


def test_surrogate_worked_by_hand():
  ratio, gains = [[1.5, 1.5, 0.5, 0.5]], [[1.0, -1.0, 1.0, -1.0]]
  value = call("clipped_surrogate", ratio, gains, clip_low=0.2, clip_high=0.3)
  np.testing.assert_allclose(value, [[1.3, -1.5, 0.5, -0.8]], rtol=1e-6)
  # The gradient vanishes exactly where clipping acts.
  slope = jax.jit(
      jax.grad(
          lambda r: losses.clipped_surrogate(
              r, np.float32(gains), clip_low=0.2, clip_high=0.3
          ).sum()
      )
  )(np.float32(ratio))
  np.testing.assert_array_equal(slope, [[0.0, -1.0, 1.0, 0.0]])


@given(
    table(st.floats(0.01, 5.0)),
    table(st.floats(-2.0, 2.0)),
    st.sampled_from([(0.2, 0.2), (0.2, 0.28), (1.0, 0.0)]),
)
@settings(max_examples=40, deadline=None)
def test_other_surrogates_equal_their_equations(ratio, advantages, clip):
  keywords = {"clip_low": clip[0], "clip_high": clip[1]}
  for name, more in (
      ("dual_clipped_surrogate", {"floor": 3.0}),
      ("cispo_surrogate", {}),
  ):
    np.testing.assert_allclose(
        call(name, ratio, advantages, **keywords, **more),
        getattr(oracle, name)(ratio, advantages, **keywords, **more),
        rtol=1e-6,
        atol=1e-7,
    )


def test_where_other_surrogates_learn():
  now = np.log(np.float32([[5.0, 5.0, 0.5, 1.1]]))  # log-probs; old ones 0
  gains = np.float32([[-1.0, 1.0, -1.0, 2.0]])

  def slope(surrogate, **more):
    def total(now):
      clip = {"clip_low": 0.2, "clip_high": 0.2}
      return surrogate(jnp.exp(now), gains, **clip, **more).sum()

    return jax.jit(jax.grad(total))(now)

  # Beyond the floor nothing pushes further; elsewhere all is as clipped.
  np.testing.assert_allclose(
      slope(losses.dual_clipped_surrogate, floor=3.0),
      [[0.0, 0.0, 0.0, 2.2]],
      rtol=1e-6,
  )
  # Every token learns, by its clipped ratio.
  np.testing.assert_allclose(
      slope(losses.cispo_surrogate), [[-1.2, 1.2, -0.8, 2.2]], rtol=1e-6
  )


@pytest.mark.parametrize("name", KLS)
@given(LOGPROBS, LOGPROBS)
@settings(max_examples=40, deadline=None)
def test_kl_estimate_equals_its_definition(name, now, ref):
  np.testing.assert_allclose(
      call(name, now, ref),
      getattr(oracle, name)(now, ref),
      rtol=1e-4,
      atol=2e-6,
  )


def test_k3_is_positive_even_a_rounding_away_from_equality():
  now = np.full((1, 400), -1.0, np.float32)
  ref = now + np.linspace(-1e-6, 1e-6, 400, dtype=np.float32)
  values = call("kl_k3", now, ref)
  assert (values >= 0).all()
  np.testing.assert_allclose(
      values, (np.float64(ref) - now) ** 2 / 2, rtol=0.1, atol=1e-13
  )
  assert np.isfinite(call("kl_k3", [[0.0]], [[-1e9]])).all()
  assert np.isfinite(call("kl_k3", [[-1e9]], [[0.0]])).all()


@pytest.mark.parametrize("name", KLS)
def test_expected_kl_estimate_is_the_divergence(name):
  # Σ_x π(x) k(x) over a distribution; k2 is biased, so it is only close.
  p, q = np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.35, 0.2])
  exact = (p * np.log(p / q)).sum()
  estimate = (p * call(name, np.log(p)[None], np.log(q)[None])).sum()
  assert abs(estimate - exact) <= (1e-3 if name == "kl_k2" else 1e-6)


def test_as_a_loss_k1_pulls_nowhere_and_k2_to_the_reference():
  # Σ_x π(x) ∇k(x), the π of the samples held fixed; a softmax of three.
  logits = np.array([0.3, -0.2, 0.9], np.float32)
  p, q = np.asarray(jax.nn.softmax(logits)), np.array([0.2, 0.5, 0.3])
  log_ratio = np.log(p / q)
  exact = p * (log_ratio - (p * log_ratio).sum())  # of KL(π ‖ π_ref)

  def mean_gradient(kl):
    def expected(logits):
      now = jax.nn.log_softmax(logits)[None]
      return jnp.sum(p * kl(now, np.float32(np.log(q))[None])[0])

    return jax.grad(expected)(logits)

  np.testing.assert_allclose(mean_gradient(losses.kl_k1), 0.0, atol=1e-6)
  np.testing.assert_allclose(mean_gradient(losses.kl_k2), exact, atol=1e-6)


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(table(st.floats(-4.0, 4.0)), MASK, WEIGHT)
@settings(max_examples=40, deadline=None)
def test_aggregation_equals_its_sums(name, values, mask, weight):
  keywords = norm(name, 7.0)
  np.testing.assert_allclose(
      call(name, values, mask, weight, **keywords),
      getattr(oracle, name)(values, mask, weight, **keywords),
      rtol=1e-5,
      atol=1e-5,
  )


def test_aggregations_worked_by_hand():
  values, weight = [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]], [1.0, 1.0]
  mask = [[1, 1, 1], [1, 0, 0]]
  for name, expected in zip(AGGREGATIONS, (2.5, 3.0, 5.0, 5 / 3), strict=True):
    found = call(name, values, mask, weight, **norm(name, 3.0))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_micro_batches_add_up_with_the_whole_batchs_totals(name):
  rng = np.random.default_rng(0)
  values = np.float32(rng.normal(size=(6, 5)))
  mask = np.float32(rng.random((6, 5)) < 0.6)
  weight = np.float32(rng.random(6))
  totals = losses.Totals(
      trajectories=weight.sum(),
      tokens=(weight * mask.sum(1)).sum(),
      context_tokens=np.float32(0),
  )
  run = jitted(name, **norm(name, 5.0))
  parts = [
      run(values[s], mask[s], weight[s], totals=totals)
      for s in (slice(0, 1), slice(1, 2), slice(2, 6))
  ]
  whole = run(values, mask, weight)
  np.testing.assert_allclose(sum(map(float, parts)), whole, rtol=1e-5)
