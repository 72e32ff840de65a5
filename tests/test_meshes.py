"""Policies on meshes of their own: who gets which devices, and whole runs."""

import asyncio
import dataclasses
import io
import itertools
import types

import jax
import numpy as np
import pytest
import tiny_run

from mgrpo_jax import optim, publish, sharding, store
from mgrpo_jax.learner import Learner
from mgrpo_jax.packing import BatchShape
from mgrpo_jax.plan import Adaptation
from mgrpo_jax.policy.config import Experts
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.load.peft import load_adapter
from mgrpo_jax.policy.lora import TARGETS, LoRA
from mgrpo_jax.policy.params import init, param_specs
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.sampler import device
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sharding import Meshes
from mgrpo_jax.testing.setup import small_setup
from mgrpo_jax.testing.sizes import tiny_config

SIZES = {
    "main": {
        "num_kv_heads": 2,
        "qk_norm": True,
        "experts": Experts(number=2, per_token=1, mlp_dim=8, normalised=True),
        "num_layers": 1,
    },
    "researcher": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "qkv_bias": True,
    },
}


@dataclasses.dataclass(frozen=True)
class Device:
  number: int
  slice_index: int


def fake(*slices):
  """Devices of slices of the given sizes, numbered throughout."""
  places = [i for i, size in enumerate(slices) for _ in range(size)]
  return [Device(number, place) for number, place in enumerate(places)]


def numbers(needs, devices):
  taken = sharding.assign(needs, devices)
  return {name: [d.number for d in group] for name, group in taken.items()}


@pytest.mark.parametrize(
    ("needs", "slices", "expected"),
    [
        # Nobody needs more than one device: all share the first.
        ({"a": 1, "b": 1}, (8,), {"a": [0], "b": [0]}),
        ({"a": 2, "b": 2}, (4,), {"a": [0, 1], "b": [2, 3]}),
        ({"a": 1, "b": 3}, (4,), {"a": [3], "b": [0, 1, 2]}),
        # There are not enough: they take turns.
        ({"a": 2, "b": 3}, (4,), {"a": [0, 1], "b": [0, 1, 2]}),
        # A slice each, though the first has room for a part of the second.
        ({"a": 2, "b": 3}, (4, 4), {"a": [4, 5], "b": [0, 1, 2]}),
        ({"a": 3, "b": 3}, (4, 4), {"a": [0, 1, 2], "b": [4, 5, 6]}),
        # Only what fits in no slice straddles them.
        ({"a": 1, "b": 6}, (4, 4), {"a": [6], "b": [0, 1, 2, 3, 4, 5]}),
        # Disjoint groups would straddle: c goes back to a whole slice.
        (
            {"a": 3, "b": 3, "c": 2},
            (4, 4),
            {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1]},
        ),
    ],
)
def test_who_gets_which_devices(needs, slices, expected):
  assert numbers(needs, fake(*slices)) == expected


def test_a_policy_that_needs_too_many_devices_is_named():
  with pytest.raises(ValueError, match="b needs 9 devices, allowed: 1 to 8"):
    sharding.assign({"a": 1, "b": 9}, fake(4, 4))


async def sampled(config, weights, mesh, decode_rows):
  """Completions of five prompts, two of them equal; and what was compiled."""
  engine = Engine(
      config,
      weights,
      0,
      num_slots=4,
      context=64,
      block=32,
      prefill_tokens=32,
      prefill_buckets=(16,),
      decode_steps=4,
      decode_rows=decode_rows,
      mesh=mesh,
  )
  sampling = Sampling(temperature=1.0, max_new_tokens=12, stop_ids=())
  async with engine:
    completions = await asyncio.gather(
        *(
            engine.generate([1, 2, 3, last], sampling, last)
            for last in (4, 5, 6, 7, 7)
        )
    )
    before = device.compilations()
    engine.update(jax.device_put(weights, jax.devices()[3]), 1)
    await engine.generate([5, 6, 7], sampling, 3)
    assert device.compilations() == before
  return completions


@pytest.mark.parametrize("decode_rows", [0, 2])
def test_a_sampler_of_two_devices_draws_what_one_draws(decode_rows):
  config = tiny_config(num_kv_heads=2, num_layers=1, vocab_size=62)
  weights = jax.jit(init, static_argnums=1)(jax.random.key(0), config)
  mesh = sharding.sampler_mesh(jax.devices()[4:6])
  one = asyncio.run(sampled(config, weights, None, decode_rows))
  two = asyncio.run(sampled(config, weights, mesh, decode_rows))
  for expected, actual in zip(one, two, strict=True):
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    # float32 sums of two halves.
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-5)


def halves():
  """Main's experts and the researcher's heads, on four devices each."""
  groups = sharding.assign({"main": 4, "researcher": 4}, jax.devices())
  axes = {
      "main": {"data": 1, "fsdp": 2, "tensor": 1, "expert": 2},
      "researcher": {"data": 2, "fsdp": 1, "tensor": 2, "expert": 1},
  }
  return {
      name: Meshes(
          learner=sharding.make_mesh(**axes[name], devices=group),
          sampler=sharding.sampler_mesh(group[:2]),
      )
      for name, group in groups.items()
  }


def setup(*, steps, meshes, adaptations=None):
  """The small team; its optimizer divides by no number near 0."""
  made = small_setup(
      seed=0,
      imitation_steps=1,
      steps=steps,
      checkpoint_every=1,
      sizes=SIZES,
      meshes=meshes,
      adaptations=adaptations,
  )
  # Adam's first steps are the gradient's sign where eps is small, and a sign
  # tells a rounding from its opposite.
  optimizer = optim.AdamW(
      b1=0.9, b2=0.99, eps=1e-2, weight_decay=0.0, clip_norm=1.0
  )
  method = dataclasses.replace(made.method, optimizer=optimizer)
  return dataclasses.replace(made, method=method, evaluate_every=9)


def train(directory, setup):
  return tiny_run.train(directory, setup, config={}, stream=io.StringIO())


def weights(directory, name):
  return jax.tree.leaves(load(directory / "policies" / name).params)


def test_a_team_on_two_halves_trains_like_one_on_one_device(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  before = setup(steps=1, meshes=None)
  train(one, before)
  train(two, setup(steps=1, meshes=halves()))
  for name in SIZES:
    moved = 0.0
    start = jax.tree.leaves(before.policies[name].params)
    for wanted, actual, first in zip(
        weights(one, name), weights(two, name), start, strict=True
    ):
      # Gradients of float32 sums in another order, through Adam.
      np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=2e-5)
      moved = max(moved, float(np.max(np.abs(wanted - first))))
    assert moved > 1e-3
  rows = [read_metrics(path / "metrics.jsonl") for path in (one, two)]
  for wanted, actual in zip(*rows, strict=True):
    losses = [key for key in wanted if key.startswith("loss/")]
    assert losses
    for key in (*losses, "trained_tokens", "generated_tokens"):
      np.testing.assert_allclose(actual[key], wanted[key], atol=1e-4)
  # It goes on from its checkpoint, in place, and what it published is read.
  longer = setup(steps=2, meshes=halves())
  bucket = store.open_folder(two / "bucket")
  assert train(two, longer)["steps"] == 3
  for name, policy in longer.policies.items():
    mesh = longer.meshes[name].learner
    like = sharding.shapes(param_specs(policy.config), mesh)
    read = publish.read(bucket, name, "latest", like=like)
    assert read.version.number == 3
    for saved, leaf in zip(
        weights(two, name), jax.tree.leaves(read.params), strict=True
    ):
      np.testing.assert_array_equal(saved, leaf)
      assert leaf.sharding.device_set == set(mesh.devices.flat)


def test_adapters_on_two_halves_train_like_on_one_device(tmp_path):
  loras = {
      "main": LoRA(rank=2, alpha=8.0, targets=("query", "gate", "down")),
      "researcher": LoRA(rank=3, alpha=8.0, targets=TARGETS),
  }
  adaptations = {
      name: Adaptation(lora=lora, base="tiny") for name, lora in loras.items()
  }
  directories = [tmp_path / "one", tmp_path / "two"]
  for directory, meshes in zip(directories, (None, halves()), strict=True):
    train(directory, setup(steps=1, meshes=meshes, adaptations=adaptations))
  for name, lora in loras.items():
    config = load(directories[0] / "policies" / name).config
    wanted, actual = (
        load_adapter(path / "policies" / name / "adapter", config=config)
        for path in directories
    )
    assert wanted[0] == actual[0]
    assert wanted[0].rank == lora.rank
    for one, other in zip(
        jax.tree.leaves(wanted[1]), jax.tree.leaves(actual[1]), strict=True
    ):
      # Gradients of float32 sums in another order, through Adam.
      np.testing.assert_allclose(other, one, rtol=1e-3, atol=2e-5)
    moved = [np.abs(pair.b).max() for pair in wanted[1].layers[0].values()]
    assert min(moved) > 1e-4


def torus(slices, sides):
  """Fake chips of v5p slices, each a torus of the given sides."""
  return [
      types.SimpleNamespace(
          id=number,
          platform="tpu",
          device_kind="TPU v5p",
          slice_index=place,
          process_index=0,
          coords=coords,
          core_on_chip=0,
      )
      for number, (place, coords) in enumerate(
          itertools.product(range(slices), np.ndindex(*sides))
      )
  ]


def test_data_replicas_lie_on_slices_of_their_own():
  grid = sharding._arranged((4, 2, 1, 1), torus(2, (2, 2, 1)))
  assert grid.shape == (4, 2, 1, 1)
  where = np.vectorize(lambda chip: chip.slice_index)(grid)
  assert (where[:2] == where[0, 0]).all() and (where[2:] == where[2, 0]).all()
  assert where[0, 0, 0, 0] != where[2, 0, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "chips", "hint"),
    [
        ((1, 8, 1, 1), torus(2, (2, 2, 1)), "a multiple of 2 data replicas"),
        ((1, 6, 1, 1), torus(1, (2, 2, 2))[:6], "do not stand in a block"),
    ],
)
def test_chips_that_cannot_be_a_mesh_are_refused(sizes, chips, hint):
  with pytest.raises(ValueError, match=hint):
    sharding._arranged(sizes, chips)


@pytest.mark.parametrize(
    ("reference", "lora", "stays"),
    [
        ("none", None, False),
        ("moving", None, False),
        ("first", None, True),
        ("none", LoRA(rank=1, alpha=1.0, targets=("query",)), True),
    ],
)
def test_loaded_weights_stay_only_where_they_are_read(reference, lora, stays):
  config = tiny_config(vocab_size=64, num_heads=2, num_kv_heads=2)
  mesh = halves()["researcher"].learner
  at_rest = sharding.params_shardings(param_specs(config), mesh)
  loaded = jax.device_put(init(jax.random.key(0), config), at_rest)
  learner = Learner(
      config,
      loaded,
      lora=lora,
      shape=BatchShape(
          rows=2, row_tokens=8, trajectories=2, row_targets=8, least_shared=0
      ),
      optimizer=optim.AdamW(
          b1=0.9, b2=0.99, eps=1e-2, weight_decay=0.0, clip_norm=1.0
      ),
      temperature=1.0,
      reference=reference,
      seed=0,
      mesh=mesh,
  )
  gone = {leaf.is_deleted() for leaf in jax.tree.leaves(loaded)}
  assert gone == {not stays}
  assert np.isfinite(jax.tree.leaves(learner.weights)[0]).all()
