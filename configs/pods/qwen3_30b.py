r"""Qwen3-30B-A3B twice on two v5p slices: the paper's team at 32k context.

Question: do a main agent and a researcher of 30 B parameters each train and
sample at 32,768 tokens on a slice of their own, and what bounds their speed?

    python -m experiments.aot --config=configs/pods/qwen3_30b.py \
        --topology=2xv5p-128

Hardware: two v5p-128 slices of 64 chips, one for each policy. Weights are
split over all 64 chips and gathered layer by layer: a row of 32k tokens gives
each chip ten times the work that hides the gathering. Splitting experts or
heads instead would repeat the attention, or exchange activations.
"""

import ml_collections

from configs import smollm2_factbook
from configs.pods import scale

CONTEXT = 32_768


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe."""
  config = smollm2_factbook.get_config()
  config.name = "pods/qwen3_30b"
  for name in ("main", "researcher"):
    policy = config.policies[name]
    scale.on_accelerator(policy, "qwen3_30b_a3b")
    policy.source = f"models/qwen3_30b_a3b/{name}"
    policy.mesh.fsdp = 64
    policy.sampler_tensor = 4
  scale.lengths(config, context=CONTEXT, rows=64)
  config.engine.num_slots = 16
  config.rollout.max_concurrent = 16
  config.engine.block = CONTEXT // 2
  return config
