r"""GRPO of one agent (Shao et al., DeepSeekMath, arXiv 2402.03300).

Source: Eq. 3 and 4, §4.1.1: rewards standardised over the group, each token's
ratio clipped, k3 to a frozen reference with β = 0.04, means over tokens and
then over outputs. The paper samples 64 outputs a question; the quickstart's 8
stay. The clip range is not printed; 0.2 is PPO's. Needs runs/warm_start_single,
see configs/quickstart.py; any other arm trains a team by GRPO's objective.

    python -m experiments.train --workdir=… \
        --config=configs/presets/grpo.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "single_agent") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/grpo:{arm}"
  config.advantage = "per_task"
  config.loss.ratio = "token"
  config.loss.aggregation = "sequence_mean_token_mean"
  config.loss.clip_low = config.loss.clip_high = 0.2
  config.loss.kl = "k3"
  config.loss.kl_coefficient = 0.04
  config.loss.importance = "none"
  return config
