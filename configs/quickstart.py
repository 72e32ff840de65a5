r"""Quickstart: does a two-agent team learn to look things up together?

Question: 1-, 2- and 3-hop questions about the World Factbook, asked about
places no training question turns on. A main agent without tools delegates to
a researcher who searches and reads; both are 0.4M-parameter policies that
begin from shipped weights (imitation of a hasty expert, configs/warm_start.py).

    python -m experiments.train --config=configs/quickstart.py \
        --workdir=runs/quickstart

Hardware: two CPU cores. Arms, after a colon: `co_train` (the default),
`main_only` (researcher frozen), `sub_only` (main frozen), `smoke` (one minute),
and `single_agent`: one agent with all tools and the main agent's context, from
what `configs/warm_start.py:single_agent` leaves in runs/warm_start_single.
"""

import ml_collections

from configs import default

# All questions but comparisons and counts of two places.
FAMILIES = (
    "attribute",
    "place",
    "link",
    "place>attribute",
    "partner>attribute",
    "border>attribute",
    "place>link",
    "place>link>attribute",
)
ARMS = ("co_train", "main_only", "sub_only", "single_agent", "smoke")
MAIN_CONTEXT = 192  # tokens; too few for looking up two hops oneself


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the recipe of one arm."""
  if arm not in ARMS:
    raise ValueError(f"quickstart has the arms {', '.join(ARMS)}, not {arm!r}")
  config = default.get_config()
  config.name = f"quickstart:{arm}"
  if arm == "single_agent":
    add_single_agent(config, source="runs/warm_start_single/policies")
  else:
    add_team(config, source="configs/quickstart_weights")

  config.curriculum = ("easy", "hard")
  config.stages.easy = default.stage("reinforce", steps=10)
  config.stages.easy.families = ("attribute", "place")
  config.stages.hard = default.stage("reinforce", steps=30)
  config.stages.hard.families = FAMILIES
  for name in config.curriculum:
    config.stages[name].learning_rate = 2e-4
  config.tasks.per_step = 16
  config.rollout.max_concurrent = 128
  config.engine.num_slots = 128
  config.engine.prefill_tokens = 512
  # A micro-batch whose intermediate results stay in a CPU's caches.
  config.batch.rows = 2
  config.batch.trajectories = 12
  config.evaluation.families = FAMILIES
  config.evaluation.tasks = 150
  if arm == "main_only":
    config.policies.researcher.trainable = False
  if arm == "sub_only":
    config.policies.main.trainable = False
  if arm == "smoke":
    shrink(config)
  return config


def add_team(config: ml_collections.ConfigDict, *, source: str) -> None:
  """Adds a main agent without tools and a researcher with them."""
  main = default.role("main")
  main.calls = ("researcher",)
  main.max_turns = 6
  main.max_context = MAIN_CONTEXT
  researcher = default.role("researcher")
  researcher.tools = ("search", "visit")
  researcher.max_turns = 5
  researcher.max_calls = 0
  researcher.max_context = 256
  researcher.format_share, researcher.correct_share = 0.1, 0.4
  researcher.expert_share = 0.5
  config.team.roles.main = main
  config.team.roles.researcher = researcher
  for name in ("main", "researcher"):
    config.policies[name] = default.policy()
    config.policies[name].source = f"{source}/{name}"


def add_single_agent(config: ml_collections.ConfigDict, *, source: str) -> None:
  """Adds one agent with every tool and the main agent's context."""
  solo = default.role("solo")
  solo.tools = ("search", "visit", "calculate")
  solo.max_turns = 10
  solo.max_calls = 0
  solo.max_context = MAIN_CONTEXT
  config.team.root = "solo"
  config.team.roles.solo = solo
  config.policies.solo = default.policy()
  config.policies.solo.source = f"{source}/solo"


def shrink(config: ml_collections.ConfigDict) -> None:
  """Cuts the recipe to what shows in a minute that everything works."""
  config.stages.easy.steps = 2
  config.stages.hard.steps = 2
  config.tasks.per_step = 2
  config.rollout.per_task = 4
  config.evaluation.every = 2
  config.evaluation.tasks = 8
  config.evaluation.final_tasks = 16
  config.checkpoint.every = 2
