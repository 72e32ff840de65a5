r"""Scores a run's published weights on held-out questions again.

    python -m experiments.evaluate --workdir=runs/quickstart [--split=test]
        [--tasks=FILE.jsonl] [--version=NUMBER] [--temperature=1.0]

A file of tasks holds one a line (mgrpo_jax/tasks/benchmarks.py), at least
{"id": "1", "question": "…", "answers": ["…"]}; the team's tools search what
they searched in training.
The weights are read from the run's bucket, which keeps the last few versions
(config.publish.keep), and checked against their digests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import typing
from collections.abc import Sequence

from absl import flags

from experiments import cli

if typing.TYPE_CHECKING:
  from mgrpo_jax.evaluate import Evaluation
  from mgrpo_jax.plan import Setup
  from mgrpo_jax.store import Store
  from mgrpo_jax.types import Task

_SPLITS = ("test", "dev")
_WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run.")
_SPLIT = flags.DEFINE_enum("split", "test", _SPLITS, "Which questions.")
_TASKS = flags.DEFINE_string(
    "tasks", "", "Questions of your own, in place of a split: a JSONL file."
)
_VERSION = flags.DEFINE_integer(
    "version", None, "Of the weights; the newest if not given."
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Of sampling, >= 0; the run's own if not given."
)


def main() -> None:
  """Evaluates; see the module."""
  with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
    from experiments import recipe
    from mgrpo_jax import ownership, publish, workdir
    from mgrpo_jax.agents.watchdog import StuckError
    from mgrpo_jax.report.progress import accuracies
    from mgrpo_jax.sampler.interface import EngineError
    from mgrpo_jax.tasks import benchmarks

    if _TASKS.value and flags.FLAGS["split"].present:
      raise ValueError("--split goes without --tasks only")
    own = benchmarks.read_jsonl(_TASKS.value) if _TASKS.value else None
    directory = workdir.Workdir(pathlib.Path(_WORKDIR.value))
    config = recipe.restore(directory.read_config())
    recipe.check(config)
    store = recipe.open_store(config, directory)
    ownership.check(store, directory.read_id())
    if _TEMPERATURE.value is not None:
      config.evaluation.temperature = _TEMPERATURE.value
    setup = recipe.build(config)
  failures = (
      ValueError,
      OSError,
      publish.NoVersionError,
      EngineError,
      StuckError,
  )
  with cli.user_errors(*failures):
    evaluation = asyncio.run(_evaluate(setup, store, own))
  cli.say(accuracies(evaluation.overall, evaluation.by_family))
  cli.say(json.dumps(evaluation.overall.summary()))


async def _evaluate(
    setup: Setup, store: Store, own: Sequence[Task] | None
) -> Evaluation:
  """Reads the weights and asks the questions, of a split where none are own."""
  from mgrpo_jax.run import open_run

  # Whoever samples the policies while they train, here this process does.
  here = dataclasses.replace(setup, external={})
  async with open_run(here, store) as run:
    for problem in run.resources.read_published(
        "latest" if _VERSION.value is None else _VERSION.value
    ):
      cli.say(f"skipped {problem}")
    cli.say(f"weights: after step {run.resources.newest}, of {store.url}")
    held_out = setup.test if _SPLIT.value == "test" else setup.dev
    questions = held_out if own is None else own
    return await run.evaluate(questions, _SPLIT.value, run.resources.newest)


if __name__ == "__main__":
  cli.run(main, required=("workdir",))
