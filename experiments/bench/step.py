r"""Where a training step's time goes: a table, and JSON.

    python -m experiments.bench.step --config=configs/quickstart.py \
        --json=step.json [--steps=8] [--warmup=2]

Phases run one after the other, each waited for, so that their times add up;
in training, the host's work on one step overlaps the device's on another.
Steps are those of the curriculum's last stage. Compile time falls into the
warm-up and is reported apart.
"""

from __future__ import annotations

import asyncio
import pathlib
import tempfile
import time
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from experiments import cli

if typing.TYPE_CHECKING:
  from mgrpo_jax.plan import Setup
  from mgrpo_jax.run import Run
  from mgrpo_jax.store import Store
  from mgrpo_jax.tasks.curriculum import Stage

  Row = Mapping[str, tuple[float, int]]  # (seconds, work done) by phase

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps that are timed, >= 1.")
_WARMUP = flags.DEFINE_integer("warmup", 2, "Steps before them, >= 1.")
_JSON = flags.DEFINE_string("json", None, "Where the figures are written.")

PHASES = ("rollout", "reward", "align", "update", "publish")


def main() -> None:
  """Measures; see the module."""
  from experiments import recipe
  from mgrpo_jax import atomic, metrics, store

  with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
    if min(_STEPS.value, _WARMUP.value) < 1:
      raise ValueError("--steps and --warmup must be at least 1")
    setup = recipe.build(_CONFIG.value)
  with (
      tempfile.TemporaryDirectory() as folder,
      metrics.count_compilations() as compiled,
  ):
    rows = asyncio.run(_measure(setup, store.open_folder(folder)))
  timed = rows[_WARMUP.value :]
  result = {
      "config": _CONFIG.value.name,
      "device": str(jax.devices()[0].device_kind),
      "steps": len(timed),
      "compilations": compiled.count,
      "compile_seconds": round(compiled.seconds, 2),
      "phases": {phase: _summary(timed, phase) for phase in PHASES},
  }
  print(_table(result))
  if _JSON.value:
    atomic.write_json(pathlib.Path(_JSON.value), result)


async def _measure(setup: Setup, store: Store) -> list[Row]:
  """Runs steps; returns (seconds, tokens) by phase for each."""
  from mgrpo_jax.run import open_run

  stage = setup.stages[-1]
  rows = []
  async with open_run(setup, store) as run:
    run.publish(tuple(run.resources.learners), 0)
    for step in range(_WARMUP.value + _STEPS.value):
      rows.append(await _step(run, stage, step))
  return rows


async def _step(run: Run, stage: Stage, step: int) -> Row:
  """One step, every phase waited for."""
  marks = [time.perf_counter()]
  before = run.meter.work.generated_tokens
  groups = await run.collect(stage, run.take(stage), step)
  marks.append(time.perf_counter())
  scores = run.grade(stage, groups)
  marks.append(time.perf_counter())
  credits = run.assign(stage, groups, scores, step)
  marks.append(time.perf_counter())
  dispatched = run.update(stage, step, groups, credits)
  jax.block_until_ready(run.resources.states)
  marks.append(time.perf_counter())
  run.publish(tuple(dispatched), step + 1)
  marks.append(time.perf_counter())
  calls = sum(len(group.trajectories) for group in groups)
  trained = sum(
      int(np.sum(np.asarray(b.segment_ids) > 0))
      for one in dispatched.values()
      for b in one.batches
  )
  work = (run.meter.work.generated_tokens - before, calls, calls, trained, 0)
  return {
      phase: (end - start, count)
      for phase, start, end, count in zip(
          PHASES, marks[:-1], marks[1:], work, strict=True
      )
  }


def _summary(rows: Sequence[Row], phase: str) -> dict[str, float]:
  """Median, least and most seconds, and work a second."""
  seconds = np.array([row[phase][0] for row in rows])
  work = np.array([row[phase][1] for row in rows])
  return {
      "median_s": round(float(np.median(seconds)), 4),
      "min_s": round(float(seconds.min()), 4),
      "max_s": round(float(seconds.max()), 4),
      "per_second": round(float(work.sum() / seconds.sum()), 1),
  }


def _table(result: Mapping[str, Any]) -> str:
  """The figures for a reader."""
  total = sum(phase["median_s"] for phase in result["phases"].values())
  unit = dict(
      zip(
          PHASES,
          ("sampled tokens", "calls", "calls", "tokens", ""),
          strict=True,
      )
  )
  lines = [
      f"{result['config']} on {result['device']}, {result['steps']} steps;"
      f" {result['compilations']} compilations took"
      f" {result['compile_seconds']} s",
      f"{'phase':<10}{'median s':>10}{'min':>9}{'max':>9}{'share':>8}",
  ]
  for name, row in result["phases"].items():
    rate = f"  {row['per_second']:,.0f} {unit[name]}/s" if unit[name] else ""
    lines.append(
        f"{name:<10}{row['median_s']:>10.3f}{row['min_s']:>9.3f}"
        f"{row['max_s']:>9.3f}{row['median_s'] / total:>8.1%}{rate}"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run(main, required=("config",))
