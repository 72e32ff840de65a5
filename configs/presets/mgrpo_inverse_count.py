r"""M-GRPO without copies: a call weighs 1 / d instead.

Source: this project; what the alignment of arXiv 2511.13288 is on average, less
noise, derived in docs/estimators.md. All else is
configs/presets/mgrpo.py.

    python -m experiments.train --workdir=… \
        --config=configs/presets/mgrpo_inverse_count.py
"""

import ml_collections

from configs.presets import mgrpo


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = mgrpo.get_config(arm)
  config.name = f"presets/mgrpo_inverse_count:{arm}"
  config.alignment.strategy = "inverse_count"
  return config
