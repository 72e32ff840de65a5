"""Checkpoints read straight into the shards of a mesh."""

import collections
import json
import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_llama

from mgrpo_jax import sharding
from mgrpo_jax.policy import params
from mgrpo_jax.policy.load import load, save_directory
from mgrpo_jax.policy.load import safetensors as directories
from mgrpo_jax.policy.policy import Policy

HOST = pathlib.Path(__file__).parent / "loading_host.py"
SIZES = {"vocab_size": 24, "embed_dim": 16, "mlp_dim": 16}
CONFIGS = {
    name: tiny_llama.config(**tiny_llama.FAMILIES[name] | SIZES | changes)
    for name, changes in {
        "llama": {"tied_embeddings": False},
        "qwen2": {},
        "qwen3_moe": {},
        "gemma3": {"embedding_scale": 4.0},
    }.items()
}
MESHES = {
    "fsdp": {"data": 1, "fsdp": 8, "tensor": 1, "expert": 1},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1},
    "expert": {"data": 1, "fsdp": 2, "tensor": 1, "expert": 4},
    "all": {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2},
}


def mesh_of(name):
  return sharding.make_mesh(**MESHES[name], devices=jax.devices())


def saved(directory, name, monkeypatch):
  """In several files, so that no order of reading is the files'."""
  monkeypatch.setattr(directories, "MAX_FILE_BYTES", 4_000)
  config = CONFIGS[name]
  tree = tiny_llama.weights(config)
  policy = Policy(
      config=config, params=tree, tokenizer=None, chat=None, system=""
  )
  save_directory(directory / name, policy)
  return directory / name


@pytest.fixture
def reads(monkeypatch):
  """Counts what is read: (first numbers of the slices, bytes)."""
  counted = []
  part = directories._part

  def counting(view, *index):
    value = part(view, *index)
    counted.append(value.nbytes)
    return value

  monkeypatch.setattr(directories, "_part", counting)
  return counted


def num_bytes(tree):
  return 4 * sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_shards_are_those_of_the_whole(
    name, mesh, tmp_path, monkeypatch, reads
):
  directory = saved(tmp_path, name, monkeypatch)
  whole = load(directory).params
  assert sum(reads) == num_bytes(whole)
  reads.clear()
  split = load(directory, mesh=mesh_of(mesh)).params
  # Every number once, however many devices hold it.
  assert sum(reads) == num_bytes(whole)
  places = sharding.params_shardings(
      params.param_specs(CONFIGS[name]), mesh_of(mesh)
  )
  for one, other, place in zip(
      *map(jax.tree.leaves, (whole, split, places)), strict=True
  ):
    np.testing.assert_array_equal(one, other)
    assert other.sharding == place
    for shard in other.addressable_shards:
      assert shard.data.shape == place.shard_shape(other.shape)


def test_a_device_holds_its_share(tmp_path, monkeypatch):
  directory = saved(tmp_path, "qwen3_moe", monkeypatch)
  split = load(directory, mesh=mesh_of("all")).params
  held = collections.Counter()
  norms = 0
  for leaf in jax.tree.leaves(split):
    norms += leaf.nbytes if leaf.ndim == 1 else 0
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes if leaf.ndim > 1 else 0
  experts = sum(
      kernel.nbytes
      for layer in split.layers
      for kernel in (layer.gate, layer.up, layer.down)
  )
  routers = sum(layer.router.nbytes for layer in split.layers)
  rest = num_bytes(split) - norms - experts - routers
  # Experts are cut in 8, routers over fsdp, the rest over fsdp and tensor.
  assert set(held.values()) == {experts // 8 + routers // 2 + rest // 4}


def test_what_does_not_divide_is_named_before_anything_is_read(
    tmp_path, monkeypatch, reads
):
  directory = saved(tmp_path, "qwen3_moe", monkeypatch)
  mesh = sharding.make_mesh(
      data=1, fsdp=1, tensor=1, expert=8, devices=jax.devices()
  )
  with pytest.raises(ValueError, match="gate: expert=4 must be a multiple"):
    load(directory, mesh=mesh)
  assert not reads


def test_a_host_never_holds_more_than_its_shards_and_one_tensor(tmp_path):
  config = tiny_llama.config(
      vocab_size=16384,
      embed_dim=256,
      num_layers=4,
      head_dim=64,
      mlp_dim=4096,
      tied_embeddings=False,
  )
  tree = jax.tree.map(
      lambda spec: np.ones(spec.shape, np.float32), params.param_specs(config)
  )
  policy = Policy(
      config=config, params=tree, tokenizer=None, chat=None, system=""
  )
  save_directory(tmp_path / "large", policy)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(HOST.parents[1]),
      "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
  }
  processes = [
      subprocess.Popen(
          [sys.executable, HOST, tmp_path / "large", address, number],
          env=environment,
          stdout=subprocess.PIPE,
          text=True,
      )
      for number in "01"
  ]
  largest = 4 * 16384 * 256
  for process in processes:
    told, _ = process.communicate(timeout=300)
    figures = json.loads(told.splitlines()[-1])
    norms = 4 * 256 * (2 * config.num_layers + 1)
    kernels = num_bytes(tree) - norms
    # Four of eight shards of every kernel; norms are read once, held by each.
    assert figures["held"] == kernels // 2 + 4 * norms
    assert figures["read"] == kernels // 2 + norms
    assert figures["peak"] <= figures["held"] + largest
