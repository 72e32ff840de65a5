"""`config.json` of every family, as transformers 4 and 5 write it."""

import dataclasses

import pytest
import tiny_llama

from mgrpo_jax.policy.load import huggingface
from mgrpo_jax.policy.rotary import LinearScaling, Llama3Scaling

CONFIGS = {
    name: tiny_llama.config(**changes)
    for name, changes in tiny_llama.FAMILIES.items()
}


# Sizes of CONFIGS as config.json gives them.
SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-3,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
}
LLAMA = {
    "model_type": "llama",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
}
STRETCH = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN2 = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "max_window_layers": 2,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
MOE = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 10,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
GEMMA = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_act": ...,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "sliding_window": 4,
}
PLAIN_ROPE = {"rope_theta": 100.0, "rope_type": "default"}
LAYERS = ["sliding_attention", "full_attention"]
# (family, fields as transformers 4 wrote them, fields as 5 does)
WRITTEN = {
    "llama": (
        LLAMA | {"rope_theta": 100.0, "rope_scaling": None},
        LLAMA | {"rope_parameters": PLAIN_ROPE},
    ),
    "llama3": (
        LLAMA
        | {
            "rope_theta": 100.0,
            "rope_scaling": STRETCH | {"rope_type": "llama3"},
        },
        LLAMA
        | {
            "rope_parameters": STRETCH
            | {"rope_type": "llama3", "rope_theta": 100.0}
        },
    ),
    "qwen2": (
        QWEN2 | {"rope_theta": 100.0, "max_window_layers": 1},
        QWEN2
        | {
            "tie_word_embeddings": False,
            "max_window_layers": 1,
            "layer_types": LAYERS[::-1],
            "rope_parameters": PLAIN_ROPE,
        },
    ),
    "qwen3": (
        QWEN3 | {"rope_theta": 100.0, "rope_scaling": None},
        QWEN3
        | {
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": PLAIN_ROPE,
        },
    ),
    "qwen3_moe": (
        MOE | {"rope_theta": 100.0, "num_experts": 4, "max_window_layers": 2},
        MOE | {"rope_parameters": PLAIN_ROPE, "num_local_experts": 4},
    ),
    "gemma3": (
        GEMMA
        | {
            "rope_theta": 100.0,
            "rope_local_base_freq": 10.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window_pattern": 2,
        },
        GEMMA
        | {
            "layer_types": LAYERS,
            "_sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "use_bidirectional_attention": False,
            "rope_parameters": {
                "full_attention": {
                    "rope_theta": 100.0,
                    "rope_type": "linear",
                    "factor": 8.0,
                },
                "sliding_attention": {
                    "rope_theta": 10.0,
                    "rope_type": "default",
                },
            },
        },
    ),
}


def read(fields):
  kept = {k: v for k, v in (SIZES | fields).items() if v is not ...}
  return huggingface.read(kept, "config.json")


@pytest.mark.parametrize("version", (4, 5))
@pytest.mark.parametrize("name", WRITTEN)
def test_config_of_transformers(name, version):
  assert read(WRITTEN[name][version - 4]) == CONFIGS[name]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        # Llama 1 and 2 say nothing of rotations, Llama 1 nothing of key heads.
        (
            "llama",
            {"rope_theta": ..., "num_key_value_heads": ..., "head_dim": ...},
            {"rope_base": 10_000.0, "num_kv_heads": 4, "head_dim": 4},
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_scaling": LinearScaling(factor=2.0)}),
        # Qwen has windows only where it says so.
        ("qwen2", {"use_sliding_window": ...}, {"windows": ()}),
        ("qwen2", {"max_window_layers": ...}, {"windows": ()}),
        ("qwen2", {"max_window_layers": 0}, {"windows": (5, 5)}),
        ("qwen3", {"head_dim": ...}, {"head_dim": 128}),
        # Of its experts' kind, in every layer.
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 5},
            {"windows": (5, 5)},
        ),
        (
            "qwen3_moe",
            {"decoder_sparse_step": 2},
            {"experts": dataclasses.replace(tiny_llama.MOE, dense_layers=(0,))},
        ),
        ("gemma3", {"sliding_window_pattern": ...}, {"windows": (4, 4)}),
        ("gemma3", {"rope_local_base_freq": ..., "rope_theta": ...},
         {"rope_base": 1e6, "local_rope_base": 1e4}),
    ],
)  # fmt: skip
def test_what_a_config_leaves_out(name, changes, expected):
  if name == "llama":
    changes = changes | {"hidden_size": 16}
    expected = expected | {"embed_dim": 16}
  wanted = dataclasses.replace(CONFIGS[name], **expected)
  assert read(WRITTEN[name][0] | changes) == wanted


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias = True, must be False"),
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu', must be one"),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor = 0.5",
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type = 'yarn', must be one of",
        ),
        (
            "llama3",
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "missing low_freq_factor of rope llama3; missing high_freq_factor",
        ),
        ("qwen2", {"rope_theta": ...}, "missing rope_theta"),
        (
            "qwen2",
            {"layer_types": ["chunked_attention"] * 2},
            r"layer_types of \['chunked_attention'\]",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3_moe", {"num_experts": ...}, "missing num_local_experts"),
        ("qwen3_moe", {"moe_intermediate_size": ...}, "missing moe_interm"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "per_token must be at most"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "experts.dense_layers must"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapp"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional"),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1.0},
                    "sliding_attention": {"rope_type": "linear", "factor": 2},
                }
            },
            "rope_type = 'linear' of sliding_attention",
        ),
        ("gemma3", {"model_type": "gemma2"}, "model_type = 'gemma2', must be"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, changes, message):
  with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
    read(WRITTEN[name][0] | changes)


def test_scalings_are_written_for_transformers_4_and_5():
  fields = huggingface.write(CONFIGS["llama3"])
  told = {"rope_type": "llama3", **STRETCH}
  assert fields["rope_scaling"] == told
  assert fields["rope_parameters"] == {"rope_theta": 100.0, **told}
  assert isinstance(CONFIGS["llama3"].rope_scaling, Llama3Scaling)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": []}, r"model_type = \[\], must be one of"),
        (
            "llama",
            {"num_hidden_layers": 10**9, "vocab_size": -1, "rms_norm_eps": "x"},
            "vocab_size = -1, must be an integer in .*; num_hidden_layers = 10"
            ".*; rms_norm_eps = 'x', must be a positive number",
        ),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps = 10"),
        ("llama", {"rope_theta": "x"}, "rope_theta = 'x', must be a positive"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings = "),
        ("llama", {"hidden_act": []}, r"hidden_act = \[\], must be text"),
        ("llama", {"rope_scaling": 3}, "rope_scaling = 3, must be an object"),
        ("llama", {"rope_parameters": {"rope_type": []}}, r"rope_type = \[\]"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": None}},
            "factor = None of rope linear, must be a number",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "rope linear: factor must be >= 1",
        ),
        ("qwen2", {"use_sliding_window": None}, "use_sliding_window = None"),
        ("qwen2", {"max_window_layers": "x"}, "max_window_layers = 'x'"),
        ("qwen2", {"layer_types": LAYERS[:1]}, "layer_types has 1 entries"),
        ("qwen2", {"sliding_window": 0}, "sliding_window = 0, must be >= 1"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ("qwen3_moe", {"mlp_only_layers": ["a"]}, "mlp_only_layers = "),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": [1]}},
            r"rope_parameters.full_attention = \[1\], must be an object",
        ),
        (
            "gemma3",
            {"model_type": "gemma3", "text_config": "x"},
            "text_config = 'x', must be an object",
        ),
    ],
)
def test_absurd_values_are_refused_by_name(name, changes, message):
  with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
    read(WRITTEN[name][0] | changes)
