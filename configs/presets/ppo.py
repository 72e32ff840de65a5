r"""PPO: a critic judges every token, on the same trajectories.

Source: Schulman et al., arXiv 1707.06347: ε = 0.2 (§6.1), λ = 0.95 (Table 3),
an entropy bonus of 0.01 (Table 5), several updates a batch; values clipped as
in the authors' code. The critic is a head on the policy's own trunk and begins
at 0; its error counts 0.5. γ is 1, for a longer turn costs nothing.

Deviation: the paper goes over a batch 3 to 15 times; here once, in two updates.

    python -m experiments.train --workdir=… \
        --config=configs/presets/ppo.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/ppo:{arm}"
  config.advantage = "plain"
  config.critic.coefficient = 0.5
  config.critic.discount = 1.0
  config.critic.trace = 0.95
  config.critic.clip = 0.2
  config.loss.ratio = "token"
  config.loss.aggregation = "token_mean"
  config.loss.clip_low = config.loss.clip_high = 0.2
  config.loss.entropy_coefficient = 0.01
  config.loss.importance = "none"
  return config
