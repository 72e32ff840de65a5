"""The training loop: seven arrows, in order.

    tasks ─▶ rollout ─▶ rewards ─▶ alignment ─▶ advantages ─▶ update ─▶ publish

What each arrow does stands in `run.Run`; what is written down, in
`journal.Journal`; how far rollouts run ahead of training, in `ahead.Ahead`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import jax

from mgrpo_jax import ahead
from mgrpo_jax.agents import watchdog
from mgrpo_jax.ahead import Ahead
from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.evaluate import Evaluation
from mgrpo_jax.journal import Entry, Journal
from mgrpo_jax.learner import Step
from mgrpo_jax.meter import Meter
from mgrpo_jax.metrics import Accuracy
from mgrpo_jax.plan import Setup
from mgrpo_jax.rewards import Scores
from mgrpo_jax.run import Run, open_run
from mgrpo_jax.sampler import warming
from mgrpo_jax.store import Store
from mgrpo_jax.tasks import curriculum
from mgrpo_jax.types import RolloutGroup, Task

Drawn = tuple[list[RolloutGroup], Meter]

_COMPILING = 3600.0  # seconds that what samples may take to be compiled


async def train(
    setup: Setup,
    store: Store,
    journal: Journal,
    *,
    opened: Callable[
        [Setup, Store], AbstractAsyncContextManager[Run]
    ] = open_run,
) -> tuple[dict[str, Any], dict[str, tuple[Accuracy, Accuracy]]]:
  """Trains a team from where its run directory stands to the end.

  Args:
    setup: the recipe.
    store: where weights are published.
    journal: of the run directory, entered.
    opened: what does the arrows: all in this process, or this job's part of
      them, see `decoupled.run`.

  Returns:
    What `summary.json` says of tokens and accuracy, and the table before and
    after; a job that leaves before the others knows of none after.

  Raises:
    MismatchError: the directory's checkpoint is another run's.
    NonFiniteError: a loss was not finite.
    NoVersionError: no good version of a policy is left in the store.
    StorageError: something could not be written.
    StuckError: rollouts took longer than `Sampler.deadline`.
    TimeoutError: compiling what samples did.
    ValueError: a size, name or budget of the recipe is impossible.
  """
  async with (
      opened(setup, store) as run,
      watchdog.watch(
          run.resources.activity,
          seconds=setup.sampler.watchdog,
          tell=journal.progress.note,
      ),
  ):
    async with _ahead(run) as rollouts:
      steps, before = await _begin(run, journal, rollouts)
      while not run.over(steps):
        rollouts.begin(steps)
        await _step(run, journal, rollouts, steps, before=before)
        steps = setup.coming(steps + 1)
    journal.flush()
    run.resources.save_policies(journal.workdir.policies)
    journal.skipped(run.resources.read_published())
    found = {"before": before}
    if not setup.leaves:  # else others go on, and have the last word
      after = await run.evaluate(setup.test, "test", steps)
      found["after"] = _numbers(after)
    summary = {
        "seed": setup.seed,
        "steps": steps,
        "eval": {when: _overall(one).summary() for when, one in found.items()},
        "tokens": await run.tokens(),
    }
    return summary, _table(**found) if "after" in found else {}


def _ahead(run: Run) -> Ahead[Drawn]:
  """Rolls steps out as far ahead of training as the recipe allows."""
  setup = run.setup
  if setup.max_staleness and setup.resample:
    raise ValueError(
        f"resample: is {setup.resample}, must be 0 where max_staleness is not"
    )

  def stage(step: int) -> curriculum.Stage:
    return curriculum.stage_at(setup.stages, step)[0]

  def furthest(done: int) -> int:
    return ahead.furthest(
        done,
        max_staleness=setup.max_staleness,
        evaluate_every=setup.evaluate_every,
        total=next(span.stop for span in setup.spans if done < span.stop),
    )

  async def draw(step: int, tasks: tuple[Task, ...]) -> Drawn:
    meter = Meter(run.resources)
    return await run.collect(stage(step), tasks, step, meter), meter

  return Ahead(
      draw,
      take=lambda step: run.take(stage(step)),
      furthest=furthest,
  )


async def _begin(
    run: Run, journal: Journal, rollouts: Ahead[Drawn]
) -> tuple[int, dict[str, dict[str, int]]]:
  """Resumes, or measures where the team starts and publishes version 0."""
  checkpoint, setup = journal.restore(run.resources.states), run.setup
  if checkpoint is not None:
    steps, host = setup.coming(checkpoint.step + 1), checkpoint.host
    try:
      journal.skipped(run.resume(checkpoint.states, host["run"]))
    except MismatchError as error:
      raise MismatchError(
          f"checkpoint {checkpoint.step} in {journal.workdir.checkpoints}:"
          f" {error}; give another --workdir"
      ) from error
    await _warm_up(run, journal)
    begun = host.get("ahead", [])  # of runs before there was any: none
    rollouts.set_state(steps, begun, setup.stages, setup.tasks)
    return steps, host["before"]
  journal.skipped(run.publish(tuple(run.resources.learners), 0))
  await _warm_up(run, journal)
  before = await run.evaluate(setup.test, "test", 0)
  return setup.coming(0), _numbers(before)


async def _warm_up(run: Run, journal: Journal) -> None:
  """Compiles what samples, so that no deadline of a turn counts it."""
  await warming.warm_up(
      run.resources.own_engines(),
      deadline=_COMPILING,
      tell=journal.progress.note,
  )


async def _step(
    run: Run,
    journal: Journal,
    rollouts: Ahead[Drawn],
    step: int,
    *,
    before: Mapping[str, Mapping[str, int]],
) -> None:
  """One step of the curriculum."""
  setup = run.setup
  started = time.monotonic()
  stage, _ = curriculum.stage_at(setup.stages, step)
  run.meter.begin()
  with run.meter.timed("wait"):
    groups, meter = await rollouts.collect(step)
  run.meter.add(meter)
  scores = run.grade(stage, groups)
  groups, scores = await run.resample(stage, groups, scores, step)
  aside = ahead.beside if setup.max_staleness else ahead.inline
  dispatched = await aside(
      functools.partial(_learn, run, journal, step, groups, scores)
  )
  last = run.over(step + 1)
  if last:
    await rollouts.close()
  if (last and not setup.leaves) or (step + 1) % setup.evaluate_every == 0:
    await run.evaluate(setup.dev, "dev", step + 1)
  values = run.meter.totals(time.monotonic() - started)
  entry = Entry(
      step=step, stage=stage.name, values=values, dispatched=dispatched
  )
  host = {"before": dict(before), "ahead": rollouts.get_state()}
  await aside(functools.partial(_write, run, journal, entry, host, last=last))


def _learn(
    run: Run,
    journal: Journal,
    step: int,
    groups: list[RolloutGroup],
    scores: list[Scores],
) -> dict[str, Step]:
  """Arrows 4 to 7."""
  setup = run.setup
  stage, number = curriculum.stage_at(setup.stages, step)
  credits = run.assign(stage, groups, scores, step)
  with run.meter.timed("update"):
    dispatched = run.update(stage, number, groups, credits)
    if setup.max_staleness:  # what samples meanwhile does not wait for it
      jax.block_until_ready([one.applied for one in dispatched.values()])
  last = run.over(step + 1)
  journal.flush()
  trained = tuple(run.resources.learners if last else dispatched)
  journal.skipped(run.publish(trained, step + 1))
  pieces = functools.partial(run.resources.pieces, team=setup.team_in(stage))
  journal.rollouts(step, stage.name, groups, scores, credits.advantages, pieces)
  return dispatched


def _write(
    run: Run,
    journal: Journal,
    entry: Entry,
    host: Mapping[str, Any],
    *,
    last: bool,
) -> None:
  """Writes a step down, and a checkpoint when that is due."""
  journal.add(entry)
  if last or (entry.step + 1) % run.setup.checkpoint_every == 0:
    journal.skipped(run.settle())  # no checkpoint is ahead of the store
    state = {"run": run.host_state(), **host}
    journal.save(entry.step, run.resources.states, state)


def _numbers(evaluation: Evaluation) -> dict[str, dict[str, int]]:
  """What was counted for each family of questions, as JSON."""
  return {
      family: dataclasses.asdict(accuracy)
      for family, accuracy in evaluation.by_family.items()
  }


def _overall(numbers: Mapping[str, Mapping[str, int]]) -> Accuracy:
  """The accuracy over all families."""
  names = [field.name for field in dataclasses.fields(Accuracy)]
  return Accuracy(
      **{name: sum(part[name] for part in numbers.values()) for name in names}
  )


def _table(
    before: Mapping[str, Mapping[str, int]],
    after: Mapping[str, Mapping[str, int]],
) -> dict[str, tuple[Accuracy, Accuracy]]:
  """Before and after: all questions first, then by family."""
  rows = {"all": (_overall(before), _overall(after))}
  for family in sorted(before):
    rows[family] = (Accuracy(**before[family]), Accuracy(**after[family]))
  return rows
