r"""Trains a team, or continues where its run directory stands.

python -m experiments.train --config=configs/quickstart.py \
        --workdir=runs/quickstart [--config.key=value]
"""

import asyncio
import contextlib
import sys

from absl import flags
from ml_collections import config_flags

from experiments import cli

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, such as configs/quickstart.py."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; made, or resumed."
)


def main() -> None:
  """Trains; see the module."""
  from experiments import recipe
  from mgrpo_jax import atomic, workdir
  from mgrpo_jax.journal import Journal, NonFiniteError
  from mgrpo_jax.tasks import curriculum

  config = _CONFIG.value
  with contextlib.ExitStack() as stack:
    with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
      recipe.check(config)
      values = recipe.plain(config)
      directory = stack.enter_context(workdir.hold(_WORKDIR.value, values))
      journal = stack.enter_context(
          Journal(
              directory,
              total_steps=curriculum.num_steps(recipe.build_stages(config)),
              keep_checkpoints=config.checkpoint.keep,
              stream=sys.stderr,
          )
      )
      setup = recipe.build(config)
      store = recipe.open_store(config, directory)
    with cli.user_errors(atomic.StorageError, NonFiniteError):
      _train(setup, store, journal, values)


def _train(setup, store, journal, values) -> None:
  """Runs the loop and says what came out."""
  from mgrpo_jax import loop
  from mgrpo_jax.report.progress import comparison

  outcome, table = asyncio.run(loop.train(setup, store, journal))
  journal.progress.close()
  summary = journal.summarise({"config": values} | outcome)
  print(comparison(table))
  print(
      f"{summary['steps']} steps in {summary['seconds']:.0f} s,"
      f" {summary['compilations']} compilations,"
      f" {summary['peak_rss_bytes'] / 2**30:.1f} GiB; see"
      f" {journal.workdir.path}, or make its report:\n"
      f"python -m experiments.view --workdir={journal.workdir.path}"
  )


if __name__ == "__main__":
  cli.run(main, required=("config", "workdir"))
