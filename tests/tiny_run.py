"""A whole run in miniature, as a process that can be killed.

python tiny_run.py DIRECTORY SEED STEPS [STALENESS]
"""

import asyncio
import dataclasses
import hashlib
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from mgrpo_jax import loop, metrics, store, workdir
from mgrpo_jax.journal import Journal
from mgrpo_jax.plan import Setup
from mgrpo_jax.policy.load import load
from mgrpo_jax.tasks import curriculum
from mgrpo_jax.testing.setup import small_setup


def train(
    directory: pathlib.Path, setup: Setup, *, config: dict, stream
) -> dict:
  """Trains, or continues; returns the summary."""
  with (
      metrics.count_compilations() as compiled,
      workdir.hold(directory, config) as held,
      Journal(
          held,
          total_steps=curriculum.num_steps(setup.stages),
          limits=setup.budget.limits(),
          keep_checkpoints=2,
          stream=stream,
          started=time.monotonic(),
          compiled=compiled,
      ) as journal,
  ):
    bucket = store.open_folder(held.bucket)
    summary, _ = asyncio.run(loop.train(setup, bucket, journal))
    return journal.summarise({"config": {}} | summary)


def digest(directory: pathlib.Path) -> str:
  """A digest over every parameter of every policy of a finished run."""
  total = hashlib.sha256()
  for path in sorted((directory / "policies").iterdir()):
    for leaf in jax.tree.leaves(load(path).params):
      total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()


def main() -> None:
  cache = pathlib.Path(tempfile.gettempdir()) / "mgrpo_jax_tiny_cache"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  directory, seed, steps, *staleness = sys.argv[1:]
  config = {"seed": int(seed), "steps": int(steps)}
  setup = small_setup(imitation_steps=2, **config)
  setup = dataclasses.replace(setup, whole_every=3)
  if staleness:
    setup = dataclasses.replace(setup, max_staleness=int(staleness[0]))
  train(pathlib.Path(directory), setup, config=config, stream=sys.stderr)
  print(digest(pathlib.Path(directory)))


if __name__ == "__main__":
  main()
