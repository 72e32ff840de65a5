r"""REINFORCE++: one baseline and one spread for the whole batch.

Source: Hu et al., arXiv 2501.03262, §3: advantages standardised over the global
batch, PPO's clipping of each token's ratio at 0.2, a KL penalty to the first
policy with β = 0.001, tokens averaged. The clip range, β and the two updates a
batch were not read again in the paper's text.

Deviation: the paper subtracts the KL from the tokens' rewards; here `k2` stands
beside the objective, whose gradient is that of the KL token by token: what a
token does to the divergence of later ones is left out.

    python -m experiments.train --workdir=… \
        --config=configs/presets/reinforce_pp.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/reinforce_pp:{arm}"
  config.advantage = "per_batch"
  config.loss.ratio = "token"
  config.loss.aggregation = "token_mean"
  config.loss.clip_low = config.loss.clip_high = 0.2
  config.loss.kl = "k2"
  config.loss.kl_coefficient = 0.001
  config.loss.importance = "none"
  return config
