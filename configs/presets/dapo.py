r"""DAPO: clip higher, sample dynamically, mean over tokens, soft overlong.

Source: Yu et al., arXiv 2503.14476, §3 and §4.1: ε_low 0.2 and ε_high 0.28, no
KL, tokens averaged over the whole batch, groups without spread drawn again, and
a punishment of up to 1 in the last 4,096 of 20,480 tokens; here in the last
fifth of the main agent's 192.

Deviation: the paper draws again where all answers of a question are right or
none is, until the batch is full; here where no role's total rewards differ,
format, punishment and a call's own grade included, in three rounds at most, and
what is left stays. It samples 16 answers to each of 512 questions and makes 16
updates of them; the quickstart's 8 rollouts of 16 tasks and two updates stay.
Its rewards are -1 and 1, ours 0 to 1, beside which the punishment weighs twice.

    python -m experiments.train --workdir=… \
        --config=configs/presets/dapo.py
"""

import ml_collections

from configs import quickstart


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the preset on an arm of the quickstart."""
  config = quickstart.get_config(arm)
  config.name = f"presets/dapo:{arm}"
  config.advantage = "per_task"
  config.tasks.resample = 3
  config.reward.overlong_tokens = 38
  config.reward.overlong_share = 1.0
  config.loss.ratio = "token"
  config.loss.aggregation = "token_mean"
  config.loss.clip_low, config.loss.clip_high = 0.2, 0.28
  config.loss.importance = "none"
  return config
