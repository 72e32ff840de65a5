r"""Scores a run's published weights on held-out questions again.

    python -m experiments.evaluate --workdir=runs/quickstart [--split=test]
        [--version=NUMBER] [--temperature=1.0]

The weights are read from the run's bucket, which keeps the last few versions
(config.publish.keep), and checked against their digests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import typing

from absl import flags

from experiments import cli

if typing.TYPE_CHECKING:
  from mgrpo_jax.evaluate import Evaluation
  from mgrpo_jax.plan import Setup
  from mgrpo_jax.store import Store

_SPLITS = ("test", "dev")
_WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run.")
_SPLIT = flags.DEFINE_enum("split", "test", _SPLITS, "Which questions.")
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
    evaluation = asyncio.run(_evaluate(setup, store))
  cli.say(accuracies(evaluation.overall, evaluation.by_family))
  cli.say(json.dumps(evaluation.overall.summary()))


async def _evaluate(setup: Setup, store: Store) -> Evaluation:
  """Reads the weights and asks the questions."""
  from mgrpo_jax.run import open_run

  # Whoever samples the policies while they train, here this process does.
  own = dataclasses.replace(setup, external={})
  async with open_run(own, store) as run:
    for problem in run.resources.read_published(
        "latest" if _VERSION.value is None else _VERSION.value
    ):
      cli.say(f"skipped {problem}")
    questions = setup.test if _SPLIT.value == "test" else setup.dev
    return await run.evaluate(questions, _SPLIT.value)


if __name__ == "__main__":
  cli.run(main, required=("workdir",))
