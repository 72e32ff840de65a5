"""One job of a whole run in miniature, as a process that can be killed.

python tiny_job.py DIRECTORY BUCKET POLICY SEED STEPS

POLICY may be `all`: then the run is in one process. The environment's STALENESS
is that of the setup; with CAST the run is that of `delegating.cast_setup`, and
looks at dev after so many steps.
"""

import asyncio
import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile
import time

import jax
from delegating import cast_setup, delegating_setup

from mgrpo_jax import loop, metrics, store, workdir
from mgrpo_jax.decoupled.part import Job
from mgrpo_jax.decoupled.run import open_job, restricted
from mgrpo_jax.journal import Journal
from mgrpo_jax.run import open_run
from mgrpo_jax.serving.listen import bind
from mgrpo_jax.tasks import curriculum

TOKEN = "0123456789abcdef"
HEARTBEAT = 0.5


def train(
    directory, bucket, policy, setup, *, stream, patience=600.0, channel=None
):
  """Trains one job's part, or all; returns the summary."""
  opened = open_run
  with (
      metrics.count_compilations() as compiled,
      workdir.hold(directory, {"seed": setup.seed}) as held,
      Journal(
          held,
          total_steps=curriculum.num_steps(setup.stages),
          limits={},
          keep_checkpoints=2,
          stream=stream,
          started=time.monotonic(),
          compiled=compiled,
      ) as journal,
      bind("127.0.0.1", 0) as where,
  ):
    if policy != "all":
      setup = restricted(setup, policy)
      host, port = where.getsockname()[:2]
      opened = functools.partial(
          open_job,
          job=Job(
              policy=policy,
              workdir=held,
              where=where,
              address=f"http://{host}:{port}",
              token=TOKEN,
              patience=patience,
              heartbeat=HEARTBEAT,
              tell=journal.progress.note,
              channel=channel,
          ),
      )
    work = loop.train(setup, store.open(bucket), journal, opened=opened)
    summary, _ = asyncio.run(work)
    return journal.summarise({"config": {}} | summary)


def main():
  cache = pathlib.Path(tempfile.gettempdir()) / "mgrpo_jax_tiny_cache"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  directory, bucket, policy, seed, steps = sys.argv[1:]
  if "CAST" in os.environ:
    every = int(os.environ["CAST"])
    setup = cast_setup(seed=int(seed), evaluate_every=every)
  else:
    setup = delegating_setup(
        seed=int(seed), imitation_steps=2, steps=int(steps)
    )
  staleness = int(os.environ.get("STALENESS", "0"))
  method = setup.method  # what grades matter, only the stage says
  plain = {
      role: dataclasses.replace(weights, expert=0.0)
      for role, weights in method.reward_weights.items()
  }
  method = dataclasses.replace(
      method,
      reward_weights=plain,
      stage_rewards={"reinforce": method.reward_weights},
  )
  setup = dataclasses.replace(setup, max_staleness=staleness, method=method)
  print(
      json.dumps(
          train(
              pathlib.Path(directory), bucket, policy, setup, stream=sys.stderr
          )
      )
  )


if __name__ == "__main__":
  main()
