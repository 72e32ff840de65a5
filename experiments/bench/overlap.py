r"""Rollouts that run ahead of training against training in step.

    python -m experiments.bench.overlap --workdir=DIR [--pairs=3] \
        [--staleness=1] [--every_core] [--out=FILE] [--config=FILE] \
        [--config.key=value …]

Trains the same recipe in turn with `rollout.max_staleness` 0 and with
--staleness, and prints steps an hour, what a step's rollouts and the rest of it
took, how many cores were busy, and the held-out accuracy at the end with its
95% interval. The first steps, which compile, are left out, and so is the time
of evaluations, but not what it costs that nothing runs ahead of them. The run
of each kind that warms the compilation cache in DIR is not compared: with
--pairs=0 there is no other, and only accuracies are to be read.

A compiled program has one core to itself, as a sampler and a learner on devices
of their own would have: otherwise each takes all cores in its turn, and nothing
is left to overlap. So XLA has one thread in step, where programs take turns,
and two out of step. --every_core measures without that, too. Where rollouts
take R seconds and the rest U, in step a step takes R + U, and at best
max(R, U) out of step: the table says what that ratio allows. R and U are of a
first run in step in which whoever dispatches a program waits for it; otherwise
updates that are still running count as the next step's rollouts.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import cli
from mgrpo_jax.report.writer import read_metrics

_ONE_CORE = "--xla_cpu_multi_thread_eigen=false"
# `experiments.train` in which a program is run by who dispatches it; JAX reads
# this from no environment variable.
_APART = """
import jax
from experiments import cli, train
jax.config.update("jax_cpu_enable_async_dispatch", False)
cli.run(train.main, required=("config", "workdir"), resumes=True)
"""
_RECIPE = (
    "--config=configs/quickstart.py",
    "--config.stages.easy.steps=12",
    "--config.stages.hard.steps=0",
    "--config.tasks.per_step=8",
    "--config.evaluation.every=20",
    "--config.evaluation.tasks=8",
    "--config.evaluation.final_tasks=16",
    "--config.checkpoint.every=20",
)
_SKIPPED = 2  # steps at the beginning, which compile and fill what waits


def run(
    arguments: Sequence[str],
    workdir: pathlib.Path,
    *,
    threads: int | None,
    apart: bool = False,
) -> dict[str, Any]:
  """Trains once.

  Args:
    arguments: of `experiments.train`.
    workdir: new; its parent holds the cache of compiled programs.
    threads: in which XLA computes, each program in one; None for all cores.
    apart: whether whoever dispatches a program waits for its end.

  Returns:
    Figures by name.

  Raises:
    CalledProcessError: training failed.
  """
  environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  if threads is not None:
    given = os.environ.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = f"{given} {_ONE_CORE}".strip()
    environment["PJRT_NPROC"] = str(threads)
  start = ("-c", _APART) if apart else ("-m", "experiments.train")
  command = [sys.executable, *start, *arguments]
  began, used = time.monotonic(), _used()
  subprocess.run(
      [*command, f"--workdir={workdir}"],
      env=environment,
      stdout=subprocess.DEVNULL,
      check=True,
  )
  wall, cores = time.monotonic() - began, _used() - used
  rows = read_metrics(workdir / "metrics.jsonl")
  after = json.loads((workdir / "summary.json").read_text())["eval"]["after"]
  return figures(rows) | {
      "cores": cores / wall,
      "accuracy": after["accuracy"],
      "ci95": after["ci95"],
      "questions": after["n"],
  }


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """What the steps of a run took.

  Args:
    rows: of its metrics, by step.

  Returns:
    Steps an hour; medians of a step's seconds, of its rollouts' and of the
    rest's; the largest and the mean age of what was trained on, in updates.

  Raises:
    ValueError: no step is left to be timed.
  """
  kept = [row for row in rows if row["step"] >= _SKIPPED]
  if not kept:
    raise ValueError(f"{len(rows)} steps, allowed: over {_SKIPPED}")
  step = [
      row["seconds/step"] - row.get("seconds/evaluate", 0.0) for row in kept
  ]
  waits = [row["seconds/wait"] for row in kept]
  rest = [whole - wait for whole, wait in zip(step, waits, strict=True)]
  ages = {
      family: [
          value
          for row in kept
          for name, value in row.items()
          if name.startswith(f"{family}/")
      ]
      for family in ("staleness", "staleness_mean")
  }
  return {
      "steps_an_hour": 3600 * len(step) / sum(step),
      "step": statistics.median(step),
      "rollout": statistics.median(row["seconds/rollout"] for row in kept),
      "rest": statistics.median(rest),
      "oldest": max(ages["staleness"], default=0.0),
      "age": statistics.fmean(ages["staleness_mean"] or [0.0]),
  }


def _used() -> float:
  """Seconds of processor time that ended child processes took."""
  spent = resource.getrusage(resource.RUSAGE_CHILDREN)
  return spent.ru_utime + spent.ru_stime


def main() -> None:
  """Prints a table; writes JSON where asked."""
  arguments, rest = _arguments()
  given = any(one.startswith("--config=") for one in rest)
  recipe = rest if given else [*_RECIPE, *rest]
  runs: dict[int, list[dict[str, Any]]] = {0: [], arguments.staleness: []}
  for pair in range(arguments.pairs + 1):
    for staleness, kept in runs.items():
      workdir = arguments.workdir / f"{pair}_{staleness}"
      command = [*recipe, f"--config.rollout.max_staleness={staleness}"]
      apart = pair == 0 and staleness == 0
      taken = 2 if staleness else 1  # programs at a time
      threads = None if arguments.every_core else taken
      kept.append(run(command, workdir, threads=threads, apart=apart))
      print(f"{workdir}: {kept[-1]}", file=sys.stderr, flush=True)
  cores = "every core" if arguments.every_core else "a core a program"
  print(f"{' '.join(recipe)}; {cores}; {arguments.pairs} pairs")
  _table(
      {name: found[1:] or found for name, found in runs.items()},
      apart=runs[0][0],
  )
  if arguments.out is not None:
    told = {"recipe": recipe, "cores": cores, "runs": runs}
    arguments.out.write_text(json.dumps(told, indent=2) + "\n")


def _table(
    runs: Mapping[int, Sequence[Mapping[str, Any]]],
    *,
    apart: Mapping[str, Any],
) -> None:
  """Prints medians with extremes, the ratio of the pairs, and its limit."""
  for staleness, found in runs.items():
    for name in ("steps_an_hour", "step", "rollout", "rest", "cores", "age"):
      values = [one[name] for one in found]
      print(
          f"max_staleness {staleness}  {name:14}"
          f"{statistics.median(values):9.2f} [{min(values):.2f},"
          f" {max(values):.2f}]"
      )
    for one in found:
      low, high = one["ci95"]
      print(
          f"max_staleness {staleness}  accuracy {one['accuracy']:.3f}"
          f" [{low:.3f}, {high:.3f}] of {one['questions']}; oldest"
          f" {one['oldest']:.0f}"
      )
  first, second = runs.values()
  ratios = [
      there["steps_an_hour"] / here["steps_an_hour"]
      for here, there in zip(first, second, strict=True)
  ]
  rollout, rest = apart["rollout"], apart["rest"]
  most = (rollout + rest) / max(rollout, rest)
  print(
      f"steps an hour, out of step to in step: {statistics.median(ratios):.2f}"
      f" [{min(ratios):.2f}, {max(ratios):.2f}]; rollouts {rollout:.2f} s and"
      f" the rest {rest:.2f} s apart, so at most {most:.2f}"
  )


def _arguments() -> tuple[argparse.Namespace, list[str]]:
  """Reads the command line; what is left is for `experiments.train`."""
  parser = argparse.ArgumentParser(
      description=__doc__.splitlines()[0], allow_abbrev=False
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--pairs", type=int, default=3)
  parser.add_argument("--staleness", type=int, default=1)
  parser.add_argument("--every_core", action="store_true")
  parser.add_argument("--out", type=cli.out_file)
  arguments, rest = parser.parse_known_args()
  if arguments.staleness < 1 or arguments.pairs < 0:
    parser.error("--staleness: allowed: 1 or more; --pairs: 0 or more")
  return arguments, rest


if __name__ == "__main__":
  main()
