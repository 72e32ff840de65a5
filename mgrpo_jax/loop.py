"""The training loop: seven arrows, in order.

    tasks ─▶ rollout ─▶ rewards ─▶ alignment ─▶ advantages ─▶ update ─▶ publish

What each arrow does stands in `run.Run`; what is written down, in
`journal.Journal`.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from mgrpo_jax.agents import watchdog
from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.evaluate import Evaluation
from mgrpo_jax.journal import Entry, Journal
from mgrpo_jax.metrics import Accuracy
from mgrpo_jax.plan import Setup
from mgrpo_jax.run import Run, open_run
from mgrpo_jax.sampler import warming
from mgrpo_jax.store import Store
from mgrpo_jax.tasks import curriculum

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
    after.

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
    steps, before = await _begin(run, journal)
    while not run.over(steps):
      await _step(run, journal, steps, before=before)
      steps += 1
    journal.flush()
    run.resources.save_policies(journal.workdir.policies)
    journal.skipped(run.resources.read_published())
    after = _numbers(await run.evaluate(setup.test, "test"))
    summary = {
        "seed": setup.seed,
        "steps": steps,
        "eval": {
            "before": _overall(before).summary(),
            "after": _overall(after).summary(),
        },
        "tokens": await run.tokens(),
    }
    return summary, _table(before, after)


async def _begin(
    run: Run, journal: Journal
) -> tuple[int, dict[str, dict[str, int]]]:
  """Resumes, or measures where the team starts and publishes version 0."""
  checkpoint = journal.restore(run.resources.states)
  if checkpoint is not None:
    try:
      journal.skipped(run.resume(checkpoint.states, checkpoint.host["run"]))
    except MismatchError as error:
      raise MismatchError(
          f"checkpoint {checkpoint.step} in {journal.workdir.checkpoints}:"
          f" {error}; give another --workdir"
      ) from error
    await _warm_up(run, journal)
    return checkpoint.step + 1, checkpoint.host["before"]
  journal.skipped(run.publish(tuple(run.resources.learners), 0))
  await _warm_up(run, journal)
  before = await run.evaluate(run.setup.test, "test")
  return 0, _numbers(before)


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
    step: int,
    *,
    before: Mapping[str, Mapping[str, int]],
) -> None:
  """One step of the curriculum."""
  setup = run.setup
  started = time.monotonic()
  stage, number = curriculum.stage_at(setup.stages, step)
  run.meter.begin()
  tasks = run.take(stage)
  groups = await run.collect(stage, tasks, step)
  scores = run.grade(stage, groups)
  groups, scores = await run.resample(stage, groups, scores, step)
  credits = run.assign(stage, groups, scores, step)
  dispatched = run.update(stage, number, groups, credits)
  last = run.over(step + 1)
  journal.flush()
  trained = tuple(run.resources.learners if last else dispatched)
  journal.skipped(run.publish(trained, step + 1))
  journal.rollouts(
      step, stage.name, groups, scores, credits.advantages, run.resources.pieces
  )
  if last or (step + 1) % setup.evaluate_every == 0:
    await run.evaluate(setup.dev, "dev")
  values = run.meter.totals(time.monotonic() - started)
  journal.add(
      Entry(step=step, stage=stage.name, values=values, dispatched=dispatched)
  )
  if last or (step + 1) % setup.checkpoint_every == 0:
    journal.skipped(run.settle())  # no checkpoint is ahead of the store
    host = {"run": run.host_state(), "before": dict(before)}
    journal.save(step, run.resources.states, host)


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
