r"""RLOO: REINFORCE against the mean of the other samples.

Source: Ahmadian et al., arXiv 2402.14740: leave-one-out baseline, whole outputs
as actions, nothing clipped; one update a batch and a KL to the first policy
with β = 0.03, two values not read again in the paper's text.

Deviation: calls are not copied but weigh 1 / d (`inverse_count`), for a call's
copies would stand in its own baseline: ±0.53 where two rollouts of one call
each earn 1 and 0, instead of ±1. Calls of its own rollout stay in it, which
`other_rollouts` leaves out (docs/estimators.md). The paper subtracts
β log(π / π_ref) from the reward; `k2` beside the objective needs no second
reward, and leaves out what a token does to the divergence of later ones.

    python -m experiments.train --workdir=… \
        --config=configs/presets/rloo.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/rloo:{arm}"
  config.alignment.strategy = "inverse_count"
  config.advantage = "leave_one_out"
  config.batch.minibatches = 1
  config.loss.ratio = "token"
  config.loss.aggregation = "sequence_mean_token_sum"
  config.loss.clip_low, config.loss.clip_high = 1.0, 1e6
  config.loss.kl = "k2"
  config.loss.kl_coefficient = 0.03
  config.loss.importance = "none"
  return config
