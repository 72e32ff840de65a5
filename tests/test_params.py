import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
import tiny_llama

from mgrpo_jax.policy import params
from mgrpo_jax.policy.config import Execution, Experts

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
        ("activation", "relu"),
        ("embedding_scale", 0.0),
        ("attention_scale", -1.0),
        ("local_rope_base", math.inf),
        ("windows", (3,)),
        ("windows", (3, 0, 3)),
        ("windows", (3, -1)),
        ("windows", (3, 0.5)),
    ),
)
def test_impossible_sizes_are_named(field, value):
  with pytest.raises(ValueError, match=f"^{field} .*{re.escape(repr(value))}"):
    tiny_llama.config(**{field: value})


def test_layers_without_experts_must_exist():
  experts = dataclasses.replace(tiny_llama.MOE, dense_layers=(0, 2))
  with pytest.raises(ValueError, match=r"dense_layers .* 0\.\.1, got \(0, 2\)"):
    tiny_llama.config(experts=experts)


def test_columns_of_logits_are_positive():
  with pytest.raises(ValueError, match="logit_columns must be >= 1, got 0"):
    Execution(logit_columns=0)


@pytest.mark.parametrize(
    ("windows", "dense", "period"),
    [
        ((), None, 1),
        ((4, 4, 4, 4), None, 1),
        ((4, 0, 4, 0), None, 2),
        ((4, 4, 0, 4), None, 3),
        ((4, 0, 0, 0), None, 4),
        ((), (1, 3), 2),
        ((4, 4, 0, 4), (1, 3), 4),
    ],
)
def test_kinds_of_layer_repeat_after_a_period(windows, dense, period):
  experts = None
  if dense is not None:
    experts = dataclasses.replace(tiny_llama.MOE, dense_layers=dense)
  cfg = tiny_llama.config(num_layers=4, windows=windows, experts=experts)
  assert cfg.period == period


@pytest.mark.parametrize("name", tiny_llama.FAMILIES)
def test_families_declare_what_they_add(name):
  cfg = tiny_llama.config(**tiny_llama.FAMILIES[name])
  layer = vars(params.param_specs(cfg).layers[0])
  added = {field for field, spec in layer.items() if spec is not None} - {
      field
      for field, spec in vars(params.param_specs(UNTIED).layers[0]).items()
      if spec is not None
  }
  norms = {"query_norm", "key_norm"}
  assert added == {
      "qwen2": {"query_bias", "key_bias", "value_bias"},
      "qwen3": norms,
      "qwen3_moe": norms | {"router"},
      "gemma3": norms | {"attention_post_norm", "mlp_post_norm"},
  }.get(name, set())


def test_counts_published_models():
  # Qwen3-30B-A3B says 30.5B, Gemma 3 1B 1.0B of which 302M embed.
  qwen = tiny_llama.config(
      vocab_size=151936,
      embed_dim=2048,
      num_layers=48,
      num_heads=32,
      num_kv_heads=4,
      head_dim=128,
      mlp_dim=6144,
      tied_embeddings=False,
      qk_norm=True,
      experts=Experts(number=128, per_token=8, mlp_dim=768, normalised=True),
  )
  assert params.num_params(qwen) == 30_532_122_624
  gemma = tiny_llama.config(
      vocab_size=262144,
      embed_dim=1152,
      num_layers=26,
      num_heads=4,
      num_kv_heads=1,
      head_dim=256,
      mlp_dim=6912,
      qk_norm=True,
      post_norms=True,
  )
  assert params.num_params(gemma) == 999_885_952


def test_config_is_a_static_argument():
  same = tiny_llama.config()
  assert same == tiny_llama.config() and hash(same) == hash(tiny_llama.config())
  assert same != dataclasses.replace(same, norm_eps=1e-6)
