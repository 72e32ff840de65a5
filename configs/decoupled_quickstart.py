r"""The quickstart with a job for each policy: does decoupling change anything?

Question: two policies that share nothing but a bucket and HTTP are to end with
the parameters of the same run in one process, bit for bit on a CPU.

    python -m experiments.train --config=configs/decoupled_quickstart.py \
        --workdir=runs/decoupled --launch=local

starts both jobs on this machine; see docs/decoupled.md for several. Without
--launch and --policy it is the run in one process.

Hardware: two CPU cores. Arms, after a colon, are those of configs/quickstart.py
that have two policies: co_train (default), main_only, sub_only, alternating,
smoke (in two minutes).
"""

import ml_collections

from configs import quickstart

ARMS = ("co_train", "main_only", "sub_only", "alternating", "smoke")


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the recipe of one arm."""
  if arm not in ARMS:
    raise ValueError(
        f"decoupled_quickstart has the arms {', '.join(ARMS)}, not {arm!r}"
    )
  config = quickstart.get_config(arm)
  config.name = f"decoupled_quickstart:{arm}"
  return config
