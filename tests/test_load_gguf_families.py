"""GGUF files of every family, written as llama.cpp's converter does."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
import tiny_llama

from mgrpo_jax import sharding
from mgrpo_jax.policy.load import load

SIZES = {"vocab_size": 24, "embed_dim": 16, "mlp_dim": 16}
CONFIGS = {
    name: tiny_llama.config(**tiny_llama.FAMILIES[family] | SIZES | changes)
    for name, family, changes in [
        ("qwen2", "qwen2", {"windows": ()}),
        ("qwen3", "qwen3", {}),
        ("qwen3moe", "qwen3_moe", {}),
        (
            "gemma3",
            "gemma3",
            {
                "num_layers": 7,
                "windows": (4, 4, 4, 4, 4, 0, 4),
                "embedding_scale": 4.0,
                "attention_scale": 6**-0.5,
                "local_rope_base": 10_000.0,
            },
        ),
    ]
}
WORDS = ["<|im_end|>", "t", "1", *(f"t{i}" for i in range(21))]


def tensors_of(config, tree):
  """Spells the file's tensors out; experts are stacked, norms whole."""
  embed, heads = config.embed_dim, config.num_heads * config.head_dim
  tensors = {
      "token_embd.weight": tree.embedding,
      "output_norm.weight": tree.final_norm,
  }
  if not config.tied_embeddings:
    tensors["output.weight"] = tree.unembedding.T
  for i, layer in enumerate(tree.layers):
    named = {
        "attn_norm.weight": layer.attention_norm,
        "attn_q.weight": layer.query.reshape(embed, heads).T,
        "attn_k.weight": layer.key.reshape(embed, -1).T,
        "attn_v.weight": layer.value.reshape(embed, -1).T,
        "attn_output.weight": layer.output.reshape(heads, embed).T,
        "ffn_norm.weight": layer.mlp_norm,
    }
    if config.qkv_bias:
      named |= {
          "attn_q.bias": layer.query_bias.reshape(-1),
          "attn_k.bias": layer.key_bias.reshape(-1),
          "attn_v.bias": layer.value_bias.reshape(-1),
      }
    if config.qk_norm:
      named["attn_q_norm.weight"] = layer.query_norm
      named["attn_k_norm.weight"] = layer.key_norm
    if config.post_norms:
      named["post_attention_norm.weight"] = layer.attention_post_norm
      named["post_ffw_norm.weight"] = layer.mlp_post_norm
    end = "_exps.weight" if config.experts else ".weight"
    for kind in ("gate", "up", "down"):
      named[f"ffn_{kind}{end}"] = getattr(layer, kind).swapaxes(-1, -2)
    if config.experts:
      named["ffn_gate_inp.weight"] = layer.router.T
    tensors |= {f"blk.{i}.{name}": value for name, value in named.items()}
  return {k: np.ascontiguousarray(v) for k, v in tensors.items()}


def write(path, family, *, drop=(), change=None):
  config = CONFIGS[family]
  writer = gguf.GGUFWriter(path, family)
  writer.add_block_count(config.num_layers)
  writer.add_embedding_length(config.embed_dim)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  if config.experts:
    writer.add_expert_count(config.experts.number)
    writer.add_expert_used_count(config.experts.per_token)
    writer.add_expert_feed_forward_length(config.experts.mlp_dim)
  if family == "gemma3":
    writer.add_sliding_window(max(config.windows))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_scaling.factor)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(WORDS)
  writer.add_token_types([3] + [1] * (len(WORDS) - 1))
  writer.add_token_merges(["t 1"])
  writer.add_eos_token_id(0)
  tensors = tensors_of(config, tiny_llama.weights(config))
  for name, value in (tensors | (change or {})).items():
    if name not in drop:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def assert_same_params(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip(family, tmp_path):
  config = CONFIGS[family]
  loaded = load(write(tmp_path / "x.gguf", family))
  wanted = dataclasses.replace(
      config, norm_eps=float(np.float32(config.norm_eps))
  )
  assert loaded.config == wanted
  assert_same_params(loaded.params, tiny_llama.weights(config))


@pytest.mark.parametrize("family", ["qwen2", "qwen3moe"])
def test_shards_are_those_of_the_whole(family, tmp_path):
  mesh = sharding.make_mesh(
      data=1, fsdp=2, tensor=2, expert=2, devices=jax.devices()
  )
  loaded = load(write(tmp_path / "x.gguf", family), mesh=mesh).params
  assert_same_params(loaded, tiny_llama.weights(CONFIGS[family]))
  gate = loaded.layers[0].gate
  pieces = 8 if family == "qwen3moe" else 4
  assert gate.addressable_shards[0].data.size == gate.size // pieces


def test_parameters_outlive_the_file(tmp_path):
  path = write(tmp_path / "x.gguf", "qwen3")
  loaded = load(path).params
  with open(path, "r+b") as file:  # as mapped memory would see it
    file.write(bytes(path.stat().st_size))
  assert_same_params(loaded, tiny_llama.weights(CONFIGS["qwen3"]))


def test_wrong_experts_are_listed_together(tmp_path):
  flat = {"blk.1.ffn_up_exps.weight": np.ones((3, 10, 16), np.float32)}
  drop = ("blk.0.ffn_gate_inp.weight", "blk.0.ffn_down_exps.weight")
  path = write(tmp_path / "x.gguf", "qwen3moe", drop=drop, change=flat)
  with pytest.raises(ValueError) as caught:
    load(path)
  for problem in (
      *(f"missing {name}" for name in drop),
      "blk.1.ffn_up_exps.weight has shape (3, 10, 16), not (4, 10, 16)",
  ):
    assert problem in str(caught.value)
