r"""GRPO of one agent (Shao et al., DeepSeekMath, arXiv 2402.03300).

Source: Eq. 3 and 4: each token's ratio clipped, k3 to a frozen reference, means
over tokens and then over outputs; §4.1.2: rewards standardised over the group;
§4.2: β = 0.04 and a single update on what was sampled, so that every ratio is 1
and the clip does not act. Its range is not printed; 0.2 is PPO's.

Deviation: the paper samples 64 outputs a question; the quickstart's 8 stay.

Needs runs/warm_start_single, see configs/quickstart.py; any other arm trains a
team by GRPO's objective.

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
  config.batch.minibatches = 1
  config.loss.ratio = "token"
  config.loss.aggregation = "sequence_mean_token_mean"
  config.loss.clip_low = config.loss.clip_high = 0.2
  config.loss.kl = "k3"
  config.loss.kl_coefficient = 0.04
  config.loss.importance = "none"
  return config
