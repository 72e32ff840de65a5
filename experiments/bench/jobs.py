r"""A run in one process against a job per policy, in turn, on this machine.

    python -m experiments.bench.jobs --workdir=DIR [--pairs=3] [--out=FILE] \
        [--config=configs/decoupled_quickstart.py] [--config.key=value …]

Prints the wall time of both, the time of their steps, how long the leader
waited for the other jobs to be ready, and what crossed besides text. The first
run of each warms the compilation cache in DIR and is dropped. Parameters must
be equal bit for bit, else the command fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from experiments import cli
from mgrpo_jax.report.writer import read_metrics

MODES = {"one process": (), "jobs": ("--launch=local",)}
_RECIPE = "--config=configs/decoupled_quickstart.py:smoke"
_SKIPPED = 1  # steps at the beginning, which compile


def run(
    mode: str, workdir: pathlib.Path, recipe: Sequence[str], cache: pathlib.Path
) -> dict[str, float]:
  """Trains once.

  Args:
    mode: of `MODES`.
    workdir: new.
    recipe: arguments that give it.
    cache: of compiled programs.

  Returns:
    Seconds and bytes, by name.

  Raises:
    CalledProcessError: training failed.
  """
  environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  began = time.monotonic()
  subprocess.run(
      [
          sys.executable,
          "-m",
          "experiments.train",
          *recipe,
          f"--workdir={workdir}",
          *MODES[mode],
      ],
      env=environment,
      stdout=subprocess.DEVNULL,
      check=True,
  )
  wall = time.monotonic() - began
  rows = read_metrics(workdir / "metrics.jsonl")[_SKIPPED:]
  found = {
      "wall, s": wall,
      "a step, s": statistics.mean(row["seconds/step"] for row in rows),
  }
  for name, key in (
      ("waited for jobs, s a step", "seconds/jobs"),
      ("text, bytes a call", "crossed_text"),
      ("besides, bytes a call", "crossed_besides"),
  ):
    if values := [row[key] for row in rows if key in row]:
      found[name] = statistics.mean(values)
  return found


def digests(workdir: pathlib.Path) -> dict[str, str]:
  """The sha256 of every trained policy's weights, by policy."""
  files = [
      *workdir.glob("policies/*/model.safetensors"),
      *workdir.glob("jobs/*/policies/*/model.safetensors"),
  ]
  return {
      file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest()
      for file in files
  }


def main() -> None:
  """Prints a table; writes JSON where asked."""
  arguments, rest = _arguments()
  recipe = (
      rest
      if any(a.startswith("--config=") for a in rest)
      else [
          _RECIPE,
          *rest,
      ]
  )
  figures: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
  found = set()
  for pair in range(arguments.pairs + 1):
    for number, mode in enumerate(MODES):
      workdir = arguments.workdir / f"{pair}_{number}"
      took = run(mode, workdir, recipe, arguments.workdir / "cache")
      figures[mode].append(took)
      print(f"{workdir}: {mode}, {took}", file=sys.stderr, flush=True)
      found.add(json.dumps(digests(workdir), sort_keys=True))
  print(f"{' '.join(recipe)}; {arguments.pairs} pairs")
  for mode, runs in figures.items():
    for name in runs[-1]:
      kept = [one[name] for one in runs[1:]]
      print(
          f"{mode:12}{name:28}{statistics.median(kept):10.3f}"
          f"{min(kept):10.3f}{max(kept):10.3f}"
      )
  if len(found) != 1:
    sys.exit("parameters differ between runs")
  print("parameters are equal bit for bit")
  if arguments.out is not None:
    text = json.dumps({"recipe": recipe, "figures": figures}, indent=2)
    arguments.out.write_text(text + "\n")


def _arguments() -> tuple[argparse.Namespace, list[str]]:
  """Reads the command line; what is left gives the recipe."""
  parser = argparse.ArgumentParser(
      description=__doc__.splitlines()[0], allow_abbrev=False
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--pairs", type=int, default=3)
  parser.add_argument("--out", type=cli.out_file)
  return parser.parse_known_args()


if __name__ == "__main__":
  main()
