r"""GSPO: the ratio of the sequence, per token, clipped narrowly.

Source: Zheng et al., arXiv 2507.18071, Eq. 5 to 7 and §5.1: geometric mean of
the tokens' ratios, clipped at 3e-4 below and 4e-4 above, four updates a batch;
advantages as in GRPO. The paper leaves the KL term out of its formulas.

    python -m experiments.train --workdir=… \
        --config=configs/presets/gspo.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/gspo:{arm}"
  config.advantage = "per_task"
  config.batch.minibatches = min(4, config.tasks.per_step)
  config.loss.ratio = "geometric"
  config.loss.aggregation = "sequence_mean_token_mean"
  config.loss.clip_low, config.loss.clip_high = 3e-4, 4e-4
  config.loss.importance = "none"
  return config
