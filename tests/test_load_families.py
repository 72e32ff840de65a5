"""Directories of every family, written and read again."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny_llama

from mgrpo_jax.policy.config import Experts
from mgrpo_jax.policy.load import load, save_directory
from mgrpo_jax.policy.load import safetensors as directories
from mgrpo_jax.policy.policy import Policy

MIXED = Experts(
    number=3, per_token=2, mlp_dim=10, normalised=False, dense_layers=(0,)
)
CONFIGS = {
    name: tiny_llama.config(**changes)
    for name, changes in tiny_llama.FAMILIES.items()
}
CONFIGS |= {
    "qwen2_tied": tiny_llama.config(qkv_bias=True, dtype="bfloat16"),
    "qwen3_windows": tiny_llama.config(qk_norm=True, windows=(7, 0)),
    "qwen3_moe_mixed": tiny_llama.config(qk_norm=True, experts=MIXED),
    "qwen3_moe_windows": dataclasses.replace(
        CONFIGS["qwen3_moe"], windows=(7, 7)
    ),
}


def policy(config):
  return Policy(
      config=config,
      params=tiny_llama.weights(config),
      tokenizer=None,
      chat=None,
      system="",
  )


def saved(directory, name):
  save_directory(directory / name, policy(CONFIGS[name]))
  return directory / name


def rewrite(directory, change):
  """Passes the tensors of a directory through a function."""
  file = directory / "model.safetensors"
  tensors = change(safetensors.numpy.load_file(file))
  safetensors.numpy.save_file(tensors, file)


def assert_same_params(left, right, atol=0.0):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for one, other in zip(*map(jax.tree.leaves, (left, right)), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def off_by(config):
  # Gemma stores scales less 1: one rounding of numbers below 2.
  return 2**-23 if config.post_norms else 0.0


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tmp_path):
  config = CONFIGS[name]
  loaded = load(saved(tmp_path, name))
  assert loaded.config == config
  assert_same_params(loaded.params, tiny_llama.weights(config), off_by(config))
  # What was read is written back to the bit.
  save_directory(tmp_path / "again", loaded)
  assert_same_params(load(tmp_path / "again").params, loaded.params)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"windows": (3, 3)}, "llama cannot have windows"),
        (
            "llama",
            {"embedding_scale": 2.0},
            "llama cannot have embedding_scale",
        ),
        (
            "qwen2",
            {"attention_scale": 0.1},
            "qwen2 cannot have attention_scale",
        ),
        (
            "qwen3",
            {"local_rope_base": 9.0},
            "qwen3 cannot have local_rope_base",
        ),
        ("qwen3_moe", {"windows": (0, 3)}, "qwen3_moe cannot have windows"),
        ("qwen3_windows", {"windows": (2, 3)}, "windows: must be of one size"),
        ("gemma3", {"embedding_scale": 1.0}, "cannot have embedding_scale"),
        ("gemma3", {"attention_scale": 0.3}, "attention_scale: 0.3 must be"),
        ("gemma3", {"qk_norm": False}, "no family has qkv_bias"),
        ("llama", {"rope_scaling": abs}, "rope_scaling: .* cannot be written"),
    ],
)
def test_what_no_family_has_is_not_saved(name, changes, message, tmp_path):
  wrong = dataclasses.replace(CONFIGS[name], **changes)
  with pytest.raises(ValueError, match=message):
    save_directory(tmp_path / "p", policy(wrong))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefixes", ["4", "5"])
def test_the_text_model_of_a_multimodal_gemma(prefixes, tmp_path):
  directory = saved(tmp_path, "gemma3")
  text, other = {
      "4": ("language_model.", ""),
      "5": ("model.language_model.", "model."),
  }[prefixes]

  def nest(tensors):
    cut = "" if prefixes == "4" else "model."
    nested = {text + n.removeprefix(cut): v for n, v in tensors.items()}
    return nested | {
        f"{other}vision_tower.vision_model.post_layernorm.bias": np.ones(3),
        f"{other}multi_modal_projector.mm_soft_emb_norm.weight": np.ones(2),
    }

  rewrite(directory, nest)
  fields = json.loads((directory / "config.json").read_text())
  whole = {"model_type": "gemma3", "text_config": fields, "vision_config": {}}
  (directory / "config.json").write_text(json.dumps(whole))
  loaded = load(directory)
  assert loaded.config == CONFIGS["gemma3"]
  assert_same_params(
      loaded.params, tiny_llama.weights(loaded.config), off_by(loaded.config)
  )


def test_copies_and_buffers_are_no_weights(tmp_path):
  directory = saved(tmp_path, "llama")

  def add(tensors):
    return tensors | {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.int64),
        "model.rotary_emb.inv_freq": np.ones(3, np.float32),
    }

  rewrite(directory, add)
  assert_same_params(
      load(directory).params, tiny_llama.weights(CONFIGS["llama"])
  )


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gemma3"])
def test_large_models_are_saved_in_parts(name, tmp_path, monkeypatch):
  largest = 2_000
  monkeypatch.setattr(directories, "MAX_FILE_BYTES", largest)
  directory = saved(tmp_path, name)
  index = json.loads((directory / "model.safetensors.index.json").read_text())
  files = sorted(directory.glob("*.safetensors"))
  assert {file.name for file in files} == set(index["weight_map"].values())
  assert len(files) > 3 and not (directory / "model.safetensors").exists()
  total = 0
  for file in files:
    tensors = safetensors.numpy.load_file(file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= largest or len(tensors) == 1
    assert {index["weight_map"][name] for name in tensors} == {file.name}
    total += size
  assert index["metadata"]["total_size"] == total
  loaded = load(directory)
  weights = tiny_llama.weights(CONFIGS[name])
  assert_same_params(loaded.params, weights, off_by(loaded.config))


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3"])
def test_in_half_precision(name, tmp_path):
  directory = saved(tmp_path, name)
  exact = {}

  def halve(tensors):
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    exact.update({k: v.astype(np.float32) for k, v in half.items()})
    return half

  rewrite(directory, halve)
  params = load(directory).params
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
  norm = exact["model.layers.1.self_attn.q_norm.weight"]
  offset = 1.0 if name == "gemma3" else 0.0
  np.testing.assert_array_equal(params.layers[1].query_norm, norm + offset)
  up = {
      "qwen3_moe": lambda: np.stack(
          [
              exact[f"model.layers.0.mlp.experts.{i}.up_proj.weight"].T
              for i in range(4)
          ]
      ),
      "gemma3": lambda: exact["model.layers.0.mlp.up_proj.weight"].T,
  }[name]()
  np.testing.assert_array_equal(params.layers[0].up, up)


def test_names_and_shapes_are_those_of_hugging_face(tmp_path):
  names = {
      name: safetensors.numpy.load_file(
          saved(tmp_path, name) / "model.safetensors"
      )
      for name in ("qwen2", "qwen3_moe", "gemma3")
  }
  attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
  # Head 3 is the second of the two that share key head 1.
  bias = tiny_llama.weights(CONFIGS["qwen2"]).layers[1].query_bias[1, 1]
  stored = names["qwen2"][attention + "q_proj.bias"]
  np.testing.assert_array_equal(stored[18:24], bias)
  assert names["qwen2"][attention + "v_proj.bias"].shape == (12,)
  experts = names["qwen3_moe"]
  assert experts[mlp + "gate.weight"].shape == (4, 12)
  assert experts[mlp + "experts.3.down_proj.weight"].shape == (12, 10)
  assert experts[attention + "k_norm.weight"].shape == (6,)
  layer = tiny_llama.weights(CONFIGS["gemma3"]).layers[1]
  for field, name in {
      "attention_norm": "input_layernorm",
      "attention_post_norm": "post_attention_layernorm",
      "mlp_norm": "pre_feedforward_layernorm",
      "mlp_post_norm": "post_feedforward_layernorm",
  }.items():
    stored = names["gemma3"][f"model.layers.1.{name}.weight"]
    np.testing.assert_array_equal(stored, getattr(layer, field) - 1)


def test_wrong_experts_are_listed_together(tmp_path):
  directory = saved(tmp_path, "qwen3_moe")
  mlp = "model.layers.0.mlp.experts."

  def spoil(tensors):
    del tensors[f"{mlp}2.up_proj.weight"]
    del tensors["model.layers.1.mlp.gate.weight"]
    tensors[f"{mlp}4.up_proj.weight"] = np.ones((10, 12), np.float32)
    tensors[f"{mlp}1.down_proj.weight"] = np.ones((10, 12), np.float32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(7, np.float32)
    return tensors

  rewrite(directory, spoil)
  with pytest.raises(ValueError) as caught:
    load(directory)
  problems = str(caught.value).removeprefix(f"{directory}: ").split("; ")
  assert sorted(problems) == sorted(
      [
          f"missing {mlp}2.up_proj.weight",
          "missing model.layers.1.mlp.gate.weight",
          f"unexpected {mlp}4.up_proj.weight",
          f"{mlp}1.down_proj.weight has shape (10, 12), not (12, 10)",
          "model.layers.0.self_attn.q_norm.weight has shape (7,), not (6,)",
      ]
  )
