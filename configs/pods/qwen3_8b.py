r"""Qwen3-8B pair on one slice of 64 chips, half of it for each policy.

Question: do two policies of 8 B parameters fit half a slice each at 8,192
tokens, and what bounds their speed?

    python -m experiments.aot --config=configs/pods/qwen3_8b.py:v5e \
        --topology=2xv5e-32
    python -m experiments.aot --config=configs/pods/qwen3_8b.py:v6e \
        --topology=2xv6e-32

Hardware: v5e-64 or v6e-64, 32 chips for each policy; as two slices, because the
compiler refuses programs on a part of v5e-64. The unembedding and its
gradient, 2.5 GB each in float32, are whole on every chip while logits are
computed: v6e has room for that, v5e splits them in two (`tensor`).
"""

import ml_collections

from configs import smollm2_factbook
from configs.pods import scale

ARMS = ("v5e", "v6e")


def get_config(arm: str = "v5e") -> ml_collections.ConfigDict:
  """Returns the recipe of one arm."""
  if arm not in ARMS:
    raise ValueError(f"the arms are {', '.join(ARMS)}, not {arm!r}")
  config = smollm2_factbook.get_config()
  config.name = f"pods/qwen3_8b:{arm}"
  tensor = {"v5e": 2, "v6e": 1}[arm]
  for name in ("main", "researcher"):
    policy = config.policies[name]
    scale.on_accelerator(policy, "qwen3_8b")
    policy.source = f"models/qwen3_8b/{name}"
    policy.mesh.fsdp = 32 // tensor
    policy.mesh.tensor = tensor
    policy.sampler_tensor = 8
  scale.lengths(config, context=8192, rows=32 // tensor)
  config.engine.num_slots = 16
  config.rollout.max_concurrent = 16
  return config
