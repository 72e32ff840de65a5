import math

import jax
import numpy as np
import optax
import pytest
from oracles import update as oracle

from mgrpo_jax import optim

# Of a size with the gradients: the first step would forget theirs else.
ADAMW = dict(b1=0.9, b2=0.99, eps=1e-2, weight_decay=0.1, clip_norm=0.5)


def test_learning_rate_rises_holds_and_decays():
  schedule = optim.Schedule(
      peak=2.0, warmup_steps=4, decay_steps=8, final_fraction=0.25
  )
  rates = [optim.learning_rate(schedule, step) for step in range(20)]
  np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
  np.testing.assert_allclose(rates[8], 2.0 * (1 + 0.25) / 2)
  np.testing.assert_allclose(rates[12:], 0.5)
  assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_without_warmup_or_decay_the_rate_is_constant():
  schedule = optim.Schedule(
      peak=0.3, warmup_steps=0, decay_steps=0, final_fraction=1.0
  )
  assert {optim.learning_rate(schedule, n) for n in (0, 1, 10**6)} == {0.3}


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # clipped, and not
def test_first_step_equals_the_algorithm(scale):
  rng = np.random.default_rng(0)
  table, gradient = rng.normal(size=(2, 4, 3))
  optimizer = optim.adamw(optim.AdamW(**ADAMW))

  @jax.jit
  def step(params, grads):
    directions, _ = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(
        params, jax.tree.map(lambda u: -0.01 * u, directions)
    )

  expected = oracle.first_adamw_step(
      table, gradient * scale, rate=0.01, **ADAMW
  )
  found = step(np.float32(table), np.float32(gradient * scale))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_weight_decay_spares_vectors():
  optimizer = optim.adamw(optim.AdamW(**ADAMW))
  params = {"matrix": np.ones((2, 2), np.float32), "scale": np.ones(2, "f4")}

  @jax.jit
  def directions(params):
    grads = jax.tree.map(lambda p: 0 * p, params)
    return optimizer.update(grads, optimizer.init(params), params)[0]

  found = directions(params)
  np.testing.assert_allclose(found["matrix"], 0.1)
  np.testing.assert_array_equal(found["scale"], 0.0)


@pytest.mark.parametrize(
    "field, value",
    [
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("clip_norm", 0.0),
        ("clip_norm", math.nan),
    ],
)
def test_bad_optimizer_fields_are_named(field, value):
  with pytest.raises(ValueError, match=f"^{field} must be "):
    optim.AdamW(**{**ADAMW, field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("peak", 0.0),
        ("peak", math.inf),
        ("warmup_steps", -1),
        ("decay_steps", -1),
        ("final_fraction", 1.5),
    ],
)
def test_bad_schedule_fields_are_named(field, value):
  good = dict(peak=1.0, warmup_steps=0, decay_steps=0, final_fraction=0.0)
  with pytest.raises(ValueError, match=f"^{field} must be "):
    optim.Schedule(**{**good, field: value})
