"""TRL's GRPOTrainer, in its own environment, a step at a time.

    PYTHON -m experiments.bench.workers.of_trl DIRECTORY SETTINGS

SETTINGS is JSON: `prompts`, and of each so many `completions` of `new` tokens,
trained at `learning_rate`. A request `{"do": "step"}` is answered
once a step is done: sampling with transformers, rewards, loss, AdamW.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from experiments.bench.workers import pipe


def main() -> None:
  """Trains as long as it is asked to."""
  wire = pipe.Pipe()
  import datasets
  import torch
  import transformers
  import trl

  directory, settings = sys.argv[1], json.loads(sys.argv[2])
  rows = len(settings["prompts"]) * settings["completions"]
  model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="sdpa"
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  lengths = [len(tokenizer(one).input_ids) for one in settings["prompts"]]
  with tempfile.TemporaryDirectory() as folder:
    config = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=settings["completions"],
        max_completion_length=settings["new"],
        generation_kwargs={"min_new_tokens": settings["new"]},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=10**6,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=_reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict(
            {"prompt": settings["prompts"]}
        ),
        processing_class=tokenizer,
        callbacks=[_callback(transformers.TrainerCallback, wire, lengths)],
    )
    trainer.train()


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
  """The share of even token ids: a reward that differs within a group."""
  return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def _callback(base: Any, wire: pipe.Pipe, lengths: list[int]) -> Any:
  """Waits before each step until it is asked for, and says when it is done."""

  class Steps(base):
    began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
      if self.began == 0.0:
        wire.write({"ready": True, "prompt_tokens": lengths})
      if wire.read() is None:
        raise SystemExit
      self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
      wire.write({"seconds": time.perf_counter() - self.began})

  return Steps()


if __name__ == "__main__":
  main()
