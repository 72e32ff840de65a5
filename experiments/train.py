r"""Trains a team, or continues where its run directory stands.

    python -m experiments.train --config=configs/quickstart.py \
        --workdir=runs/quickstart [--config.key=value]

Any key of configs/default.py can be set. A run that was interrupted goes on
when the same command is given again.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import sys
import time
import typing
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import cli

with cli.user_errors(ModuleNotFoundError):
  from ml_collections import config_flags

if typing.TYPE_CHECKING:
  from mgrpo_jax.journal import Journal
  from mgrpo_jax.plan import Setup
  from mgrpo_jax.store import Store

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "recipe, such as configs/quickstart.py"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "directory of the run; made, or resumed"
)


def main() -> None:
  """Trains; see the module."""
  started = time.monotonic()
  with contextlib.ExitStack() as stack:
    with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
      from experiments import recipe
      from mgrpo_jax import (
          atomic,
          journal,
          metrics,
          ownership,
          publish,
          workdir,
      )
      from mgrpo_jax.agents.watchdog import StuckError
      from mgrpo_jax.sampler.interface import EngineError
      from mgrpo_jax.tasks import curriculum

      cli.need("matplotlib")  # which only the report imports, at the very end
      compiled = stack.enter_context(metrics.count_compilations())
      config = cli.config_of(_CONFIG)
      recipe.check(config)
      values = recipe.plain(config)
      workdir.check(_WORKDIR.value, values)
      directory = workdir.Workdir(pathlib.Path(_WORKDIR.value))
      store = recipe.open_store(config, directory)
      ownership.check(store, directory.read_id())
      setup = recipe.build(config)
    failures = (
        OSError,
        atomic.MismatchError,
        journal.NonFiniteError,
        ownership.TakenError,
        publish.NoVersionError,
        EngineError,
        StuckError,
    )
    with (
        cli.user_errors(*failures),  # closing may fail as well
        workdir.hold(directory.path, values),
    ):
      ownership.claim(store, directory.read_id(), values)
      with journal.Journal(
          directory,
          total_steps=curriculum.num_steps(setup.stages),
          limits=setup.budget.limits(),
          keep_checkpoints=setup.keep_checkpoints,
          stream=sys.stderr,
          started=started,
          compiled=compiled,
      ) as kept:
        _train(setup, store, kept, values)


def _train(
    setup: Setup, store: Store, journal: Journal, values: Mapping[str, Any]
) -> None:
  """Runs the loop, writes the report and says what came out."""
  from mgrpo_jax import loop
  from mgrpo_jax.report import page
  from mgrpo_jax.report.progress import comparison

  outcome, table = asyncio.run(loop.train(setup, store, journal))
  journal.progress.close()
  summary = journal.summarise({"config": values} | outcome)
  report = page.write(journal.workdir.path)
  cli.say(comparison(table))
  cli.say(
      f"{summary['steps']} steps in {summary['seconds']:.0f} s,"
      f" {summary['compilations']} compilations,"
      f" {summary['peak_rss_bytes'] / 2**30:.1f} GiB of memory"
  )
  cli.say(f"report: {report.page}")


if __name__ == "__main__":
  cli.run(main, required=("config", "workdir"))
