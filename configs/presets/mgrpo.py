r"""M-GRPO as published (Hong et al., arXiv 2511.13288).

Source: Eq. 4 to 19; K = 8 and D = 8 from §4. Rewards 0.1 format + 0.9 correct
for the main agent, 0.1 format + 0.4 of its correctness + 0.5 expert for calls.
Calls are duplicated or dropped into D slots, compared over all slots of a task,
and clipped by the ratio of the whole sequence; no KL, no entropy term. The
paper prints no clip range; 0.2 is PPO's.

    python -m experiments.train --workdir=… \
        --config=configs/presets/mgrpo.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/mgrpo:{arm}"
  config.alignment.strategy = "duplicate_or_drop"
  config.alignment.num_slots = 8
  config.rollout.per_task = 8
  config.advantage = "per_task"
  config.loss.ratio = "sequence"
  config.loss.aggregation = "sequence_mean_token_mean"
  config.loss.clip_low = config.loss.clip_high = 0.2
  config.loss.importance = "none"
  return config
