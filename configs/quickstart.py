r"""Quickstart: does a two-agent team learn to look things up together?

Question: 1-, 2- and 3-hop questions about the World Factbook, asked about
places no training question turns on. A main agent without tools delegates to
a researcher who searches and reads; both are 0.4M-parameter policies that
begin from shipped weights (imitation of a hasty expert, configs/warm_start.py).

    python -m experiments.train --config=configs/quickstart.py \
        --workdir=runs/quickstart

Hardware: two CPU cores. Arms, after a colon:

    co_train      both policies learn, the default
    main_only     the researcher is frozen
    sub_only      the main agent is frozen
    alternating   in the hard stage they learn in turns of five steps
    frozen        nothing learns: what two evaluations differ by
    shared        one policy plays both roles, from runs/warm_start_shared
    single_agent  one agent with all tools and the main agent's context, from
                  runs/warm_start_single
    smoke         co_train in a minute

`configs/warm_start.py:ARM` makes what `shared` and `single_agent` begin from.
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
ARMS = (
    "co_train",
    "main_only",
    "sub_only",
    "alternating",
    "frozen",
    "shared",
    "single_agent",
    "smoke",
)
TURN = 5  # steps
MAIN_CONTEXT = 192  # tokens; too few for looking up two hops oneself


def get_config(arm: str = "co_train") -> ml_collections.ConfigDict:
  """Returns the recipe of one arm."""
  if arm not in ARMS:
    raise ValueError(f"quickstart has the arms {', '.join(ARMS)}, not {arm!r}")
  config = default.get_config()
  config.name = f"quickstart:{arm}"
  if arm == "single_agent":
    add_single_agent(config, source="runs/warm_start_single/policies")
  elif arm == "shared":
    add_team(config, source="runs/warm_start_shared/policies", shared=True)
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
  # Where one policy plays both roles, a caller keeps its slot as well.
  config.engine.num_slots = 256 if arm == "shared" else 128
  config.engine.prefill_tokens = 512
  config.engine.decode_rows = 16  # two thirds of the time, on CPUs
  # A micro-batch whose intermediate results stay in a CPU's caches.
  config.batch.rows = 2
  config.batch.trajectories = 12
  config.evaluation.families = FAMILIES
  config.evaluation.tasks = 150
  _choose(config, arm)
  return config


def add_team(
    config: ml_collections.ConfigDict, *, source: str, shared: bool = False
) -> None:
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
  if shared:
    main.policy = researcher.policy = "team"
  for name in sorted({main.policy, researcher.policy}):
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


def _choose(config: ml_collections.ConfigDict, arm: str) -> None:
  """Makes of the recipe what an arm asks."""
  if arm == "main_only":
    config.policies.researcher.trainable = False
  elif arm == "sub_only":
    config.policies.main.trainable = False
  elif arm == "alternating":
    take_turns(config)
  elif arm == "frozen":
    for stage in config.stages.values():
      stage.steps = 0
    for policy in config.policies.values():
      policy.trainable = False  # else a stage that is given steps would train
  elif arm == "smoke":
    shrink(config)


def take_turns(config: ml_collections.ConfigDict) -> None:
  """Cuts the hard stage into turns in which one of the policies learns."""
  hard = config.stages.hard
  turns = []
  for number in range(hard.steps // TURN):
    name = f"hard_{number}"
    config.stages[name] = default.stage("reinforce", steps=TURN)
    config.stages[name].families = hard.families
    config.stages[name].learning_rate = hard.learning_rate
    config.stages[name].reward.update(hard.reward)
    config.stages[name].trained = ("main", "researcher")[number % 2 :][:1]
    turns.append(name)
  del config.stages["hard"]
  config.curriculum = ("easy", *turns)


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
