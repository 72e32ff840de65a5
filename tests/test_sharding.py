import collections
import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
import tiny_llama
from jax.sharding import AbstractMesh, AxisType

from mgrpo_jax import sharding
from mgrpo_jax.policy import logprobs, params
from mgrpo_jax.policy.config import Execution, Experts

ROWS = ((9, 4), (13,), (2, 2), (5, 6, 2), (1,), (3, 8), (7,), (6, 6))
LENGTH, CHUNK = 13, 5
CFG = tiny_llama.config(
    num_layers=1,
    vocab_size=24,
    embed_dim=16,
    execution=Execution(logit_columns=CHUNK),
)
WIDE = dataclasses.replace(CFG, num_heads=16, num_kv_heads=8, mlp_dim=16)
SPARSE = dataclasses.replace(
    WIDE,
    qk_norm=True,
    experts=Experts(number=4, per_token=2, mlp_dim=8, normalised=True),
)
FAMILIES = {
    "biased": dataclasses.replace(
        WIDE,
        qkv_bias=True,
        tied_embeddings=False,
        execution=Execution(
            logit_columns=CHUNK,
            remat=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        ),
    ),
    "windowed": dataclasses.replace(
        WIDE,
        num_layers=4,
        windows=(3, 0, 3, 0),
        local_rope_base=10.0,
        qk_norm=True,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=4.0,
        execution=Execution(
            logit_columns=CHUNK,
            scan_layers=True,
            remat=jax.checkpoint_policies.nothing_saveable,
        ),
    ),
    "sparse": SPARSE,
}


def sizes_of(data, fsdp, tensor, expert):
  return {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert}


MIXED = sizes_of(2, 2, 2, 1)
SPLIT = ("kv_heads", "mlp", "vocab", "expert")  # over tensor or expert
CASES = [
    (family, sizes_of(*sizes))
    for family, sizes in (
        ("biased", (8, 1, 1, 1)),
        ("biased", (2, 2, 2, 1)),
        ("windowed", (1, 8, 1, 1)),
        ("windowed", (1, 1, 8, 1)),
        ("windowed", (2, 2, 2, 1)),
        ("sparse", (2, 1, 1, 4)),
        ("sparse", (1, 2, 2, 2)),
    )
]


def batch():
  tokens, positions, segments = tiny_llama.packed_rows(ROWS, LENGTH, CFG)
  return {"tokens": tokens, "positions": positions, "segment_ids": segments}


def train_step(tree, rows, *, config):
  """One step of gradient descent on the negative log-likelihood."""

  def loss(tree):
    values = logprobs.token_logprobs(
        tree, **rows, config=config, temperature=1.0
    )
    return -values.sum() / values.size

  value, grads = jax.value_and_grad(loss)(tree)
  return value, jax.tree.map(lambda w, g: w - 0.1 * g, tree, grads)


def jitted(config=CFG):
  return jax.jit(functools.partial(train_step, config=config))


@functools.cache
def on_one_device(config):
  return jax.device_get(jitted(config)(tiny_llama.weights(config), batch()))


def placed(mesh, config=CFG):
  at_rest = sharding.params_shardings(params.param_specs(config), mesh)
  tree = jax.device_put(tiny_llama.weights(config), at_rest)
  rows = jax.device_put(batch(), sharding.batch_shardings(batch(), mesh))
  return tree, rows


@pytest.mark.parametrize(("family", "sizes"), CASES, ids=str)
def test_eight_devices_step_like_one(family, sizes):
  config = FAMILIES[family]
  mesh = sharding.make_mesh(**sizes, devices=jax.devices())
  with jax.set_mesh(mesh):
    tree, rows = placed(mesh, config)
    step = jitted(config)
    value, updated = step(tree, rows)
    step(updated, rows)
    assert step._cache_size() == 1  # shardings come out as they went in
  expected_value, expected = on_one_device(config)
  # float32 sums of some hundred terms, in another order.
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  before = tiny_llama.weights(config)
  for actual, wanted, start in zip(
      *map(jax.tree.leaves, (updated, expected, before)), strict=True
  ):
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=2e-6)
    assert np.max(np.abs(wanted - start)) > 1e-5


def test_eight_devices_step_like_one_in_bfloat16():
  config = dataclasses.replace(FAMILIES["biased"], dtype="bfloat16")
  mesh = sharding.make_mesh(**MIXED, devices=jax.devices())
  with jax.set_mesh(mesh):
    _, updated = jitted(config)(*placed(mesh, config))
  _, expected = on_one_device(config)
  before = tiny_llama.weights(config)
  for actual, wanted, start in zip(
      *map(jax.tree.leaves, (updated, expected, before)), strict=True
  ):
    # Sums over devices are rounded to eight bits, and so is all before them.
    error = np.linalg.norm(np.asarray(actual) - wanted)
    assert 0 < error < 0.03 * np.linalg.norm(wanted - start)


def test_weights_at_rest_are_split_over_fsdp_and_tensor():
  mesh = sharding.make_mesh(**MIXED, devices=jax.devices())
  tree, rows = placed(mesh)
  for value in jax.tree.leaves(tree):
    pieces = 4 if value.ndim > 1 else 1
    assert value.addressable_shards[0].data.size == value.size // pieces
  for value in rows.values():
    assert value.addressable_shards[0].data.size == value.size // 4


COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute|collective-broadcast)(?:-start)?\((.*)"
)


def collectives(text):
  """(kind, shape, operation) of every array that a program communicates."""
  found = []
  for line in text.splitlines():
    if match := COLLECTIVE.search(line):
      operation = re.search(r'op_name="([^"]*)"', line)
      for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
        size = tuple(int(n) for n in shape.split(",") if n)
        found.append((match[2], size, operation[1] if operation else ""))
  return found


def test_the_compiled_step_communicates_what_it_must_and_no_more():
  mesh = sharding.make_mesh(**MIXED, devices=jax.devices())
  with jax.set_mesh(mesh):
    found = collectives(jitted().lower(*placed(mesh)).compile().as_text())
  kinds = collections.Counter(kind for kind, _, _ in found)
  assert kinds.keys() <= {"all-reduce", "all-gather", "reduce-scatter"}
  kernels = [
      s.shape
      for s in jax.tree.leaves(params.param_specs(CFG))
      if len(s.shape) > 1
  ]
  stream = len(ROWS) // 4 * LENGTH * CFG.embed_dim
  gathered = [size for kind, size, _ in found if kind == "all-gather"]
  # Each kernel is brought together over fsdp, for its use and for its
  # transpose; no activation ever is.
  assert len(kernels) <= len(gathered) <= 2 * len(kernels)
  assert {np.prod(size) for size in gathered} <= {
      np.prod(shape) // 2 for shape in kernels
  }
  # In a layer: attention and feed-forward add what their heads and columns
  # hold; backward, q, k, v, gate and up do. Once more for the embedding.
  summed = [np.prod(size) for kind, size, _ in found if kind == "all-reduce"]
  assert summed.count(stream) == 7 * CFG.num_layers + 1
  # Gradients are summed over rows once, not for every chunk of logits.
  inside = [size for _, size, name in found if "while/body" in name]
  chunk = (len(ROWS) // 4, CHUNK)
  assert set(inside) <= {chunk, (*chunk, CFG.embed_dim)}


def test_experts_are_gathered_over_fsdp_and_their_parts_added():
  mesh = sharding.make_mesh(**sizes_of(1, 2, 2, 2), devices=jax.devices())
  with jax.set_mesh(mesh):
    lowered = jitted(SPARSE).lower(*placed(mesh, SPARSE))
    found = collectives(lowered.compile().as_text())
  assert not {kind for kind, _, _ in found} & {"all-to-all"}
  kernels = [
      s for s in jax.tree.leaves(params.param_specs(SPARSE)) if len(s.shape) > 1
  ]
  # What a device holds of a kernel in use: its tensor and expert pieces of it.
  used = {
      np.prod(s.shape) // math.prod(2 for a in s.logical_axes if a in SPLIT)
      for s in kernels
  }
  gathered = [size for kind, size, _ in found if kind == "all-gather"]
  assert {np.prod(size) for size in gathered} <= used
  assert len(kernels) <= len(gathered) <= 2 * len(kernels)
  # What heads and experts say is added; going backward, what q, k, v and the
  # experts tell their input. Once more for the embedding.
  tokens = len(ROWS) // 2 * LENGTH
  summed = [size for kind, size, _ in found if kind == "all-reduce"]
  sizes = [np.prod(size) for size in summed]
  assert sizes.count(tokens * SPARSE.embed_dim) == 6 + 1
  # One row a token, not one for each of its experts.
  sent = tokens * SPARSE.experts.per_token
  assert not any(size[:1] == (sent,) for size in summed)


def test_a_train_step_lowers_for_256_devices():
  cfg = tiny_llama.config(
      vocab_size=128256,
      embed_dim=4096,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      mlp_dim=14336,
      tied_embeddings=False,
      dtype="bfloat16",
  )
  mesh = AbstractMesh(
      (1, 64, 4, 1), sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * 4
  )

  def placed_shape(shape, where):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

  specs = params.param_specs(cfg)
  tree = jax.tree.map(
      placed_shape,
      params.abstract(cfg),
      sharding.params_shardings(specs, mesh),
  )
  rows = {
      name: jax.ShapeDtypeStruct((128, 256), np.int32)
      for name in ("tokens", "positions", "segment_ids")
  }
  rows = jax.tree.map(placed_shape, rows, sharding.batch_shardings(rows, mesh))
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jitted(cfg).trace(tree, rows)
    lowered = traced.lower(lowering_platforms=("tpu",))
  assert "mhlo.num_partitions = 256" in lowered.as_text()
  _, *updated = traced.jaxpr.out_avals
  for spec, result in zip(jax.tree.leaves(specs), updated, strict=True):
    assert result.shape == spec.shape
    assert result.sharding.spec == sharding.spec(*spec.logical_axes)


@pytest.mark.parametrize(
    "sizes",
    (
        {"data": 3, "fsdp": 1, "tensor": 1, "expert": 1},
        {"data": -8, "fsdp": -1, "tensor": 1, "expert": 1},
    ),
)
def test_a_mesh_that_does_not_fit_is_an_error(sizes):
  with pytest.raises(ValueError, match="number of devices, 8"):
    sharding.make_mesh(**sizes, devices=jax.devices())


def test_what_does_not_divide_is_named():
  mesh = sharding.make_mesh(
      data=1, fsdp=2, tensor=4, expert=1, devices=jax.devices()
  )
  with pytest.raises(ValueError, match=r"layers\[0\].*kv_heads=2.* of 4"):
    sharding.params_shardings(params.param_specs(CFG), mesh)
  rows = {"tokens": np.zeros((7, LENGTH))}
  with pytest.raises(ValueError, match=r"tokens.*batch=7 .* of 2"):
    sharding.batch_shardings(rows, mesh)


def test_without_a_mesh_nothing_is_placed():
  weight = np.ones((2, 3))
  assert sharding.out("batch", "hidden") is None
  assert sharding.constrain(weight, "vocab", "embed") is weight
  assert sharding.gather(weight, "vocab", "embed") is weight


def test_the_head_runs_for_wanted_tokens_alone_on_any_mesh():
  wanted = np.random.default_rng(0).random((len(ROWS), LENGTH)) < 0.4

  def score(tree, rows, wanted):
    values = logprobs.predict(
        tree,
        **rows,
        config=CFG,
        temperature=1.0,
        wanted=wanted,
        most_wanted=LENGTH - 1,
    ).logprobs
    return values.sum(), values

  graded = jax.jit(jax.value_and_grad(score, has_aux=True))
  (_, expected), slopes = graded(tiny_llama.weights(CFG), batch(), wanted)
  assert 0 < np.count_nonzero(expected) < np.sum(wanted)
  mesh = sharding.make_mesh(
      data=2, fsdp=2, tensor=2, expert=1, devices=jax.devices()
  )
  with jax.set_mesh(mesh):
    tree, rows = placed(mesh)
    where = sharding.batch_shardings(wanted, mesh)
    (_, values), gradient = graded(tree, rows, jax.device_put(wanted, where))
  # float32 sums of some hundred terms, in another order.
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
  for actual, slope in zip(
      *map(jax.tree.leaves, (gradient, slopes)), strict=True
  ):
    np.testing.assert_allclose(actual, slope, rtol=1e-4, atol=1e-5)
