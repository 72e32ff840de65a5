r"""Gemma 3 4B with a 1B researcher on one v5e slice of 16 chips.

Question: does a team of two sizes share a small slice, half of it each, and
what bounds the speed of either?

    python -m experiments.aot --config=configs/pods/gemma3.py --topology=2xv5e-8

Hardware: v5e-16, eight chips for each policy; as two slices, see
qwen3_8b. The vocabulary of 262,208 makes the unembedding's gradient the largest
array, so main splits it in two, computes few logits at a time and recomputes
all of a layer: 16 GB are just enough for training and sampling 2,048 tokens.
"""

import ml_collections

from configs import smollm2_factbook
from configs.pods import scale


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe."""
  config = smollm2_factbook.get_config()
  config.name = "pods/gemma3"
  main, researcher = config.policies.main, config.policies.researcher
  scale.on_accelerator(main, "gemma3_4b")
  main.source = "models/gemma3_4b"
  main.mesh.fsdp, main.mesh.tensor = 4, 2
  main.sampler_tensor = 4
  main.execution.remat = "layer"
  main.execution.logit_columns = 64
  scale.on_accelerator(researcher, "gemma3_1b")
  researcher.source = "models/gemma3_1b"
  researcher.mesh.fsdp = 8
  scale.lengths(config, context=2048, rows=8)
  config.engine.num_slots = 8
  config.rollout.max_concurrent = 8
  return config
