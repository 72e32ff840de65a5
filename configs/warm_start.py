r"""Warm start: imitation, to give the quickstart weights to begin from.

Question: how far does imitating a scripted expert carry two 0.4M-parameter
policies? The expert works on training places only; four of five
demonstrations are told under other names, so that copying is learned.

    python -m experiments.train --config=configs/warm_start.py \
        --workdir=runs/warm_start
    rm -r configs/quickstart_weights
    cp -r runs/warm_start/policies configs/quickstart_weights

The shipped weights were made so; `:shared` and `:single_agent` with --workdir
runs/warm_start_shared and runs/warm_start_single make what these arms of the
quickstart begin from. Hardware: two CPU cores, about 20 minutes.
"""

import ml_collections

from configs import default, quickstart

ARMS = ("team", "shared", "single_agent")


def get_config(arm: str = "team") -> ml_collections.ConfigDict:
  """Returns the recipe for a team, one policy in both roles, or one agent."""
  if arm not in ARMS:
    raise ValueError(f"warm_start has the arms {', '.join(ARMS)}, not {arm!r}")
  config = default.get_config()
  config.name = f"warm_start:{arm}"
  if arm == "single_agent":
    quickstart.add_single_agent(config, source="")
  else:
    quickstart.add_team(config, source="", shared=arm == "shared")
  if arm == "shared":  # a caller keeps its slot
    config.engine.num_slots = 128
  for policy in config.policies.values():
    policy.source = "random"
  # First how to read and copy, from an expert that takes its time; then, from
  # a hasty one, that there are shorter ways. Which of them pay is left open.
  config.curriculum = ("careful", "hasty")
  config.stages.careful = default.stage("imitate", steps=1600)
  config.stages.careful.learning_rate = 3e-3
  config.stages.hasty = default.stage("imitate", steps=150)
  config.stages.hasty.learning_rate = 1e-3
  config.stages.hasty.hasty = 0.6
  for name in config.curriculum:
    config.stages[name].families = quickstart.FAMILIES
    config.stages[name].final_fraction = 0.1
  config.tasks.per_step = 32
  config.batch.minibatches = 1
  config.warmup_steps = 30
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.01
  config.evaluation.families = quickstart.FAMILIES
  config.evaluation.every = 100
  config.evaluation.tasks = 100
  config.checkpoint.every = 100
  config.publish.every = 100
  return config
