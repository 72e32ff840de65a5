"""What a recipe decides about a run: functions, numbers, tasks, policies."""

import dataclasses
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from mgrpo_jax import credit, objectives, optim
from mgrpo_jax.agents.actor import Actor
from mgrpo_jax.agents.team import Team
from mgrpo_jax.agents.tools import Tool
from mgrpo_jax.comparison import Comparison
from mgrpo_jax.packing import BatchShape
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.rewards import RewardWeights, Rules
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sampler.interface import PooledEngine, RolloutEngine
from mgrpo_jax.sharding import Meshes
from mgrpo_jax.spares import Spares
from mgrpo_jax.store import Store
from mgrpo_jax.tasks import curriculum
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.types import Reference, RolloutGroup, Task
from mgrpo_jax.work import Budget

Demonstrate = Callable[[Task, int], Coroutine[Any, Any, RolloutGroup | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """The algorithm's choices: functions and numbers.

  Attributes:
    rules: how calls are graded.
    reward_weights: what the components count, by role.
    align: one of `alignment`'s strategies.
    num_slots: D of every role but the root, which has 1.
    comparison: what rewards are compared with.
    policy_loss: minimised in stages that reinforce.
    imitation_loss: minimised in stages that imitate.
    minibatches: updates that a step's tasks are split into.
    shape: of a micro-batch.
    optimizer: how gradients become updates.
    warmup_steps: updates of linear warm-up in every stage.
    reference_every: steps of a stage after which the KL term's reference moves
      to the policy; 0 leaves it where the run began.
    stage_rewards: by name of stage and role, the weights of roles whose rewards
      count otherwise there.
  """

  rules: Rules
  reward_weights: Mapping[str, RewardWeights]
  align: credit.Align
  num_slots: int
  comparison: Comparison
  policy_loss: objectives.PolicyLoss
  imitation_loss: objectives.ImitationLoss
  minibatches: int
  shape: BatchShape
  optimizer: optim.AdamW
  warmup_steps: int
  reference_every: int
  stage_rewards: Mapping[str, Mapping[str, RewardWeights]]

  @property
  def reference(self) -> Reference:
    """What policies are compared with."""
    if self.policy_loss.kl is None:
      return "none"
    return "moving" if self.reference_every else "first"

  def moves_reference(self, number: int) -> bool:
    """Whether the reference moves to the policy after a stage's step.

    Args:
      number: of the step within the stage, from 0.

    Returns:
      True after every `reference_every` steps, where there is a reference.
    """
    every = self.reference_every
    return self.reference == "moving" and (number + 1) % every == 0

  def rewards_of(self, stage: Stage) -> Mapping[str, RewardWeights]:
    """What the components of a reward count in a stage.

    Args:
      stage: that the calls are made in.

    Returns:
      The weights by role: the stage's own, else the run's.
    """
    return {**self.reward_weights, **self.stage_rewards.get(stage.name, {})}

  def objective(self, stage: Stage) -> objectives.Objective:
    """What a stage minimises.

    Args:
      stage: of the step.

    Returns:
      The loss of imitation or of reinforcement, as the stage says.
    """
    imitates = stage.objective == "imitate"
    return self.imitation_loss if imitates else self.policy_loss

  def learning_rates(self, stage: Stage, number: int) -> list[float]:
    """The rates of the updates of a stage's step.

    Args:
      stage: of the step.
      number: of the step within it, from 0.

    Returns:
      A rate for each minibatch.
    """
    parts = self.minibatches
    schedule = optim.Schedule(
        peak=stage.learning_rate,
        warmup_steps=self.warmup_steps,
        decay_steps=max(stage.steps * parts - self.warmup_steps, 0),
        final_fraction=stage.final_fraction,
    )
    return [
        optim.learning_rate(schedule, number * parts + part)
        for part in range(parts)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """How rollouts are sampled.

  Attributes:
    engine: keyword arguments of every `Engine`.
    temperature: of training rollouts, > 0.
    evaluation_temperature: of evaluations; 0 is greedy.
    turn_deadline: seconds a turn may take.
    max_attempts: how often a failing call is made in all.
    max_concurrent: rollouts in progress at the same time.
    watchdog: seconds after which a call to which nothing happens is named.
    deadline: seconds that a step's rollouts, or an evaluation's, may take.
    spares: rollouts of a task that are begun beyond its K.
  """

  engine: Mapping[str, Any]
  temperature: float
  evaluation_temperature: float
  turn_deadline: float
  max_attempts: int
  max_concurrent: int
  watchdog: float
  deadline: float
  spares: Spares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation:
  """A policy of which only an adapter is trained.

  Attributes:
    lora: the adapter's kind.
    base: name or directory of the model it adapts, for who loads it.
  """

  lora: LoRA
  base: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """Everything a recipe decides about a run.

  Attributes:
    seed: of task order, sampling and alignment, in [0, 2**32).
    stages: the curriculum.
    budget: tokens that end the run before the curriculum does.
    tasks: training tasks by name of stage.
    dev: questions for the looks during training.
    test: questions before and after training.
    tasks_per_step: B.
    resample: how often new groups are drawn for those that teach nothing.
    max_retries: how often in a row a task is asked again, because a machine
      failed on it or it was too old.
    max_staleness: steps that rollouts may be ahead of training, and updates
      that a policy may be ahead of what it trains on; with 0 all is in step.
    rollouts_per_task: K.
    team: the roles.
    policies: by name, with the weights to begin with.
    adaptations: by policy; of those without one, all weights are trained.
    meshes: where each policy lives, by name.
    external: by policy that a server samples, makes its engine from its weights
      at the start; the others are sampled by an `Engine` here.
    actor: makes the actor of a policy from its engine.
    coded: actors of symbolic policies, which have neither weights nor engine.
    tools: by name.
    demonstrate: by name of stage, plays the scripted expert on a task, with a
      seed; None where it cannot do the task.
    method: the algorithm.
    sampler: how rollouts are sampled.
    evaluate_every: steps between looks at `dev`.
    checkpoint_every: steps between checkpoints.
    keep_checkpoints: how many stay on disk.
    publish_every: steps between published versions.
    keep_versions: how many stay in the store.
    publish_short: whether they are rounded to bfloat16.
    whole_every: of how many one is whole, the others differences to it.
    elsewhere: policies that other jobs sample and train; of these, `policies`
      has the tokenizer and sizes, and no weights.
    pooled: makes of a policy's engine one that has replicas, which are found in
      the store; None where there are none.
    casts: by name of stage, the team where it is not `team`: other policies
      play some of its roles, or some are not there.
  """

  seed: int
  stages: tuple[Stage, ...]
  budget: Budget
  tasks: Mapping[str, tuple[Task, ...]]
  dev: tuple[Task, ...]
  test: tuple[Task, ...]
  tasks_per_step: int
  resample: int
  max_retries: int
  max_staleness: int
  rollouts_per_task: int
  team: Team
  policies: Mapping[str, Policy]
  adaptations: Mapping[str, Adaptation]
  meshes: Mapping[str, Meshes]
  external: Mapping[str, Callable[[Policy], RolloutEngine]]
  actor: Callable[[str, RolloutEngine], Actor]
  coded: Mapping[str, Actor]
  tools: Mapping[str, Tool]
  demonstrate: Mapping[str, Demonstrate]
  method: Method
  sampler: Sampler
  evaluate_every: int
  checkpoint_every: int
  keep_checkpoints: int
  publish_every: int
  keep_versions: int
  publish_short: bool
  whole_every: int
  elsewhere: frozenset[str] = frozenset()
  pooled: Callable[[str, Engine, Store], PooledEngine] | None = None
  casts: Mapping[str, Team] = dataclasses.field(default_factory=dict)

  @property
  def own(self) -> tuple[str, ...]:
    """The policies that are sampled and trained here."""
    return tuple(n for n in self.policies if n not in self.elsewhere)

  @property
  def teams(self) -> tuple[Team, ...]:
    """Every team there is in the run, each once."""
    made = (self.team_in(stage) for stage in self.stages)
    return tuple(dict.fromkeys((self.team, *made)))

  def team_in(self, stage: Stage) -> Team:
    """The team of a stage.

    Args:
      stage: of the curriculum.

    Returns:
      The roles that are there, with the policies that play them.
    """
    return self.casts.get(stage.name, self.team)

  def team_at(self, step: int) -> Team:
    """The team of a step.

    Args:
      step: its number; below 0 the first one's, behind the end the last one's.

    Returns:
      The team of the step's stage; `team` where there are no steps at all.
    """
    last = curriculum.num_steps(self.stages) - 1
    if last < 0:
      return self.team
    stage, _ = curriculum.stage_at(self.stages, min(max(step, 0), last))
    return self.team_in(stage)

  def team_after(self, done: int) -> Team:
    """The team that is asked held-out questions.

    Args:
      done: steps that it has behind it.

    Returns:
      That of the last of these steps; of the first step where there is none.
    """
    return self.team_at(done - 1)

  def played(self, policies: Collection[str]) -> tuple[range, ...]:
    """The steps that policies take part in.

    Args:
      policies: their names.

    Returns:
      The steps of the stages in which one of them plays, in order.
    """
    return curriculum.spans(
        self.stages,
        lambda stage: not {*policies}.isdisjoint(self.team_in(stage).policies),
    )

  @property
  def spans(self) -> tuple[range, ...]:
    """The steps that are made here: all, or those of this job's policy."""
    if self.elsewhere:
      return self.played(self.own)
    return curriculum.spans(self.stages, lambda stage: True)

  @property
  def end(self) -> int:
    """The number of steps after which nothing is left to do here."""
    return self.spans[-1].stop if self.spans else 0

  @property
  def leaves(self) -> bool:
    """Whether others go on when this process has made its last step."""
    return self.end < curriculum.num_steps(self.stages)

  def coming(self, steps: int) -> int:
    """The first step from one on that is made here.

    Args:
      steps: its number.

    Returns:
      The number of a step; `steps` where none is left.
    """
    left = (span for span in self.spans if steps < span.stop)
    return next((max(steps, span.start) for span in left), steps)
