"""`config.json` as Hugging Face's transformers writes it, read and written.

A family is what its `model_type` says; every key that would change what is
computed is read or refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mgrpo_jax.policy.config import Experts, TransformerConfig
from mgrpo_jax.policy.load import scalings
from mgrpo_jax.policy.load.fields import is_number
from mgrpo_jax.policy.load.fields import wrong as wrong_fields

Fields = Mapping[str, Any]

# Sizes that a config.json has to give, and what they are called here.
_SIZES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps",
}
# What no transformer here computes otherwise; absent keys mean these values.
_FIXED: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# Gemma 3's multimodal files give only what differs from these.
_GEMMA3: Fields = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
}
# What transformers takes for keys that are absent, where it matters.
_DEFAULTS: Mapping[str, Fields] = {
    "llama": {"rope_theta": 10_000.0},  # Llama 1 and 2 do not give it
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28},
    "qwen3": {
        "use_sliding_window": False,
        "max_window_layers": 28,
        "head_dim": 128,
    },
    "qwen3_moe": {"use_sliding_window": False},
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
}


def read(fields: Fields, source: str) -> TransformerConfig:
  """Reads what a model computes; refuses what is not computed here.

  Args:
    fields: of `config.json`; of its `text_config` where it describes a
      multimodal Gemma 3.
    source: names the file in errors.

  Returns:
    The sizes.

  Raises:
    ValueError: listing every key that is missing or not supported.
  """
  family = fields.get("model_type", "llama")
  if not isinstance(family, str) or family not in _FAMILIES:
    raise ValueError(
        f"{source}: model_type = {family!r}, must be one of"
        f" {sorted(_FAMILIES)}"
    )
  if family == "gemma3":
    text = fields.get("text_config", {})
    if not isinstance(text, dict):
      raise ValueError(f"{source}: text_config = {text!r}, must be an object")
    fields = {"model_type": family} | text
  fields = {**_DEFAULTS[family], **fields}
  problems = [f"missing {key}" for key in _SIZES if key not in fields]
  problems += wrong_fields(fields)
  whole, ropes, wrong = _ropes(fields)
  problems += wrong
  problems += [
      f"{key} = {fields[key]!r}, must be {value!r}"
      for key, value in _FIXED.items()
      if fields.get(key, value) != value
  ]
  scaling, wrong = scalings.read(whole)
  problems += wrong
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  sizes = {ours: fields[theirs] for theirs, ours in _SIZES.items()}
  heads = sizes["num_heads"]
  try:
    return TransformerConfig(
        **sizes,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or sizes["embed_dim"] // heads,
        rope_base=whole["rope_theta"],
        rope_scaling=scaling,
        tied_embeddings=fields.get("tie_word_embeddings", False),
        activation=_activation(fields),
        dtype=fields.get("activation_dtype", "float32"),
        **_FAMILIES[family]({**fields, "rope_parameters": ropes}),
    )
  except KeyError as error:
    raise ValueError(f"{source}: missing {error.args[0]}") from error
  except (ValueError, TypeError) as error:
    raise ValueError(f"{source}: {error}") from error


def write(config: TransformerConfig) -> dict[str, Any]:
  """Writes what a model computes the way transformers reads it.

  Args:
    config: sizes; its features tell the family.

  Returns:
    Fields of `config.json`.

  Raises:
    ValueError: no family has these features together, or the family's files
      cannot say one of them; naming it.
  """
  family = _family(config)
  sizes = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
  activation = "hidden_activation" if family == "gemma3_text" else "hidden_act"
  scaling = scalings.write(config.rope_scaling)
  rope = {"rope_theta": config.rope_base, **scaling}
  fields: dict[str, Any] = {
      **sizes,
      "model_type": family,
      "architectures": [_ARCHITECTURES[family]],
      "num_key_value_heads": config.num_kv_heads,
      "head_dim": config.head_dim,
      "tie_word_embeddings": config.tied_embeddings,
      activation: _ACTIVATIONS[config.activation],
      "rope_theta": config.rope_base,
      "rope_scaling": None if config.rope_scaling is None else scaling,
      "rope_parameters": rope,
      "torch_dtype": "float32",
      "activation_dtype": config.dtype,
  }
  if any(config.windows):
    fields |= _written_windows(config)
  if family == "gemma3_text":
    fields["query_pre_attn_scalar"] = _whole_width(config.query_scale)
    fields["rope_local_base_freq"] = config.local_rope_base
    local = {"rope_type": "default", "rope_theta": config.local_rope_base}
    fields["rope_parameters"] = {
        "full_attention": rope,
        "sliding_attention": local,
    }
  if config.experts is not None:
    fields |= {
        "num_experts": config.experts.number,
        "num_experts_per_tok": config.experts.per_token,
        "moe_intermediate_size": config.experts.mlp_dim,
        "norm_topk_prob": config.experts.normalised,
        "mlp_only_layers": list(config.experts.dense_layers),
        "decoder_sparse_step": 1,
    }
  said = _comparable(read(fields, family))
  wanted = _comparable(config)
  lost = [name for name, value in wanted.items() if said[name] != value]
  if lost:
    raise ValueError(f"config: {family} cannot have {', '.join(lost)}")
  return fields


def _ropes(fields: Fields) -> tuple[Fields, dict[str, Any], list[str]]:
  """Rotations of full attention, those by kind, and what is wrong there."""
  given = [fields.get(key) for key in ("rope_scaling", "rope_parameters")]
  stretch, rope = (one if isinstance(one, dict) else {} for one in given)
  ropes = rope if "full_attention" in rope else {"full_attention": rope}
  wrong = [
      f"rope_parameters.{kind} = {one!r}, must be an object"
      for kind, one in ropes.items()
      if not isinstance(one, dict) and kind.endswith("_attention")
  ]
  if wrong:
    return {}, {}, wrong
  theta = {"rope_theta": fields.get("rope_theta")}
  whole = {**theta, **stretch, **ropes["full_attention"]}
  if whole["rope_theta"] is None:
    wrong.append("missing rope_theta")
  elif not is_number(whole["rope_theta"]) or whole["rope_theta"] <= 0:
    wrong.append(
        f"rope_theta = {whole['rope_theta']!r}, must be a positive number"
    )
  return whole, ropes, wrong


def _comparable(config: TransformerConfig) -> dict[str, Any]:
  """Says what a config computes, so that equal models compare equal."""
  return vars(config) | {
      "attention_scale": round(config.query_scale**-2, 6),
      "windows": tuple(map(config.window, range(config.num_layers))),
      "execution": None,
  }


def _llama(fields: Fields) -> dict[str, Any]:
  """Llama 1 to 3.x, SmolLM2."""
  del fields
  return {}


def _qwen2(fields: Fields) -> dict[str, Any]:
  """Qwen 2 and 2.5: biases of queries, keys and values."""
  return {"qkv_bias": True, "windows": _windows(fields)}


def _qwen3(fields: Fields) -> dict[str, Any]:
  """Qwen 3: normed queries and keys."""
  return {"qk_norm": True, "windows": _windows(fields)}


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
  """Qwen 3 with a mixture of experts; a window holds for every layer."""
  step = fields.get("decoder_sparse_step", 1)
  dense = set(fields.get("mlp_only_layers") or ())
  number = fields.get("num_experts") or fields["num_local_experts"]
  dense |= {
      layer
      for layer in range(fields["num_hidden_layers"])
      if (layer + 1) % step
  }
  experts = Experts(
      number=number,
      per_token=fields["num_experts_per_tok"],
      mlp_dim=fields["moe_intermediate_size"],
      normalised=fields.get("norm_topk_prob", False),
      dense_layers=tuple(sorted(dense)),
  )
  window = fields.get("sliding_window") if fields["use_sliding_window"] else 0
  windows = (window,) * fields["num_hidden_layers"] if window else ()
  return {"qk_norm": True, "experts": experts, "windows": windows}


def _gemma3(fields: Fields) -> dict[str, Any]:
  """Gemma 3's text model."""
  local = fields["rope_parameters"].get("sliding_attention") or {}
  if local.get("rope_type", "default") != "default":
    raise ValueError(
        f"rope_type = {local['rope_type']!r} of sliding_attention, must be"
        " 'default'"
    )
  return {
      "qk_norm": True,
      "post_norms": True,
      "embedding_scale": fields["hidden_size"] ** 0.5,
      "attention_scale": fields["query_pre_attn_scalar"] ** -0.5,
      "windows": _windows(fields),
      "local_rope_base": {
          "rope_theta": fields["rope_local_base_freq"],
          **local,
      }["rope_theta"],
  }


_FAMILIES: Mapping[str, Callable[[Fields], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3,
}
_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "gelu_tanh": "gelu_pytorch_tanh",
}


def _family(config: TransformerConfig) -> str:
  """Tells the family by what it adds to Llama."""
  features = (
      config.qkv_bias,
      config.qk_norm,
      config.post_norms,
      config.experts is not None,
  )
  families = {
      (False, False, False, False): "llama",
      (True, False, False, False): "qwen2",
      (False, True, False, False): "qwen3",
      (False, True, False, True): "qwen3_moe",
      (False, True, True, False): "gemma3_text",
  }
  if features not in families:
    raise ValueError(
        "config: no family has qkv_bias, qk_norm, post_norms, experts ="
        f" {features}"
    )
  return families[features]


def _whole_width(query_scale: float) -> int:
  """The width w, which transformers wants whole, of a scale w^-1/2."""
  width = round(query_scale**-2)
  if not math.isclose(width**-0.5, query_scale, rel_tol=1e-9):
    raise ValueError(
        f"attention_scale: {query_scale!r} must be n^-1/2 for a whole n"
    )
  return width


def _activation(fields: Fields) -> str:
  """Reads the gate's activation."""
  name = fields.get("hidden_activation") or fields.get("hidden_act", "silu")
  known = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
  if name not in known:
    raise ValueError(f"hidden_act = {name!r}, must be one of {sorted(known)}")
  return known[name]


def _windows(fields: Fields) -> tuple[int, ...]:
  """Reads what each layer sees; empty where all see everything."""
  layers, window = fields["num_hidden_layers"], fields.get("sliding_window")
  kinds = fields.get("layer_types")
  if fields.get("use_sliding_window") is False or window is None:
    return ()
  if kinds is not None and len(kinds) != layers:
    raise ValueError(f"layer_types has {len(kinds)} entries, not {layers}")
  if kinds is None:
    every = fields.get("sliding_window_pattern")
    first = fields.get("max_window_layers", 0)
    kinds = [
        "full_attention"
        if layer < first or (every and not (layer + 1) % every)
        else "sliding_attention"
        for layer in range(layers)
    ]
  unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
  if unknown:
    raise ValueError(f"layer_types of {unknown} are not supported")
  if not window and "sliding_attention" in kinds:
    raise ValueError("sliding_window = 0, must be >= 1, or null for none")
  windows = tuple(
      window if kind == "sliding_attention" else 0 for kind in kinds
  )
  return windows if any(windows) else ()


def _written_windows(config: TransformerConfig) -> dict[str, Any]:
  """Writes what each layer sees."""
  sizes = sorted(set(config.windows) - {0})
  if len(sizes) > 1:
    raise ValueError(f"config.windows: must be of one size, are {sizes}")
  return {
      "sliding_window": sizes[0],
      "use_sliding_window": True,
      "max_window_layers": 0,
      "layer_types": [
          "sliding_attention" if window else "full_attention"
          for window in config.windows
      ],
  }
