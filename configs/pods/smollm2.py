r"""SmolLM2 pair on four chips: what does the smallest real team need?

Question: do two SmolLM2-135M policies train and sample side by side on one
v5e host, and what limits them?

    python -m experiments.aot --config=configs/pods/smollm2.py --topology=v5e-4
    python -m experiments.train --config=configs/pods/smollm2.py \
        --workdir=runs/smollm2_v5e

Hardware: v5e-4, two chips for each policy.
"""

import ml_collections

from configs import smollm2_factbook
from configs.pods import scale


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe."""
  config = smollm2_factbook.get_config()
  config.name = "pods/smollm2"
  for name in ("main", "researcher"):
    policy = config.policies[name]
    scale.on_accelerator(policy, "smollm2_135m")
    policy.mesh.fsdp = 2
    policy.execution.decode_attention = "paged"
  config.engine.num_slots = 64
  config.engine.block = config.engine.context
  config.batch.rows = 16
  config.batch.least_shared = 0  # splash knows no prefixes
  return config
