r"""Trains a grid of settings, arms and seeds, and compares what came out.

    python -m experiments.sweep --config=configs/quickstart.py:smoke \
        --out=runs/sweep --set alignment.strategy=mask,inverse_count \
        --set loss.clip_high=0.2,0.28 --seeds=0,1,2 [--jobs=2]

Every combination and seed is one experiments.train in OUT/runs, its output in
OUT/logs. The same command goes on: runs that finished are kept, interrupted
ones resumed, failed ones tried again. OUT/table.md, table.json, index.html and
accuracy_*.png compare the combinations. Exit code 1: a run failed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import typing
from collections.abc import Sequence

from absl import flags

from experiments import cli

if typing.TYPE_CHECKING:
  from experiments.grid import Cell
  from experiments.jobs import Ended
  from mgrpo_jax.report.sweep import Combination

FAILED = 1
TRAIN = (sys.executable, "-m", "experiments.train")

_CONFIG = flags.DEFINE_string(
    "config", "", "recipe, such as configs/quickstart.py:smoke"
)
_OUT = flags.DEFINE_string(
    "out", "", "directory of the sweep; made, or gone on with"
)
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "config key and its values, key=value,value; may be repeated; one value"
    " sets it for all runs; quote values that hold commas",
)
_ARMS = flags.DEFINE_list(
    "arms", [], "to put behind the recipe's colon, one after the other"
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "of every combination: 0,1,2")
_JOBS = flags.DEFINE_integer(
    "jobs",
    1,
    "runs at a time, each on its share of the cores; leave it 1 where runs use"
    " an accelerator",
    lower_bound=1,
    upper_bound=1024,
)
_BUDGETS = {
    name: flags.DEFINE_integer(
        f"at_{name}",
        None,
        f"{name.replace('_', ' ')} at which dev accuracy is compared; by"
        " default the most that every run had spent",
        lower_bound=0,
    )
    for name in ("generated_tokens", "trained_tokens")
}


def main() -> None:
  """Plans, runs and compares; see the module."""
  environment = dict(os.environ)
  os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators are for the runs
  with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
    from experiments import grid
    from mgrpo_jax import atomic, workdir
    from mgrpo_jax.report import sweep_page

    cli.need("matplotlib")
    out = pathlib.Path(_OUT.value)
    axes = grid.axes(_SET.value)
    file, arms = _CONFIG.value, _ARMS.value
    cells = grid.plan(file, arms=arms, axes=axes, seeds=_SEEDS.value)
    settings = grid.settings(file, arms=arms, axes=axes, cells=cells)
    grid.check_directory(out, settings)
    for cell in cells:
      workdir.check(_workdir(out, cell), cell.values)
      _check_finished(out, cell)
  with cli.user_errors(OSError), atomic.exclusive(out / workdir.LOCK_FILE):
    if not (out / grid.SETTINGS_FILE).exists():
      atomic.write_json(out / grid.SETTINGS_FILE, settings)
    failed = _run(out, cells, environment)
    page = sweep_page.write(out, _combinations(out, cells), _budgets())
    cli.say((out / "table.md").read_text("utf-8"))
    cli.say(f"page: {page}")
  if failed:
    sys.exit(FAILED)


def _check_finished(out: pathlib.Path, cell: Cell) -> None:
  """Raises where a run is finished but no longer says what it came to."""
  from mgrpo_jax.report import sweep

  directory = _workdir(out, cell)
  if sweep.finished(directory, cell.values) and not sweep.whole(directory):
    raise ValueError(
        f"{directory}: finished, but its metrics.jsonl or summary.json is gone"
        " or damaged; remove the directory to run it again"
    )


def _run(
    out: pathlib.Path, cells: Sequence[Cell], environment: dict[str, str]
) -> int:
  """Runs what has not finished; returns how many failed."""
  from experiments import jobs
  from experiments.tally import Tally
  from mgrpo_jax.report import sweep, sweep_page

  by_name = {cell.name: cell for cell in cells}
  due = [
      cell
      for cell in cells
      if not sweep.finished(_workdir(out, cell), cell.values)
  ]
  tally = Tally(
      sys.stderr,
      total=len(cells),
      finished=len(cells) - len(due),
      parallel=_JOBS.value,
  )
  queue = [
      jobs.Job(
          name=cell.name,
          command=(*TRAIN, *cell.arguments, f"--workdir={_workdir(out, cell)}"),
          log=out / "logs" / f"{cell.name}.log",
      )
      for cell in due
  ]
  running = jobs.run(
      queue,
      parallel=_JOBS.value,
      environment=environment,
      watch=tally.show,
  )
  with contextlib.closing(tally), contextlib.closing(running):
    for ended in running:
      tally.add(ended.seconds, *_verdict(out, by_name[ended.job.name], ended))
      sweep_page.write_tables(out, _combinations(out, cells), _budgets())
  return tally.failed


def _verdict(out: pathlib.Path, cell: Cell, ended: Ended) -> tuple[bool, str]:
  """Whether a run finished, and what to say of it."""
  from experiments import jobs
  from mgrpo_jax.report import summary, sweep
  from mgrpo_jax.report.progress import duration

  directory, took = _workdir(out, cell), duration(ended.seconds)
  if ended.code == 0 and sweep.finished(directory, cell.values):
    found, _ = summary.read(directory / "summary.json")
    before, after = (found["eval"][time] for time in ("before", "after"))
    return True, (
        f"finished {cell.name} in {took}: test accuracy"
        f" {before['accuracy']:.3f} -> {after['accuracy']:.3f}"
        f" (n = {after['n']})"
    )
  why = f"exit code {ended.code}" if ended.code else "no whole summary.json"
  return False, (
      f"failed {cell.name} after {took}, {why}: {jobs.last_line(ended.job.log)}"
      f" ({ended.job.log})"
  )


def _combinations(
    out: pathlib.Path, cells: Sequence[Cell]
) -> list[Combination]:
  """Groups the runs that differ in their seed only."""
  from mgrpo_jax.report import sweep

  groups: dict[tuple[str, ...], list[Cell]] = {}
  for cell in cells:
    groups.setdefault(cell.arguments[:-1], []).append(cell)  # last: seed
  return [
      sweep.Combination(
          name=group[0].combination,
          settings=group[0].settings,
          seeds=tuple(cell.seed for cell in group),
          runs={
              cell.seed: _workdir(out, cell)
              for cell in group
              if sweep.finished(_workdir(out, cell), cell.values)
          },
      )
      for group in groups.values()
  ]


def _workdir(out: pathlib.Path, cell: Cell) -> pathlib.Path:
  """The directory of a run."""
  return out / "runs" / cell.name


def _budgets() -> dict[str, float]:
  """The tokens at which dev accuracy is compared, where they were given."""
  given = {name: flag.value for name, flag in _BUDGETS.items()}
  return {name: one for name, one in given.items() if one is not None}


if __name__ == "__main__":
  cli.run(main, required=("config", "out"), resumes=True)
