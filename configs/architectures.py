"""Public `config.json` fields of models that recipes name.

Each function gives what Hugging Face's hub serves for the model, cut to the
keys that say what is computed. Recipes name one in `policies.*.architecture`,
so that a program can be compiled for a model whose weights are elsewhere.
"""

from typing import Any


def qwen3_30b_a3b() -> dict[str, Any]:
  """Qwen/Qwen3-30B-A3B, 30.5 B parameters, 3.3 B of them for a token."""
  return _qwen3("qwen3_moe", layers=48, embed=2048, heads=(32, 4), mlp=6144) | {
      "num_experts": 128,
      "num_experts_per_tok": 8,
      "moe_intermediate_size": 768,
      "norm_topk_prob": True,
      "decoder_sparse_step": 1,
      "mlp_only_layers": [],
  }


def qwen3_8b() -> dict[str, Any]:
  """Qwen/Qwen3-8B, 8.2 B parameters."""
  return _qwen3("qwen3", layers=36, embed=4096, heads=(32, 8), mlp=12288)


def gemma3_4b() -> dict[str, Any]:
  """The text model of google/gemma-3-4b-it, 3.9 B parameters."""
  return _gemma3(layers=34, embed=2560, heads=(8, 4), mlp=10240) | {
      "vocab_size": 262208,
      "sliding_window": 1024,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
  }


def gemma3_1b() -> dict[str, Any]:
  """google/gemma-3-1b-it, 1.0 B parameters."""
  return _gemma3(layers=26, embed=1152, heads=(4, 1), mlp=6912) | {
      "vocab_size": 262144,
      "sliding_window": 512,
  }


def smollm2_135m() -> dict[str, Any]:
  """HuggingFaceTB/SmolLM2-135M-Instruct, 0.13 B parameters."""
  return {
      "model_type": "llama",
      "vocab_size": 49152,
      "hidden_size": 576,
      "num_hidden_layers": 30,
      "num_attention_heads": 9,
      "num_key_value_heads": 3,
      "intermediate_size": 1536,
      "hidden_act": "silu",
      "rms_norm_eps": 1e-5,
      "rope_theta": 100_000.0,
      "tie_word_embeddings": True,
  }


def _qwen3(
    family: str, *, layers: int, embed: int, heads: tuple[int, int], mlp: int
) -> dict[str, Any]:
  """What Qwen 3 models have in common; heads of queries and of keys."""
  return {
      "model_type": family,
      "vocab_size": 151936,
      "hidden_size": embed,
      "num_hidden_layers": layers,
      "num_attention_heads": heads[0],
      "num_key_value_heads": heads[1],
      "head_dim": 128,
      "intermediate_size": mlp,
      "hidden_act": "silu",
      "rms_norm_eps": 1e-6,
      "rope_theta": 1_000_000.0,
      "attention_bias": False,
      "use_sliding_window": False,
      "tie_word_embeddings": False,
  }


def _gemma3(
    *, layers: int, embed: int, heads: tuple[int, int], mlp: int
) -> dict[str, Any]:
  """What Gemma 3 models have in common; heads of queries and of keys."""
  return {
      "model_type": "gemma3_text",
      "hidden_size": embed,
      "num_hidden_layers": layers,
      "num_attention_heads": heads[0],
      "num_key_value_heads": heads[1],
      "head_dim": 256,
      "intermediate_size": mlp,
      "hidden_activation": "gelu_pytorch_tanh",
      "rms_norm_eps": 1e-6,
      "query_pre_attn_scalar": 256,
      "sliding_window_pattern": 6,
      "rope_theta": 1_000_000.0,
      "rope_local_base_freq": 10_000.0,
      "tie_word_embeddings": True,
  }
