"""Transformers' generate on torch, in its own environment.

PYTHON -m experiments.bench.workers.of_transformers DIRECTORY DTYPE

Requests and answers: see `pipe`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.bench.workers import pipe


def main() -> None:
  """Loads the policy and answers."""
  wire = pipe.Pipe()
  import torch
  import transformers

  directory, dtype = sys.argv[1:]
  model: Any = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
  )
  model.eval()

  def generate(prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
    tokens = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
      told = model.generate(
          tokens,
          attention_mask=torch.ones_like(tokens),
          do_sample=True,
          temperature=1.0,
          top_k=0,
          top_p=1.0,
          max_new_tokens=new,
          min_new_tokens=new,  # what would end a row is not drawn
          pad_token_id=2,
      )
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": told[:, tokens.shape[1] :].numel()}

  wire.serve({"generate": generate})


if __name__ == "__main__":
  main()
