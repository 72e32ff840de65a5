"""Records what transformers makes of two random tiny Llamas.

    python -m venv peer && . peer/bin/activate
    pip install torch transformers numpy
    python tests/golden/make_llama.py

Writes llama.npz for tests/test_transformer.py: under `grouped/` (shared key
heads, head_dim not E / H, untied) and `tied/`, the weights by transformers'
names, and for two prompts of unequal length the tokens, logits and the
log-probability of each token after the first.
"""

import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = {
    "grouped": {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 40,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "tied": {
        "vocab_size": 48,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "rope_theta": 100.0,
        "rms_norm_eps": 1e-2,
        "tie_word_embeddings": True,
    },
}
LENGTHS = (19, 7)


def record(sizes: dict) -> dict[str, np.ndarray]:
  """Runs one random model, with norms away from 1, in float32."""
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
  arrays = {}
  with torch.no_grad():
    for name, weight in model.named_parameters():
      scale = 1.0 if "norm" in name else 0.0
      weight.copy_(scale + 0.3 * torch.randn(weight.shape))
      arrays[name] = weight.numpy()
    for n, length in enumerate(LENGTHS):
      tokens = torch.randint(sizes["vocab_size"], (1, length))
      logits = model(tokens).logits
      logps = torch.log_softmax(logits[0, :-1], -1)
      arrays[f"tokens{n}"] = tokens[0].numpy().astype(np.int32)
      arrays[f"logits{n}"] = logits[0].numpy()
      arrays[f"logprobs{n}"] = logps[range(length - 1), tokens[0, 1:]].numpy()
  return arrays


def main() -> None:
  """Writes llama.npz beside this file."""
  torch.manual_seed(0)
  arrays = {
      f"{kind}/{name}": array
      for kind, sizes in SIZES.items()
      for name, array in record(sizes).items()
  }
  np.savez_compressed(HERE / "llama.npz", **arrays)


if __name__ == "__main__":
  main()
