"""A trainer of TRL without a model, for its losses and advantages.

They are methods of trainers that own a model, a tokenizer and an engine. Here
`self` is a stand-in that answers drawn completions, rewards and log-probs.
"""

from __future__ import annotations

import collections
import functools
import types
from typing import Any

import accelerate
import torch
from trl import RLOOTrainer

from experiments.bench.peers import compare, torch_side
from experiments.bench.peers.compare import Batch, Numbers

tensor = torch_side.tensor


@functools.cache
def _accelerator() -> accelerate.Accelerator:
  """One process on a CPU."""
  return accelerate.Accelerator(cpu=True)


def _trainer(kind: Any, batch: Batch, **settings: Any) -> Any:
  """A stand-in for a trainer that drew the batch."""
  members = batch.rewards.shape[1]
  args = types.SimpleNamespace(
      delta=settings.pop("delta", None),
      gradient_accumulation_steps=1,
      gradient_checkpointing_kwargs=None,
      per_device_train_batch_size=None,
      steps_per_generation=1,
      use_bias_correction_kl=False,
  )
  ours = {
      "accelerator": _accelerator(),
      "args": args,
      "aux_loss_enabled": False,
      "beta": 0.0,
      "current_gradient_accumulation_steps": 1,
      "entropy_coef": 0.0,
      "environment_factories": None,
      "environments": None,
      "epsilon_high": compare.CLIP["clip_high"],
      "epsilon_low": compare.CLIP["clip_low"],
      "importance_sampling_level": "token",
      "loss_type": "grpo",
      "mask_truncated_completions": False,
      "max_completion_length": 40,
      "model": types.SimpleNamespace(
          training=True, is_gradient_checkpointing=False
      ),
      "multi_objective_aggregation": "sum_then_normalize",
      "normalize_advantages": False,
      "num_generations": members,
      "num_iterations": 1,
      "off_policy_mask_threshold": None,
      "pad_to_multiple_of": None,
      "reward_clip_range": None,
      "reward_func_names": ["drawn"],
      "reward_funcs": [None],
      "reward_weights": torch.ones(1),
      "scale_rewards": "group",
      "tools": None,
      "top_entropy_quantile": 1.0,
      "use_adaptive_entropy": False,
      "use_vllm": False,
      "vllm_importance_sampling_clip_max": compare.CAP,
      "vllm_importance_sampling_clip_min": None,
      "vllm_importance_sampling_correction": True,
      "_is_vlm": False,
      "_logs": collections.defaultdict(list)
      | {"rewards": collections.defaultdict(list), "extra": {}},
      "_metrics": {"train": collections.defaultdict(list)},
      "_pending_extra_logs": {},
      "_pending_metrics": {},
      "_tokenizer": types.SimpleNamespace(pad_token_id=0),
      **settings,
  }
  trainer = types.SimpleNamespace(**ours)
  trainer._entropy_bonus_enabled = trainer.entropy_coef != 0
  trainer._generate = functools.partial(_completions, kind, batch)
  trainer._calculate_rewards = lambda *_: tensor(
      batch.rewards.reshape(-1, 1), torch.float32
  )
  trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
      tensor(batch.old),
      None,
      None,
  )
  return trainer


def _completions(kind: Any, batch: Batch, prompts: list[Any]) -> Any:
  """What an engine would have answered."""
  number, length = batch.mask.shape
  prompt_ids = [[1]] * len(prompts)
  completion_ids = [[1] * length for _ in range(number)]
  text = [""] * number
  sampler = batch.sampler.tolist()
  if kind is RLOOTrainer:
    return prompt_ids, completion_ids, text
  mask = batch.mask.astype(int).tolist()
  return prompt_ids, completion_ids, mask, text, sampler, {}, None, None


def scored(kind: Any, batch: Batch, **settings: Any) -> dict[str, Any]:
  """Lets a trainer score what was drawn."""
  inputs = [{"prompt": ""} for _ in range(len(batch.mask))]
  trainer = _trainer(kind, batch, **settings)
  return dict(kind._generate_and_score_completions(trainer, inputs))


def loss(
    kind: Any, batch: Batch, more: dict[str, Any], **settings: Any
) -> tuple[Numbers, ...]:
  """Their loss, and its gradients by log-probs and entropies."""
  number = len(batch.mask)
  inputs = {
      "prompt_ids": torch.ones(number, 1, dtype=torch.long),
      "prompt_mask": torch.ones(number, 1, dtype=torch.long),
      "completion_ids": torch.ones(batch.mask.shape, dtype=torch.long),
      "completion_mask": tensor(batch.mask),
      "advantages": tensor(batch.advantages),
      "old_per_token_logps": tensor(batch.old),
      "old_logps": tensor((batch.old * batch.mask).sum(1)),
      "ref_per_token_logps": tensor(batch.ref),
      "num_items_in_batch": tensor(batch.mask.sum()),
      **more,
  }
  trainer = _trainer(kind, batch, **settings)

  def total(now: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        now,
        entropy,
        None,
    )
    return kind._compute_loss(trainer, None, inputs)

  return torch_side.value_and_grad(total, batch.now, batch.entropy)
