"""What the runs of a sweep say together: means over seeds, equal budgets.

Runs that differ in nothing but their seed are a combination. Every number of
it is a mean over its seeds with a 95% t interval of that mean. Seeds answer
the same questions, so pooling their answers would claim more questions than
were asked: the Wilson interval of an accuracy takes the questions of one run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mgrpo_jax import metrics, workdir
from mgrpo_jax.report import shapes, summary, writer

BUDGETS = ("generated_tokens", "trained_tokens")
LAST_STEPS = 10  # at the end of a run, of which metrics of steps are means
_LOOK = ("accuracy/dev", *BUDGETS)
_ASKED = "questions/dev"
_KEYED = ("calls", "reward")  # metrics of a role that a table shows
_SHARES = ("before", "after", "accuracy")
_BOUNDS = dict.fromkeys(_SHARES, (0.0, 1.0)) | dict.fromkeys(
    (*BUDGETS, "seconds", "calls"), (0.0, math.inf)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination:
  """The runs that differ in their seed only.

  Attributes:
    name: readable, of its own.
    settings: config key -> value as it was given.
    seeds: that were planned.
    runs: seed -> directory of those that finished.
  """

  name: str
  settings: Mapping[str, str]
  seeds: tuple[int, ...]
  runs: Mapping[int, pathlib.Path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What one run came to.

  Attributes:
    values: name -> number: accuracies on the test questions, their change,
      tokens, seconds, and means of metrics over the last steps.
    questions: test questions behind the accuracies, the fewer of both times.
    looks: at dev, ascending: `steps`, `accuracy/dev`, `questions/dev` (NaN
      where nobody wrote it down) and the tokens until then -> [l].
  """

  values: Mapping[str, float]
  questions: int
  looks: Mapping[str, Float[np.ndarray, " l"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A combination and the outcomes of its runs, by seed."""

  combination: Combination
  outcomes: Mapping[int, Outcome]


def finished(
    directory: str | os.PathLike[str], config: Mapping[str, Any]
) -> bool:
  """Whether a run of this configuration came to its end.

  Args:
    directory: of the run; may be missing.
    config: nested dictionaries of JSON values.

  Returns:
    Whether its summary is there, whole, and of this configuration.
  """
  path = pathlib.Path(directory) / workdir.SUMMARY_FILE
  found, problems = summary.read(path)
  return not problems and found.get("config") == config and "eval" in found


def read(combination: Combination) -> Row:
  """Reads the runs of a combination.

  Args:
    combination: whose runs finished.

  Returns:
    Their outcomes; seeds whose files are damaged are left out.
  """
  found = {seed: outcome(path) for seed, path in combination.runs.items()}
  return Row(
      combination=combination,
      outcomes={seed: one for seed, one in found.items() if one is not None},
  )


def at_budget(outcome: Outcome, name: str, budget: float) -> float | None:
  """Reads dev accuracy at a number of tokens, on a line between two looks.

  Args:
    outcome: of a run.
    name: of the tokens, one of BUDGETS.
    budget: tokens.

  Returns:
    The accuracy; None before the first look and after the last one.
  """
  spent, accuracy = _against(outcome.looks, name)
  if not spent.size or not spent[0] <= budget <= spent[-1]:
    return None
  return float(np.interp(budget, spent, accuracy))


def budgets(rows: Sequence[Row]) -> dict[str, float]:
  """The most tokens that every run of a sweep had spent at a look at dev.

  Args:
    rows: of the sweep.

  Returns:
    Tokens by name, but for those of which a run spent none, as imitation
    generates none; empty where no run has looked at dev.
  """
  runs = [one for row in rows for one in row.outcomes.values()]
  runs = [one for one in runs if one.looks["steps"].size]
  if not runs:
    return {}
  least = {n: min(float(o.looks[n][-1]) for o in runs) for n in BUDGETS}
  return {name: tokens for name, tokens in least.items() if tokens}


def table(rows: Sequence[Row], at: Mapping[str, float]) -> list[dict[str, Any]]:
  """Computes what `table.json` says of every combination.

  Args:
    rows: of the sweep.
    at: tokens by name, at which dev accuracy is compared.

  Returns:
    Objects of JSON values, one a combination, numbered from 1.
  """
  return [_entry(number, row, at) for number, row in enumerate(rows, 1)]


def curve(row: Row, name: str) -> Float[np.ndarray, "4 n"] | None:
  """Averages the dev accuracy of a combination's seeds, over what they spent.

  Seeds look at dev after the same steps but at other numbers of tokens: where
  any of them looked, the others are read on a line between their own looks.

  Args:
    row: a combination.
    name: `steps`, or one of BUDGETS.

  Returns:
    What was spent, the mean, and the ends of its t interval, NaN for one seed;
    only where all seeds have looks before and after. None where nowhere.
  """
  lines = [_against(one.looks, name) for one in row.outcomes.values()]
  lines = [line for line in lines if line[0].size]
  if not lines:
    return None
  first = max(at[0] for at, _ in lines)
  last = min(at[-1] for at, _ in lines)
  spent = np.unique(np.concatenate([at for at, _ in lines]))
  spent = spent[(first <= spent) & (spent <= last)]
  if not spent.size:
    return None
  seeds = np.stack([np.interp(spent, *line) for line in lines])
  unknown = (np.nan, np.nan)
  ends = [
      _clipped(metrics.student(at), "accuracy") or unknown for at in seeds.T
  ]
  low, high = np.array(ends).T
  return np.stack([spent, seeds.mean(axis=0), low, high])


def _against(
    looks: Mapping[str, Float[np.ndarray, " l"]], name: str
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
  """What was spent, ascending, and accuracy; the later of two looks at once."""
  spent = looks[name]
  later = np.append(np.diff(spent) > 0, True)[: spent.size]
  return spent[later], looks["accuracy/dev"][later]


def _entry(number: int, row: Row, at: Mapping[str, float]) -> dict[str, Any]:
  """One object of the table."""
  runs = row.outcomes
  names = dict.fromkeys(name for one in runs.values() for name in one.values)
  measures = {
      name: measure(row, name, {s: o.values.get(name) for s, o in runs.items()})
      for name in names
  }
  at_equal = {
      name: {"tokens": tokens}
      | measure(
          row,
          "accuracy",
          {seed: at_budget(one, name, tokens) for seed, one in runs.items()},
      )
      for name, tokens in at.items()
  }
  return {
      "number": number,
      "name": row.combination.name,
      "settings": dict(row.combination.settings),
      "planned_seeds": list(row.combination.seeds),
      "finished_seeds": list(runs),
      "measures": measures,
      "dev_accuracy_at": at_equal,
  }


def measure(
    row: Row, name: str, found: Mapping[int, float | None]
) -> dict[str, Any]:
  """Summarises one number of a combination's runs.

  Args:
    row: the combination.
    name: of the number; says within which bounds it lies.
    found: by seed, None where it is not known.

  Returns:
    JSON values: `mean`, `n`, the t interval `over_seeds`, the values of the
    `seeds` that have one, and for accuracies on the test questions their number
    and the Wilson interval `over_questions`.
  """
  seeds = {seed: one for seed, one in found.items() if one is not None}
  values = list(seeds.values())
  summed: dict[str, Any] = {
      "mean": float(np.mean(values)) if values else None,
      "n": len(values),
      "over_seeds": _clipped(metrics.student(values), name),
      "seeds": {str(seed): one for seed, one in seeds.items()},
  }
  if name in ("before", "after") and values:
    questions = min(one.questions for one in row.outcomes.values())
    summed["questions"] = questions
    summed["over_questions"] = metrics.wilson(
        min(summed["mean"] * questions, questions), questions
    )
  return summed


def _clipped(
    interval: tuple[float, float] | None, name: str
) -> tuple[float, float] | None:
  """An interval, no wider than what its measure can be."""
  if interval is None:
    return None
  low, high = _BOUNDS.get(name.split("/")[0], (-math.inf, math.inf))
  return max(interval[0], low), min(interval[1], high)


def outcome(directory: pathlib.Path) -> Outcome | None:
  """Reads what one run came to.

  Args:
    directory: of the run.

  Returns:
    The outcome; None where a part of it is missing or damaged.
  """
  found, _ = summary.read(directory / workdir.SUMMARY_FILE)
  scores, tokens = found.get("eval", {}), found.get("tokens", {})
  path = directory / writer.METRICS_FILE
  if not path.is_file() or {"before", "after"} - scores.keys():
    return None
  rows = writer.read_metrics(path)
  before, after = (scores[time]["accuracy"] for time in ("before", "after"))
  values = {"before": before, "after": after, "change": after - before}
  for name in ("generated", "trained"):
    if name in tokens:
      values[f"{name}_tokens"] = float(tokens[name])
  if "seconds" in found:
    values["seconds"] = float(found["seconds"])
  return Outcome(
      values=values | _last_means(rows),
      questions=min(scores[time]["n"] for time in ("before", "after")),
      looks=_looks(rows),
  )


def whole(directory: pathlib.Path) -> bool:
  """Whether a finished run still says everything that a table shows of it.

  Args:
    directory: of the run.

  Returns:
    Whether its scores, tokens and seconds are there, and a row of each step.
  """
  found, problems = summary.read(directory / workdir.SUMMARY_FILE)
  scores, tokens = found.get("eval", {}), found.get("tokens", {})
  path = directory / writer.METRICS_FILE
  named = {"steps", "seconds"} <= found.keys() and (
      {"before", "after"} <= scores.keys()
      and {"generated", "trained"} <= tokens.keys()
  )
  if problems or not named or not path.is_file():
    return False
  steps = [row["step"] for row in writer.read_metrics(path)]
  return steps == list(range(found["steps"]))


def _last_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Means over the last steps of the metrics that a table shows."""
  last = rows[-LAST_STEPS:]
  names = dict.fromkeys(
      name for row in last for name in row if name.split("/")[0] in _KEYED
  )
  series = {
      name: [row[name] for row in last if shapes.is_number(row.get(name))]
      for name in names
  }
  return {name: float(np.mean(one)) for name, one in series.items() if one}


def _looks(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Float[np.ndarray, " l"]]:
  """The looks at dev, and what had been spent until then."""
  found = [
      row for row in rows if all(shapes.is_number(row.get(n)) for n in _LOOK)
  ]
  looks = {n: np.array([row[n] for row in found], np.float64) for n in _LOOK}
  steps = np.array([row["step"] + 1 for row in found], np.float64)
  asked = np.array([row.get(_ASKED, np.nan) for row in found], np.float64)
  return looks | {"steps": steps, _ASKED: asked}
