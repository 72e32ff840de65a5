r"""Like the public MrlX code: groups of whatever arrived together.

Source: the code released with arXiv 2511.13288, not its text
(github.com/AQ-MedAI/MrlX at 0d04788, MrlX-DeepResearch/agent_co_train,
run_qwen3_30B_main.sh and _sub.sh): a main agent's rollouts are standardised
over the 8 of their task, a sub-agent's calls over blocks of 8 in the order of
their arrival, across tasks. Each token's ratio is clipped at 0.2 below and 0.28
above, the KL has the coefficient 0, and two blocks make one update.

Deviation: `per_block` says in which order calls arrive here. All calls of a
step make one update, theirs 16 at a time. Reward shares are the quickstart's;
theirs pays a call 0.1 for its format and 0.9 for the main agent's success.

    python -m experiments.train --workdir=… \
        --config=configs/presets/mrlx_like.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/mrlx_like:{arm}"
  config.alignment.strategy = "mask"
  config.advantage = "per_block"
  config.batch.minibatches = 1
  config.loss.ratio = "token"
  config.loss.aggregation = "sequence_mean_token_mean"
  config.loss.clip_low, config.loss.clip_high = 0.2, 0.28
  config.loss.importance = "none"
  return config
