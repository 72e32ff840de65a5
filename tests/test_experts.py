"""Mixtures of experts against the oracle's, and its finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from oracles import transformer as oracle

from mgrpo_jax import sharding
from mgrpo_jax.policy import experts, params, transformer
from mgrpo_jax.policy.config import Experts

EMBED, ROWS, LENGTH = 6, 2, 9
# float32 against float64: some hundred roundings of numbers of size 10.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
SHAPES = {
    "two_of_five": Experts(number=5, per_token=2, mlp_dim=7, normalised=True),
    "unscaled": Experts(number=5, per_token=3, mlp_dim=4, normalised=False),
    "all_of_them": Experts(number=3, per_token=3, mlp_dim=5, normalised=False),
    "one": Experts(number=1, per_token=1, mlp_dim=4, normalised=False),
    "most_unused": Experts(number=40, per_token=1, mlp_dim=3, normalised=True),
}


def config(mixture, **changes):
  return tiny_llama.config(
      embed_dim=EMBED, num_layers=1, experts=mixture, **changes
  )


def layer_of(cfg):
  return tiny_llama.weights(cfg).layers[0]


def stream(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(ROWS, LENGTH, EMBED)).astype(np.float32)


def mixed(layer, y, cfg):
  return experts.mix(layer, y, transformer.ACTIVATIONS["silu"], config=cfg)


MIX = jax.jit(mixed, static_argnums=2)


def expected(layer, y, cfg):
  weights = {
      name: np.asarray(getattr(layer, name), np.float64)
      for name in ("router", "gate", "up", "down")
  }
  model = tiny_llama.oracle_model(cfg)
  tokens = np.asarray(y, np.float64).reshape(-1, EMBED)
  said = [oracle.mixture(token, weights, model) for token in tokens]
  return np.stack(said).reshape(np.shape(y))


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_oracle(name):
  cfg = config(SHAPES[name])
  actual = MIX(layer_of(cfg), stream(), cfg)
  np.testing.assert_allclose(
      actual, expected(layer_of(cfg), stream(), cfg), **CLOSE
  )


def test_by_hand():
  # Two experts that see one number: the first doubles it, the second says -1
  # times it; softmax of (ln 3, 0) is (3/4, 1/4); silu(20) is 20 to 8 digits.
  mixture = Experts(number=2, per_token=2, mlp_dim=1, normalised=True)
  cfg = tiny_llama.config(embed_dim=1, num_layers=1, experts=mixture)
  layer = layer_of(cfg).replace(
      router=np.float32([[np.log(3) / 20, 0.0]]),
      gate=np.ones((2, 1, 1), np.float32),
      up=np.full((2, 1, 1), 1 / 20, np.float32),
      down=np.float32([2.0, -1.0]).reshape(2, 1, 1),
  )
  said = mixed(layer, np.full((1, 1, 1), 20.0, np.float32), cfg)
  np.testing.assert_allclose(said, 0.75 * 40 - 0.25 * 20, rtol=1e-6)


def test_gradients_equal_finite_differences_of_the_oracle():
  cfg = config(SHAPES["two_of_five"])
  layer, y = layer_of(cfg), stream()
  cotangent = np.random.default_rng(1).normal(size=y.shape)

  def loss(layer, y):
    return jnp.sum(mixed(layer, y, cfg) * np.float32(cotangent))

  of_layer, of_stream = jax.jit(jax.grad(loss, argnums=(0, 1)))(layer, y)
  wide = layer.replace(
      **{
          name: np.asarray(getattr(layer, name), np.float64)
          for name in ("router", "gate", "up", "down")
      }
  )
  tokens = y.astype(np.float64)

  def difference(array, index, step=1e-5):
    value, sides = array[index], []
    for moved in (value + step, value - step):
      array[index] = moved
      sides.append(np.sum(expected(wide, tokens, cfg) * cotangent))
    array[index] = value
    return (sides[0] - sides[1]) / (2 * step)

  chosen = np.argmax(tokens[0, 0] @ wide.router)
  places = {
      "router": (1, chosen),
      "gate": (chosen, 2, 3),
      "up": (chosen, 0, 6),
      "down": (chosen, 4, 5),
  }
  for name, index in places.items():
    slope = difference(getattr(wide, name), index)
    # 1e-10 relative from the step; the rest is the float32 gradient.
    np.testing.assert_allclose(
        getattr(of_layer, name)[index], slope, rtol=1e-3, err_msg=name
    )
    assert abs(slope) > 1e-2, f"{name} hardly matters: pick another"
  slope = difference(tokens, (1, 4, 2))
  np.testing.assert_allclose(of_stream[1, 4, 2], slope, rtol=1e-3)


def test_an_expert_that_nobody_chose_learns_nothing():
  cfg = config(SHAPES["most_unused"])
  layer, y = layer_of(cfg), stream()

  def loss(layer, y):
    return jnp.sum(mixed(layer, y, cfg) ** 2)

  gradient = jax.jit(jax.grad(loss))(layer, y)
  chosen = np.unique(np.argmax(y @ layer.router, axis=-1))
  for name in ("gate", "up", "down"):
    moved = np.any(np.asarray(getattr(gradient, name)), axis=(1, 2))
    assert np.flatnonzero(moved).tolist() == chosen.tolist()


def test_one_expert_is_the_plain_feed_forward():
  cfg = config(SHAPES["one"])
  dense = dataclasses.replace(cfg, experts=None, mlp_dim=4)
  layer = layer_of(cfg)
  flat = {name: getattr(layer, name)[0] for name in ("gate", "up", "down")}
  plain = layer.replace(router=None, **flat)
  attended = np.zeros((ROWS, LENGTH, 2, 2, cfg.head_dim), np.float32)
  finish = jax.jit(transformer.finish, static_argnames="config")
  np.testing.assert_allclose(
      finish(layer, stream(), attended, config=cfg),
      finish(plain, stream(), attended, config=dense),
      **CLOSE,
  )


def test_of_equally_likely_experts_the_first_are_taken():
  cfg = config(SHAPES["two_of_five"])
  layer = layer_of(cfg).replace(router=np.zeros((EMBED, 5), np.float32))
  actual = MIX(layer, stream(), cfg)
  np.testing.assert_allclose(actual, expected(layer, stream(), cfg), **CLOSE)
  others = layer.replace(down=layer.down * (np.arange(5) < 2)[:, None, None])
  np.testing.assert_array_equal(MIX(others, stream(), cfg), actual)


def test_all_tokens_may_go_to_one_expert():
  # Nothing is dropped, however uneven the routing.
  cfg = config(SHAPES["most_unused"])
  router = np.zeros((EMBED, 40), np.float32)
  router[:, 17] = 1.0
  layer, y = layer_of(cfg).replace(router=router), np.abs(stream())
  actual = MIX(layer, y, cfg)
  np.testing.assert_allclose(actual, expected(layer, y, cfg), **CLOSE)
  assert np.all(np.any(np.asarray(actual) != 0, axis=-1))


def test_tokens_of_padding_change_no_real_one():
  cfg = config(SHAPES["two_of_five"])
  rows = tiny_llama.packed_rows(((5, 2), (4,)), LENGTH, cfg)
  real = rows[2] > 0
  apply = jax.jit(functools.partial(transformer.apply, config=cfg))
  before = np.asarray(apply(tiny_llama.weights(cfg), *rows))
  garbage = np.where(real, rows[0], 7), np.where(real, rows[1], 3), rows[2]
  after = np.asarray(apply(tiny_llama.weights(cfg), *garbage))
  np.testing.assert_array_equal(before[real], after[real])
  other = np.where(real[..., None], stream(), 100.0).astype(np.float32)
  mixture = functools.partial(MIX, layer_of(cfg))
  np.testing.assert_array_equal(
      mixture(stream(), cfg)[real], mixture(other, cfg)[real]
  )


@pytest.mark.parametrize(
    "sizes",
    (
        {"data": 1, "fsdp": 1, "tensor": 1, "expert": 8},
        {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2},
    ),
    ids=str,
)
def test_eight_devices_mix_like_one(sizes):
  mixture = Experts(number=8, per_token=3, mlp_dim=4, normalised=True)
  cfg = config(mixture, vocab_size=24)
  mesh = sharding.make_mesh(**sizes, devices=jax.devices())
  specs = params.param_specs(cfg)
  with jax.set_mesh(mesh):
    tree = jax.device_put(
        tiny_llama.weights(cfg), sharding.params_shardings(specs, mesh)
    )
    rows = sharding.spec("batch", "length", "hidden")
    y = jax.device_put(stream(), jax.NamedSharding(mesh, rows))
    actual = MIX(tree.layers[0], y, cfg)
  np.testing.assert_allclose(
      actual, expected(layer_of(cfg), stream(), cfg), **CLOSE
  )


def test_without_experts_is_an_error():
  cfg = config(SHAPES["one"])
  with pytest.raises(ValueError, match="config.experts must be set"):
    mixed(layer_of(cfg), stream(), dataclasses.replace(cfg, experts=None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", 0),
        ("number", 2.0),
        ("per_token", 0),
        ("per_token", 6),
        ("mlp_dim", -1),
        ("mlp_dim", True),
    ],
)
def test_impossible_mixtures_are_named(field, value):
  with pytest.raises(ValueError, match=f"^{field} must be .*{value!r}"):
    dataclasses.replace(SHAPES["two_of_five"], **{field: value})


@pytest.mark.parametrize("tile", (1, 3, 1024))
def test_kernels_learn_tile_by_tile_what_they_learn_at_once(tile, monkeypatch):
  monkeypatch.setattr(experts, "_TILE", tile)
  rng = np.random.default_rng(0)
  sizes = np.array([4, 0, 7, 1], np.int32)
  rows, kernels, told = (
      rng.normal(size=shape).astype(np.float32)
      for shape in ((15, 5), (4, 5, 2), (15, 2))
  )

  def loss(product, rows, kernels):
    added = product(rows, kernels, sizes)
    return jnp.sum(jnp.where(np.arange(15)[:, None] < 12, added * told, 0.0))

  wanted, actual = (
      jax.grad(functools.partial(loss, product), argnums=(0, 1))(rows, kernels)
      for product in (
          lambda *x: jax.lax.ragged_dot(x[0], x[1], group_sizes=x[2]),
          experts.multiply,
      )
  )
  np.testing.assert_allclose(actual[0][:12], wanted[0][:12], rtol=1e-5)
  np.testing.assert_allclose(actual[1], wanted[1], rtol=1e-5, atol=1e-6)
  assert not np.any(actual[1][1])


def test_what_stands_in_rows_of_no_kernel_teaches_nothing():
  sizes = np.array([1, 1], np.int32)
  rows, kernels = np.ones((3, 2), np.float32), np.ones((2, 2, 2), np.float32)
  rows[2] = np.nan
  told = np.array([[1, 2], [3, 4], [np.nan] * 2], np.float32)
  with jax.debug_nans(False):
    _, pull = jax.vjp(lambda k: experts.multiply(rows, k, sizes), kernels)
    (learnt,) = pull(told)
  np.testing.assert_array_equal(learnt, [[[1, 2]] * 2, [[3, 4]] * 2])
