r"""The quickstart with a job for each policy: does decoupling change anything?

Question: two policies that share nothing but a bucket and HTTP are to end with
the parameters of the same run in one process, bit for bit on a CPU.

    python -m experiments.train --config=configs/decoupled_quickstart.py \
        --workdir=runs/decoupled --launch=local

starts both jobs on this machine; docs/decoupled.md begins with the commands
that start them one by one, in two terminals or on two machines. Without
--launch and --policy it is the run in one process.

Hardware: two CPU cores. Arms, after a colon, are those of configs/quickstart.py
that have two policies: co_train (default), main_only, sub_only, alternating,
smoke (in two minutes). In the arm `replaced` another policy, which begins as
the researcher did, plays the researcher in the hard stage: its job may be
started when the researcher's has ended.
"""

import ml_collections

from configs import default, quickstart

ARMS = (
    "co_train",
    "main_only",
    "sub_only",
    "alternating",
    "smoke",
    "replaced",
)


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the recipe of one arm."""
  if arm not in ARMS:
    raise ValueError(
        f"decoupled_quickstart has the arms {', '.join(ARMS)}, not {arm!r}"
    )
  config = quickstart.get_config("co_train" if arm == "replaced" else arm)
  config.name = f"decoupled_quickstart:{arm}"
  if arm == "replaced":
    config.policies.scout = default.policy()
    config.policies.scout.source = config.policies.researcher.source
    config.stages.hard.cast.researcher = "scout"
  return config
