"""Trees of a linen and an nnx module, mapped to parameters."""

import flax.linen
import jax
import numpy as np
import pytest
import tiny_llama
from flax import nnx

from mgrpo_jax.policy.load.flax import params_from_tree

CFG = tiny_llama.config(num_layers=2, qkv_bias=True)
WEIGHTS = tiny_llama.weights(CFG)
WIDTHS = {  # of one layer's kernels, heads joined
    "q": (12, 24),
    "k": (12, 12),
    "v": (12, 12),
    "o": (24, 12),
    "gate": (12, 20),
    "up": (12, 20),
    "down": (20, 12),
}
FIELDS = {
    "query": "q.kernel",
    "key": "k.kernel",
    "value": "v.kernel",
    "output": "o.kernel",
    "gate": "gate.kernel",
    "up": "up.kernel",
    "down": "down.kernel",
    "query_bias": "q.bias",
    "key_bias": "k.bias",
    "value_bias": "v.bias",
    "attention_norm": "norm1.scale",
    "mlp_norm": "norm2.scale",
}


class LinenLayer(flax.linen.Module):

  @flax.linen.compact
  def __call__(self, x):
    for name in ("norm1", "norm2"):
      x = flax.linen.RMSNorm(name=name)(x)
    for name, (inputs, outputs) in WIDTHS.items():
      dense = flax.linen.Dense(outputs, use_bias=name in "qkv", name=name)
      dense(x[:, :1].repeat(inputs, 1))
    return x


class LinenModel(flax.linen.Module):

  @flax.linen.compact
  def __call__(self, tokens):
    x = flax.linen.Embed(23, 12, name="embed")(tokens)
    for number in range(2):
      x = LinenLayer(name=f"layer_{number}")(x)
    return flax.linen.RMSNorm(name="norm")(x)


class NnxLayer(nnx.Module):

  def __init__(self, rngs):
    self.norm1 = nnx.RMSNorm(12, rngs=rngs)
    self.norm2 = nnx.RMSNorm(12, rngs=rngs)
    for name, widths in WIDTHS.items():
      linear = nnx.Linear(*widths, use_bias=name in "qkv", rngs=rngs)
      setattr(self, name, linear)


class NnxModel(nnx.Module):

  def __init__(self, rngs):
    self.embed = nnx.Embed(23, 12, rngs=rngs)
    self.layers = nnx.List([NnxLayer(rngs) for _ in range(2)])
    self.norm = nnx.RMSNorm(12, rngs=rngs)


def linen():
  tree = LinenModel().init(jax.random.key(0), np.zeros(1, np.int32))["params"]
  return tree, names("layer_{}.")


def of_nnx():
  return nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param), names("layers.{}.")


def names(prefix):
  return {field: prefix + name for field, name in FIELDS.items()} | {
      "embedding": "embed.embedding",
      "final_norm": "norm.scale",
  }


def refilled(tree):
  """Gives every leaf numbers of its own."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), tree
  )


@pytest.mark.parametrize("make", [linen, of_nnx])
def test_every_array_finds_its_place(make):
  tree, table = make()
  tree = refilled(tree)
  params = params_from_tree(tree, table, CFG)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, WEIGHTS)
  layer = tree["layer_1"] if make is linen else tree["layers"][1]
  query, output = layer["q"]["kernel"], layer["o"]["kernel"]
  bias = layer["v"]["bias"]
  query, output, bias = (x[...] for x in (query, output, bias))
  ours = params.layers[1]
  # Head 3 is the second of the two that share key head 1.
  np.testing.assert_array_equal(ours.query[:, 1, 1], query[:, 18:24])
  np.testing.assert_array_equal(ours.output[1, 0], output[12:18])
  np.testing.assert_array_equal(ours.value_bias[1], bias[6:])


def test_everything_wrong_is_listed_together():
  tree, table = linen()
  tree = {**tree, "extra": {"kernel": np.ones(3)}}
  del tree["norm"]
  tree["layer_0"] = tree["layer_0"] | {"up": {"kernel": np.ones((20, 12))}}
  del table["down"]
  with pytest.raises(ValueError) as caught:
    params_from_tree(tree, table, CFG)
  problems = str(caught.value).removeprefix("tree: ").split("; ")
  assert sorted(problems) == [
      "layer_0.up.kernel has shape (20, 12), not (12, 20)",
      "missing norm.scale",
      "no name for down",
      "unexpected extra.kernel",
      "unexpected layer_0.down.kernel",
      "unexpected layer_1.down.kernel",
  ]
