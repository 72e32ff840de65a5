"""What each arrow of the loop does.

`plan.Setup` is what a recipe decides, `resources.Resources` what that takes
while it runs. `journal.Journal` keeps the run's files.
"""

import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax import (
    credit,
    dynamic,
    evaluate,
    minibatches,
    packing,
    rewards,
    rollout,
    statistics,
)
from mgrpo_jax.agents import watchdog
from mgrpo_jax.agents.call import turn_seed
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.credit import Credits
from mgrpo_jax.evaluate import Evaluation
from mgrpo_jax.learner import Step
from mgrpo_jax.meter import Meter
from mgrpo_jax.plan import Setup
from mgrpo_jax.publisher import Publisher
from mgrpo_jax.resources import Resources, open_resources
from mgrpo_jax.rewards import Scores
from mgrpo_jax.store import Store
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.types import RolloutGroup, Task, TrainState
from mgrpo_jax.work import Work


class Run:
  """Does what each arrow does, and counts it; `open_run` makes one."""

  def __init__(self, resources: Resources) -> None:
    """Starts with nothing done.

    Args:
      resources: with the engines started.
    """
    self.setup = resources.setup
    self.resources = resources
    self.meter = Meter(resources)
    self.drawing = self.meter  # of the rollouts under way
    self._publisher = Publisher(resources)

  def over(self, steps: int) -> bool:
    """Whether no step follows here: curriculum or budget are at their end.

    Args:
      steps: that are done.
    """
    end, budget = self.setup.end, self.setup.budget
    return steps >= end or budget.spent(self.meter.work)

  def take(self, stage: Stage) -> tuple[Task, ...]:
    """Arrow 1: the next tasks, those that are to be repeated first."""
    return self.resources.queues[stage.name].take(self.setup.tasks_per_step)

  async def collect(
      self,
      stage: Stage,
      tasks: Sequence[Task],
      step: int,
      meter: Meter | None = None,
      again: int = 0,
  ) -> list[RolloutGroup]:
    """Arrow 2: K rollouts a task, or a demonstration each.

    Args:
      stage: of the step.
      tasks: of the step.
      step: its number.
      meter: of the rollouts, where another step is being trained on.
      again: which draw of the step this is, from 0; each has its own seeds.

    Returns:
      The groups; those that could not be demonstrated are missing.
    """
    self.drawing = meter = meter or self.meter
    draw = ("again", again) if again else ()
    seed = turn_seed(self.setup.seed, "step", step, *draw)
    counters = self.resources.training.counters
    events = dict(counters)
    with meter.timed("rollout"):
      if stage.objective == "imitate":
        demonstrate = self.setup.demonstrate[stage.name]
        played = [await demonstrate(task, seed) for task in tasks]
        groups = [group for group in played if group is not None]
        meter.work.lost += len(played) - len(groups)
      else:
        groups, sampled = await self._rolled_out(stage, tasks, step, seed)
        meter.work.generated_tokens += sampled
    meter.count_rollouts(groups)
    meter.count_events(counters, events)
    return groups

  def grade(self, stage: Stage, groups: Sequence[RolloutGroup]) -> list[Scores]:
    """Arrow 3: rewards; tasks that a machine failed on are asked again."""
    scores = self._graded(stage, groups)
    for role in self._reported(self.setup.team_in(stage)):
      self.meter.values |= statistics.of_role(groups, scores, role.name)
    return scores

  async def resample(
      self,
      stage: Stage,
      groups: Sequence[RolloutGroup],
      scores: Sequence[Scores],
      step: int,
  ) -> tuple[list[RolloutGroup], list[Scores]]:
    """Arrows 1 to 3 again, for groups that teach nothing.

    What is measured of rollouts and grades stays that of the first draw.
    """
    if stage.objective == "imitate" or not self.setup.resample:
      return list(groups), list(scores)

    async def draw(count: int, number: int) -> dynamic.Graded:
      tasks = self.resources.queues[stage.name].take(count)
      more = await self.collect(stage, tasks, step, again=number)
      return more, self._graded(stage, more)

    graded, replaced = await dynamic.resample(
        groups,
        scores,
        compare=functools.partial(self._compared, stage, step=step),
        rounds=self.setup.resample,
        draw=draw,
    )
    self.meter.values["replaced"] = float(replaced)
    return graded

  def _reported(self, team: Team) -> Sequence[Role]:
    """The roles of a team whose calls can be told of here."""
    return team.roles

  def _graded(
      self, stage: Stage, groups: Sequence[RolloutGroup]
  ) -> list[Scores]:
    """Rewards of groups; settles their tasks, or puts them back."""
    queue = self.resources.queues[stage.name]
    scores, stale = [], 0
    with self.meter.timed("reward"):
      found = zip(groups, self._scored(stage, groups), strict=True)
      for group, graded in found:
        old = self._publisher.outgrew(stage, group)
        stale += old
        if np.all(graded.weight > 0) and not old:
          queue.settle(group.task.id)
          scores.append(graded)
          continue
        if queue.put_back(group.task.id):
          self.meter.work.retried += 1
        else:
          self.meter.work.abandoned += 1
        scores.append(graded.uncounted())
    self.meter.values["stale"] = self.meter.values.get("stale", 0.0) + stale
    return scores

  def _scored(
      self, stage: Stage, groups: Sequence[RolloutGroup]
  ) -> list[Scores]:
    """Rewards; those of a group that is not whole count nothing."""
    method = self.setup.method
    found = (
        rewards.score(one, weights=method.rewards_of(stage), rules=method.rules)
        for one in groups
    )
    return [one if np.all(one.weight > 0) else one.uncounted() for one in found]

  def assign(
      self,
      stage: Stage,
      groups: Sequence[RolloutGroup],
      scores: Sequence[Scores],
      step: int,
  ) -> Credits:
    """Arrows 4 and 5: alignment, then advantages, role by role."""
    if stage.objective == "imitate":
      with self.meter.timed("align"):
        team = self.setup.team_in(stage)
        return credit.copied(groups, scores, team)
    credits = self._compared(stage, groups, scores, step)
    method, found = self.setup.method, credits.assignments
    self.meter.values |= statistics.of_credits(
        credits, method.comparison, self._publisher.numbers
    ) | statistics.of_shares(
        groups, scores, found, method.rewards_of(stage), method.comparison
    )
    return credits

  def update(
      self,
      stage: Stage,
      number: int,
      groups: Sequence[RolloutGroup],
      credits: Credits,
  ) -> dict[str, Step]:
    """Arrow 6: dispatches the updates of every policy that learns."""
    method = self.setup.method
    objective = method.objective(stage)
    dispatched = {}
    trained = stage.trained & self.resources.learners.keys()
    for policy in sorted(trained & credits.by_policy.keys()):
      learner = self.resources.learners[policy]
      batches = [
          (
              learner.pack(
                  minibatches.with_gradient(part, objective), objective
              ),
              packing.count(part),
          )
          for part in minibatches.split(
              credits.by_policy[policy], groups, method.minibatches
          )
      ]
      dispatched[policy] = learner.step(
          batches,
          objective=objective,
          learning_rates=method.learning_rates(stage, number),
      )
      self.meter.work.trained_tokens += dispatched[policy].tokens
      if method.moves_reference(number):
        learner.move_reference()
    return dispatched

  def publish(self, policies: Sequence[str], version: int) -> list[str]:
    """Arrow 7: a version for the next rollout and, when due, for the store.

    Args:
      policies: whose weights are new.
      version: how many steps they have behind them.

    Returns:
      What was found damaged in the store and not told before, a line each.
    """
    with self.meter.timed("publish"):
      last = self.over(version)
      problems = self._publisher.publish(policies, version, last=last)
    for policy in policies:
      self.meter.values[f"version/{policy}"] = float(version)
    return problems

  def settle(self) -> list[str]:
    """Waits until published versions are in the store: a checkpoint follows.

    Returns:
      What was found damaged there and not told before, a line each.
    """
    with self.meter.timed("publish"):
      return self._publisher.settle()

  async def evaluate(
      self, tasks: Sequence[Task], split: str, done: int
  ) -> Evaluation:
    """Asks the team after so many steps; greedily, unless configured."""
    with self.meter.timed("evaluate"):
      result, sampled = await self._examined(tasks, split, done)
    self.meter.work.evaluation_tokens += sampled
    self.meter.values |= result.metrics(split)
    return result

  async def tokens(self) -> dict[str, int]:
    """What the team has spent so far, as `summary.json` says it."""
    return self.meter.work.tokens()

  def host_state(self) -> dict[str, Any]:
    """What a checkpoint keeps beside the arrays, as JSON."""
    return {
        **self.resources.get_state(),
        "versions": self._publisher.versions,
        "recent": self._publisher.recent(),
        "work": dataclasses.asdict(self.meter.work),
    }

  def resume(
      self, states: Mapping[str, TrainState], host: Mapping[str, Any]
  ) -> list[str]:
    """Continues from a checkpoint.

    Args:
      states: by policy.
      host: what `host_state` returned.

    Returns:
      What was found damaged in the store, a line each.

    Raises:
      MismatchError: the checkpoint is another run's.
    """
    problems: list[str] = []
    self.resources.set_state(host)
    self.meter.work = Work(**host["work"])
    self._publisher.numbers |= host.get("recent", {})
    for name, state in states.items():
      self.resources.learners[name].take(state)
      problems += self.publish((name,), host["versions"][name])
    return problems

  async def _rolled_out(
      self, stage: Stage, tasks: Sequence[Task], step: int, seed: int
  ) -> tuple[list[RolloutGroup], int]:
    """The rollouts of a step, and the tokens that were sampled for them."""
    del step
    before = self.resources.sampled()
    groups = await self._roll_out(stage, tasks, seed)
    return groups, self.resources.sampled() - before

  async def _examined(
      self, tasks: Sequence[Task], split: str, done: int
  ) -> tuple[Evaluation, int]:
    """An evaluation, and the tokens that were sampled for it."""
    del split
    before = self.resources.sampled()
    work = evaluate.evaluate(
        tasks,
        environment=self.resources.testing_of(self.setup.team_after(done)),
        rules=self.setup.method.rules,
        seed=self.setup.seed,
        max_concurrent=self.setup.sampler.max_concurrent,
    )
    result = await watchdog.all_within(
        self.setup.sampler.deadline, work, activity=self.resources.activity
    )
    return result, self.resources.sampled() - before

  async def _roll_out(
      self, stage: Stage, tasks: Sequence[Task], seed: int
  ) -> list[RolloutGroup]:
    """Executes the team K times on every task, or a few times more."""
    sampler, kept = self.setup.sampler, self.setup.rollouts_per_task
    per_task = kept + sampler.spares.count
    work = rollout.run_groups(
        tasks,
        environment=self.resources.training_of(self.setup.team_in(stage)),
        num_rollouts=kept,
        seed=seed,
        max_concurrent=max(1, sampler.max_concurrent // per_task),
        spares=sampler.spares,
    )
    return await watchdog.all_within(
        sampler.deadline, work, activity=self.resources.activity
    )

  def _compared(
      self,
      stage: Stage,
      groups: Sequence[RolloutGroup],
      scores: Sequence[Scores],
      step: int,
  ) -> Credits:
    """Aligns and compares the calls of every role whose policy learns."""
    method, seed = self.setup.method, self.setup.seed
    team = self.setup.team_in(stage)
    with self.meter.timed("align"):
      return credit.compared(
          groups,
          scores,
          team=team,
          trained=stage.trained & self.resources.learners.keys(),
          align=method.align,
          comparison=method.comparison,
          num_slots=method.num_slots,
          seeds={
              role.name: turn_seed(seed, "align", step, position) % 2**32
              for position, role in enumerate(team.roles)
          },
      )


@contextlib.asynccontextmanager
async def open_run(setup: Setup, store: Store) -> AsyncIterator[Run]:
  """Starts the engines of a run, and stops them.

  Args:
    setup: the recipe.
    store: where weights are published.

  Yields:
    The run.
  """
  async with open_resources(setup, store) as resources:
    yield Run(resources)
