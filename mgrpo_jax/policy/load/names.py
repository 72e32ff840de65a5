"""What the parameters of every family are called in files."""

import dataclasses
from collections.abc import Mapping

from mgrpo_jax.policy.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
  """The names of a family's tensors in a format.

  Attributes:
    tensors: field of `Params` or `Layer` -> name, `{}` for the layer.
    experts: likewise where the feed-forward is a mixture; a second `{}` for
      the expert, or one tensor for all of them.
    norm_offset: what the format leaves out of the scales of norms.
  """

  tensors: Mapping[str, str]
  experts: Mapping[str, str]
  norm_offset: float


_LAYER = "model.layers.{}."
_SAFETENSORS: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": _LAYER + "input_layernorm.weight",
    "query": _LAYER + "self_attn.q_proj.weight",
    "key": _LAYER + "self_attn.k_proj.weight",
    "value": _LAYER + "self_attn.v_proj.weight",
    "output": _LAYER + "self_attn.o_proj.weight",
    "mlp_norm": _LAYER + "post_attention_layernorm.weight",
    "gate": _LAYER + "mlp.gate_proj.weight",
    "up": _LAYER + "mlp.up_proj.weight",
    "down": _LAYER + "mlp.down_proj.weight",
    "query_bias": _LAYER + "self_attn.q_proj.bias",
    "key_bias": _LAYER + "self_attn.k_proj.bias",
    "value_bias": _LAYER + "self_attn.v_proj.bias",
    "query_norm": _LAYER + "self_attn.q_norm.weight",
    "key_norm": _LAYER + "self_attn.k_norm.weight",
    "router": _LAYER + "mlp.gate.weight",
    "final_norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
}
_SAFETENSORS_EXPERTS: Mapping[str, str] = {
    "gate": _LAYER + "mlp.experts.{}.gate_proj.weight",
    "up": _LAYER + "mlp.experts.{}.up_proj.weight",
    "down": _LAYER + "mlp.experts.{}.down_proj.weight",
}
_GEMMA_NORMS: Mapping[str, str] = {
    "attention_post_norm": _LAYER + "post_attention_layernorm.weight",
    "mlp_norm": _LAYER + "pre_feedforward_layernorm.weight",
    "mlp_post_norm": _LAYER + "post_feedforward_layernorm.weight",
}

_GGUF: Mapping[str, str] = {
    "embedding": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "output": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "query_bias": "blk.{}.attn_q.bias",
    "key_bias": "blk.{}.attn_k.bias",
    "value_bias": "blk.{}.attn_v.bias",
    "query_norm": "blk.{}.attn_q_norm.weight",
    "key_norm": "blk.{}.attn_k_norm.weight",
    "attention_post_norm": "blk.{}.post_attention_norm.weight",
    "mlp_post_norm": "blk.{}.post_ffw_norm.weight",
    "router": "blk.{}.ffn_gate_inp.weight",
    "final_norm": "output_norm.weight",
    "unembedding": "output.weight",
}
_GGUF_EXPERTS: Mapping[str, str] = {
    "gate": "blk.{}.ffn_gate_exps.weight",
    "up": "blk.{}.ffn_up_exps.weight",
    "down": "blk.{}.ffn_down_exps.weight",
}

# llama.cpp stores whole scales, so GGUF needs no offset.
GGUF = Names(tensors=_GGUF, experts=_GGUF_EXPERTS, norm_offset=0.0)


def safetensors_names(config: TransformerConfig) -> Names:
  """Gives the names that Hugging Face's checkpoints use for a family.

  Args:
    config: post_norms tell Gemma, whose norms store their scale less 1.

  Returns:
    The names.
  """
  gemma = config.post_norms
  return Names(
      tensors={**_SAFETENSORS, **_GEMMA_NORMS} if gemma else _SAFETENSORS,
      experts=_SAFETENSORS_EXPERTS,
      norm_offset=1.0 if gemma else 0.0,
  )
