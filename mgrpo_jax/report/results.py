"""Results kept beside the code: what the arms of a recipe came to.

A run directory holds gigabytes and stays where it was made. What figures and
tables need of it is small, and is kept as one JSON file: for each arm and seed
accuracy before and after, steps, tokens and the looks at dev; and what the
seeds say together, compared with one arm, the baseline.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax import atomic, workdir
from mgrpo_jax.report import shapes, summary, sweep, sweep_page

NOTES = (
    "Accuracies are means over seeds with the 95% t interval of that mean, for"
    " the questions asked; the 95% Wilson interval by questions takes the n of"
    " one run, for all seeds answer the same ones.",
    "less: mean of the differences between runs of the same seed, with the 95%"
    " t interval of that mean.",
    "dev at equal tokens: the same difference of accuracy on the dev questions"
    " when both arms had generated (in training rollouts) or trained on as many"
    " tokens, the most that all runs of the two had; on a line between two"
    " looks at dev, unknown before the first.",
)
_DEV = ("steps", *sweep.BUDGETS, "accuracy/dev", "questions/dev")
_RUN = {
    "arm": shapes.is_text,
    "seed": shapes.is_count,
    "steps": shapes.is_count,
    "seconds": shapes.is_number,
    "commit": shapes.is_text,
    "before": summary.SCORE,
    "after": summary.SCORE,
    "tokens": shapes.object_of(
        {"generated": shapes.is_count, "trained": shapes.is_count}
    ),
    "dev": shapes.list_of(
        shapes.tuple_of(
            *[shapes.is_number] * 3,
            shapes.is_share,
            shapes.optional(shapes.is_number),
        )
    ),
}
_FILE = {
    "machine": shapes.is_text,
    "note": shapes.is_text,
    "baseline": shapes.is_text,
    "runs": shapes.list_of(shapes.object_of(_RUN)),
}


def find(roots: Sequence[str | os.PathLike[str]]) -> list[pathlib.Path]:
  """Finds the run directories that finished, at any depth.

  Args:
    roots: directories, such as one of a sweep.

  Returns:
    The directories that hold a `summary.json`, sorted.

  Raises:
    ValueError: there is none.
  """
  found = {
      path.parent
      for root in roots
      for path in pathlib.Path(root).rglob(workdir.SUMMARY_FILE)
  }
  if not found:
    names = ", ".join(map(str, roots))
    raise ValueError(f"{names}: no run that finished ({workdir.SUMMARY_FILE})")
  return sorted(found)


def collect(
    directories: Sequence[pathlib.Path],
    *,
    machine: str,
    note: str,
    baseline: str,
) -> dict[str, Any]:
  """Reads runs into what the file of results holds.

  Args:
    directories: of runs that finished. The arm is what stands in the name of
      their recipe behind the colon.
    machine: that the runs were made on, in words.
    note: what else to say of them.
    baseline: the arm that others are compared with.

  Returns:
    JSON values.

  Raises:
    ValueError: a run is damaged, two are the same, runs of an arm differ in
      more than their seed, or the baseline is not among the arms.
  """
  seen: dict[tuple[str, int], pathlib.Path] = {}
  configs: dict[str, tuple[pathlib.Path, dict[str, Any]]] = {}
  runs = []
  for directory in directories:
    run, config = _run(directory)
    key = run["arm"], run["seed"]
    if key in seen:
      raise ValueError(
          f"{seen[key]} and {directory} are both arm {key[0]!r}, seed {key[1]}"
      )
    seen[key] = directory
    other, like = configs.setdefault(run["arm"], (directory, config))
    if unlike := workdir.differences(like, config):
      raise ValueError(
          f"{other} and {directory}, arm {run['arm']!r}, differ in more than"
          f" their seed: {workdir.listed(unlike)}"
      )
    runs.append(run)
  if baseline not in configs:
    raise ValueError(
        f"baseline: {baseline!r}, allowed: {', '.join(sorted(configs))}"
    )
  runs.sort(key=lambda run: (run["arm"], run["seed"]))
  kept = {"machine": machine, "note": note, "baseline": baseline, "runs": runs}
  return kept | {"statistics": compare(rows(kept), baseline)}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a file of results.

  Args:
    path: of the file.

  Returns:
    What `collect` returned.

  Raises:
    atomic.StorageError: it cannot be read, or holds something else.
  """
  value = atomic.read_json(path)
  if not isinstance(value, dict):
    raise atomic.CorruptError(f"{path}: not a JSON object")
  if misfits := shapes.misfits(value, _FILE):
    raise atomic.CorruptError(
        f"{path}: {', '.join(misfits)}: missing, or not what it should be"
    )
  keys = [(run["arm"], run["seed"]) for run in value["runs"]]
  if twice := sorted({key for key in keys if keys.count(key) > 1}):
    raise atomic.CorruptError(f"{path}: runs: twice {twice}")
  if value["baseline"] not in {run["arm"] for run in value["runs"]}:
    raise atomic.CorruptError(
        f"{path}: baseline: no run of arm {value['baseline']!r}"
    )
  return value


def rows(results: Mapping[str, Any]) -> list[sweep.Row]:
  """Groups results by arm, the best first.

  Args:
    results: what `read` or `collect` returned.

  Returns:
    A row an arm, by mean accuracy after training.
  """
  arms: dict[str, dict[int, sweep.Outcome]] = {}
  for run in results["runs"]:
    arms.setdefault(run["arm"], {})[run["seed"]] = _outcome(run)
  found = [
      sweep.Row(
          combination=sweep.Combination(
              name=arm, settings={}, seeds=tuple(outcomes), runs={}
          ),
          outcomes=outcomes,
      )
      for arm, outcomes in arms.items()
  ]
  return sorted(found, key=lambda row: -_mean(row, "after"))


def compare(rows: Sequence[sweep.Row], baseline: str) -> list[dict[str, Any]]:
  """Computes what the seeds of each arm say, and how it differs from one arm.

  Args:
    rows: of all arms.
    baseline: the arm that others are compared with; one of them.

  Returns:
    JSON values, an object an arm: `name`, `finished_seeds`, the `measures` of
    a sweep, and where it is another arm than the baseline the `differences`
    from it: `after` and, at equal tokens, `generated_tokens` and
    `trained_tokens`.
  """
  base = next(row for row in rows if row.combination.name == baseline)
  entries = []
  for row, entry in zip(rows, sweep.table(rows, {}), strict=True):
    one = {k: entry[k] for k in ("name", "finished_seeds", "measures")}
    if row is not base:
      one["differences"] = _differences(row, base)
    entries.append(one)
  return entries


def table(results: Mapping[str, Any]) -> sweep_page.Table:
  """Spells the comparison of the arms.

  Args:
    results: what `read` or `collect` returned.

  Returns:
    Header and rows, an arm a row.
  """
  baseline = results["baseline"]
  header = (
      "arm",
      "seeds",
      "before",
      "after",
      "by questions",
      f"less {baseline}",
      *(name.replace("_", " ") for name in sweep.BUDGETS),
      *(
          f"dev at equal {name.replace('_', ' ')}, less {baseline}"
          for name in sweep.BUDGETS
      ),
  )
  lines = []
  for entry in compare(rows(results), baseline):
    n, measures = len(entry["finished_seeds"]), entry["measures"]
    unlike = entry.get("differences", {})
    cells = [entry["name"], ", ".join(map(str, entry["finished_seeds"]))]
    cells += [
        sweep_page.mean_text(measures[name], name, n)
        for name in ("before", "after")
    ]
    cells += [
        sweep_page.questions_text(measures["after"]),
        sweep_page.mean_text(unlike.get("after"), "difference", n),
    ]
    cells += [
        sweep_page.mean_text(measures[name], name, n) for name in sweep.BUDGETS
    ]
    cells += [_at_equal(unlike.get(name), n) for name in sweep.BUDGETS]
    lines.append(tuple(cells))
  return header, lines


def markdown(results: Mapping[str, Any]) -> str:
  """Writes the comparison of the arms in Markdown.

  Args:
    results: what `read` or `collect` returned.

  Returns:
    The table, and below it what its columns mean.
  """
  told = [f"- {note}" for note in NOTES]
  told.append(f"- machine: {results['machine']}")
  commits = sorted({run["commit"] for run in results["runs"]} - {""})
  if commits:
    told.append(f"- commit: {', '.join(commits)}")
  if results["note"]:
    told.append(f"- {results['note']}")
  return sweep_page.markdown(table(results)) + "\n\n" + "\n".join(told)


def _run(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """What is kept of one run, and its config but for the seed."""
  path = directory / workdir.SUMMARY_FILE
  found, problems = summary.read(path)
  outcome = sweep.outcome(directory)
  config = found.get("config")
  if problems or outcome is None or not isinstance(config, dict):
    why = problems[0] if problems else f"{directory}: a part is missing"
    raise ValueError(why)
  _, _, arm = str(config.get("name", "")).partition(":")
  if not arm:
    raise ValueError(
        f"{path}: config.name: {config.get('name')!r}, allowed: RECIPE:ARM"
    )
  needed = {"seed", "steps", "seconds", "tokens", "eval"}
  if lost := sorted(needed - found.keys()):
    raise ValueError(f"{path}: {', '.join(lost)}: missing")
  looks = np.stack([outcome.looks[name] for name in _DEV], axis=1)
  run = {
      "arm": arm,
      "seed": found["seed"],
      "steps": found["steps"],
      "seconds": found["seconds"],
      "commit": found.get("commit", ""),
      "tokens": {k: found["tokens"].get(k) for k in ("generated", "trained")},
      "dev": [_whole(look) for look in looks.tolist()],
  }
  for time in ("before", "after"):
    score = found["eval"].get(time) or {}
    run[time] = {name: score.get(name) for name in ("accuracy", "n", "ci95")}
  if misfits := shapes.misfits(run, _RUN):
    raise ValueError(
        f"{path}: {', '.join(misfits)}: missing, or not what it should be"
    )
  return run, {k: v for k, v in config.items() if k != "seed"}


def _outcome(run: Mapping[str, Any]) -> sweep.Outcome:
  """A run of the file, as those of a sweep are."""
  before, after = (run[time]["accuracy"] for time in ("before", "after"))
  looks = np.array(run["dev"], np.float64).reshape(-1, len(_DEV))
  return sweep.Outcome(
      values={
          "before": before,
          "after": after,
          "change": after - before,
          "generated_tokens": float(run["tokens"]["generated"]),
          "trained_tokens": float(run["tokens"]["trained"]),
          "seconds": float(run["seconds"]),
      },
      questions=min(run[time]["n"] for time in ("before", "after")),
      looks=dict(zip(_DEV, looks.T, strict=True)),
  )


def _differences(row: sweep.Row, base: sweep.Row) -> dict[str, Any]:
  """By how much an arm is better than another, seed by seed."""
  seeds = [seed for seed in row.outcomes if seed in base.outcomes]
  pairs = {seed: (row.outcomes[seed], base.outcomes[seed]) for seed in seeds}
  after = {
      seed: one.values["after"] - other.values["after"]
      for seed, (one, other) in pairs.items()
  }
  found = {"after": sweep.measure(row, "difference", after)}
  for name, tokens in sweep.budgets([row, base]).items():
    at: dict[int, float | None] = {}
    for seed, (one, other) in pairs.items():
      at[seed] = None
      mine, theirs = (sweep.at_budget(o, name, tokens) for o in (one, other))
      if mine is not None and theirs is not None:
        at[seed] = mine - theirs
    found[name] = {"tokens": tokens} | sweep.measure(row, "difference", at)
  return found


def _at_equal(measure: Mapping[str, Any] | None, n: int) -> str:
  """A difference and the tokens that it was measured at."""
  text = sweep_page.mean_text(measure, "difference", n)
  known = measure is not None and measure["n"]
  return f"{text} at {measure['tokens']:,.0f}" if measure and known else text


def _mean(row: sweep.Row, name: str) -> float:
  """The mean of a measure over a row's runs."""
  return float(np.mean([one.values[name] for one in row.outcomes.values()]))


def _whole(look: Sequence[float]) -> list[float | int | None]:
  """A look at dev as JSON: counts are whole numbers, null is unknown."""
  steps, generated, trained, accuracy, asked = look
  counts = [int(number) for number in (steps, generated, trained)]
  return [*counts, accuracy, int(asked) if np.isfinite(asked) else None]
