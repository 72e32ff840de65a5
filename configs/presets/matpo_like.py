r"""Like MATPO: calls inherit the advantage of their rollout.

Source: Mo et al., arXiv 2510.04678: one GRPO group of K rollouts a task, whose
advantage every token of the rollout carries, the sub-agents' too. The released
script (github.com/mzf666/MATPO, qwen3-14b_musique_MATPO.sh and its defaults):
8 rollouts, one update a batch, each token's ratio clipped at 0.2, tokens
averaged, no KL, rewards 0.9 for the answer and 0.1 for the format.

Deviation: MATPO trains one policy in both roles; here each role's policy learns
from its own calls, all of which count once.

    python -m experiments.train --workdir=… \
        --config=configs/presets/matpo_like.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/matpo_like:{arm}"
  config.alignment.strategy = "mask"
  config.advantage = "inherit_parent"
  config.batch.minibatches = 1
  config.loss.ratio = "token"
  config.loss.aggregation = "token_mean"
  config.loss.clip_low = config.loss.clip_high = 0.2
  config.loss.importance = "none"
  return config
