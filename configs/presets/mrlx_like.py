r"""Like the public MrlX code: groups of whatever arrived together.

Source: the code released with arXiv 2511.13288, not its text: sub-agent calls
are standardised over blocks in order of arrival, across tasks, each token's
ratio is clipped at 0.2 below and 0.28 above. docs/estimators.md says what such
a baseline is biased by.

Deviation: the main agent's calls are compared over the batch here too.

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
  config.advantage = "per_batch"
  config.loss.ratio = "token"
  config.loss.aggregation = "sequence_mean_token_mean"
  config.loss.clip_low, config.loss.clip_high = 0.2, 0.28
  config.loss.importance = "none"
  return config
