import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import tiny_llama

from mgrpo_jax.policy import params

UNTIED = tiny_llama.config(
    tied_embeddings=False,
    num_layers=1,
    vocab_size=64,
    embed_dim=48,
    mlp_dim=80,
)


@functools.cache
def initial():
  draw = jax.jit(params.init, static_argnums=1)
  return jax.tree.map(np.asarray, draw(jax.random.key(0), UNTIED))


def leaves(tree):
  flat, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def test_declaration_abstract_and_values_agree():
  specs = leaves(params.param_specs(UNTIED))
  shapes = leaves(params.abstract(UNTIED))
  values = leaves(initial())
  assert specs.keys() == shapes.keys() == values.keys()
  for name, spec in specs.items():
    assert spec.shape == shapes[name].shape == values[name].shape
    assert spec.dtype == shapes[name].dtype == values[name].dtype == np.float32
    assert len(spec.shape) == len(spec.logical_axes)


def test_counts_smollm2_as_published():
  sizes = {
      "vocab_size": 49152,
      "embed_dim": 576,
      "num_layers": 30,
      "num_heads": 9,
      "num_kv_heads": 3,
      "head_dim": 64,
      "mlp_dim": 1536,
  }
  assert params.num_params(tiny_llama.config(**sizes)) == 134_515_008
  untied = tiny_llama.config(**sizes, tied_embeddings=False)
  assert params.num_params(untied) == 134_515_008 + 49152 * 576


def test_kernels_start_at_their_scale():
  depth = 2 * UNTIED.num_layers
  width = UNTIED.num_heads * UNTIED.head_dim
  inverse = {
      "output": width * depth,
      "down": UNTIED.mlp_dim * depth,
  }
  for name, value in leaves(initial()).items():
    kind = name.split(".")[-1]
    if kind.endswith("norm"):
      np.testing.assert_array_equal(value, 1.0)
      continue
    expected = inverse.get(kind, UNTIED.embed_dim) ** -0.5
    # Five standard errors of a standard deviation from n samples.
    tolerance = 5 / math.sqrt(2 * value.size)
    np.testing.assert_allclose(value.std(), expected, rtol=tolerance)
    assert abs(value.mean()) < 5 * expected / math.sqrt(value.size)


def test_no_two_parameters_share_their_randomness():
  firsts = [v.flat[0] for v in jax.tree.leaves(initial()) if v.ndim > 1]
  scales = [v.std() for v in jax.tree.leaves(initial()) if v.ndim > 1]
  standard = np.float32(firsts) / np.float32(scales)
  assert len(np.unique(standard.round(4))) == len(firsts)


@pytest.mark.parametrize(
    ("field", "value"),
    (
        ("vocab_size", 0),
        ("embed_dim", 12.0),
        ("num_layers", -1),
        ("num_heads", True),
        ("num_kv_heads", 3),
        ("head_dim", 5),
        ("mlp_dim", "20"),
        ("rope_base", 0.0),
        ("norm_eps", -1e-5),
        ("norm_eps", math.nan),
        ("dtype", "float16"),
    ),
)
def test_impossible_sizes_are_named(field, value):
  with pytest.raises(ValueError, match=f"^{field} .*{value!r}"):
    tiny_llama.config(**{field: value})


def test_config_is_a_static_argument():
  same = tiny_llama.config()
  assert same == tiny_llama.config() and hash(same) == hash(tiny_llama.config())
  assert same != dataclasses.replace(same, norm_eps=1e-6)
