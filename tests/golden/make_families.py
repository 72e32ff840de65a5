"""Records what transformers makes of random tiny models of every family.

    python -m venv peer && . peer/bin/activate
    pip install torch transformers numpy
    python tests/golden/make_families.py

Writes families.npz for tests/test_families.py. Under each name of CASES, in
float32: the weights by transformers' names, two prompts of unequal length and
their logits, and of the mean negative log-likelihood of the first prompt the
value and, by torch autograd, the gradient of every weight. Under `config` of
each, what transformers writes as config.json.
"""

import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
}
WIDE = SIZES | {"head_dim": 6}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
}
CASES = {
    "llama": transformers.LlamaConfig(**WIDE, tie_word_embeddings=False),
    "llama3": transformers.LlamaConfig(
        **WIDE, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "qwen2": transformers.Qwen2Config(
        **SIZES,
        head_dim=4,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": transformers.Qwen3Config(**WIDE, tie_word_embeddings=True),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **WIDE, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[0]
    ),
    "qwen3_moe_unscaled": transformers.Qwen3MoeConfig(
        **WIDE | {"num_hidden_layers": 1}, **EXPERTS, norm_topk_prob=False
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **WIDE,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=20,
        pad_token_id=None,  # whose embedding torch would not train
        rope_parameters={
            "full_attention": {
                "rope_type": "linear",
                "factor": 8.0,
                "rope_theta": 1e4,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}
LENGTHS = (19, 7)


def record(config) -> dict[str, np.ndarray]:
  """Runs one random model, with norms away from 1, in float32."""
  config._attn_implementation = config._experts_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  gemma = config.model_type == "gemma3_text"
  with torch.no_grad():
    for name, weight in model.named_parameters():
      scale = 1.0 if "norm" in name and not gemma else 0.0
      drawn = scale + 0.3 * torch.randn(weight.shape)
      weight.copy_(drawn.half())  # exact in half the bytes
  arrays = {"config": np.array(config.to_json_string(use_diff=True))}
  for n, length in enumerate(LENGTHS):
    tokens = torch.randint(config.vocab_size, (1, length))
    logits = model(tokens).logits[0]
    arrays[f"tokens{n}"] = tokens[0].numpy().astype(np.int32)
    arrays[f"logits{n}"] = logits.detach().numpy()
    if not n:
      loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
      loss.backward()
      arrays["loss"] = loss.detach().numpy()
  for name, weight in model.named_parameters():
    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
    weight = weight.detach().half()
    for kind, tensor in (("weight", weight), ("gradient", gradient)):
      for stored, part in stored_tensors(name, tensor.numpy()):
        arrays[f"{kind}/{stored}"] = part
  return arrays


def stored_tensors(name: str, tensor: np.ndarray):
  """Takes apart the experts that transformers 5 keeps in one tensor."""
  if name.endswith("mlp.experts.gate_up_proj"):
    stem = name.removesuffix("gate_up_proj")
    for number, both in enumerate(tensor):
      gate, up = np.split(both, 2)
      yield f"{stem}{number}.gate_proj.weight", gate
      yield f"{stem}{number}.up_proj.weight", up
  elif name.endswith("mlp.experts.down_proj"):
    stem = name.removesuffix("down_proj")
    for number, down in enumerate(tensor):
      yield f"{stem}{number}.down_proj.weight", down
  else:
    yield name, tensor


def main() -> None:
  """Writes families.npz beside this file."""
  torch.manual_seed(0)
  arrays = {
      f"{case}/{name}": array
      for case, config in CASES.items()
      for name, array in record(config).items()
  }
  np.savez_compressed(HERE / "families.npz", **arrays)


if __name__ == "__main__":
  main()
