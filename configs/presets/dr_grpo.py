r"""Dr. GRPO: no division by the spread, nor by lengths.

Source: Liu et al., arXiv 2503.20783, §3.2: advantages without standard
deviation, token losses summed and divided by a constant (here the longest
context), no KL. The clip range is PPO's 0.2; the two updates a batch are the
quickstart's.

    python -m experiments.train --workdir=… \
        --config=configs/presets/dr_grpo.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/dr_grpo:{arm}"
  config.advantage = "mean_only"
  config.loss.ratio = "token"
  config.loss.aggregation = "sequence_mean_token_sum_norm"
  config.loss.clip_low = config.loss.clip_high = 0.2
  config.loss.importance = "none"
  return config
