"""Writes what a sweep came to: table.md, table.json, curves and a page."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax import atomic
from mgrpo_jax.report import curves, page, png, svg, sweep
from mgrpo_jax.report.text import escape, spell

TABLE_FILE = "table.json"
_UNKNOWN = "-"
_TIMES = ("before", "after")
_CHARTS = {
    name: curves.Chart(
        name=f"accuracy_{name}",
        title=f"Held-out accuracy against {x}",
        families=("accuracy",),
        x=x,
    )
    for name, x in (
        ("steps", "steps"),
        ("generated_tokens", "generated tokens"),
        ("trained_tokens", "trained tokens"),
    )
}
NOTES = (
    "before, after: accuracy on the test questions; change: of each run, after"
    " less before.",
    "Numbers are means over seeds with the 95% t interval of that mean, for"
    " the questions asked; one seed has none. (n = …) where a number is not of"
    " all finished seeds.",
    "by questions: the 95% Wilson interval of the mean accuracy, for the n"
    " questions of one run: all seeds answer the same ones.",
    f"calls, reward: means over the last {sweep.LAST_STEPS} steps; calls are"
    " per rollout.",
    "dev at … tokens: accuracy on the dev questions when so many tokens had"
    " been generated in training rollouts, or trained on; on a line between"
    " two looks at dev, unknown before the first and after the last.",
    "seconds: of each run from start to end; runs may have shared a machine.",
)

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # header, rows


def write_tables(
    directory: str | os.PathLike[str],
    combinations: Sequence[sweep.Combination],
    budgets: Mapping[str, float],
) -> list[sweep.Row]:
  """Writes `table.json` and `table.md`.

  Args:
    directory: of the sweep.
    combinations: with the runs that finished so far.
    budgets: tokens at which dev accuracy is compared, by name; where one is
      missing, the most that every run had spent.

  Returns:
    What the runs came to.

  Raises:
    atomic.StorageError: a file cannot be written.
  """
  rows = [sweep.read(one) for one in combinations]
  at = sweep.budgets(rows) | dict(budgets)
  entries = sweep.table(rows, at)
  folder = pathlib.Path(directory)
  whole = {"budgets": at, "notes": NOTES, "combinations": entries}
  atomic.write_json(folder / TABLE_FILE, whole)
  text = [
      f"# {spell(folder.resolve().name)}",
      _lead(rows),
      _markdown(_combinations(entries)),
      "\n".join(f"- {note}" for note in NOTES),
      "## Seeds",
      _markdown(_seeds(entries)),
  ]
  atomic.write(folder / "table.md", "\n\n".join(text) + "\n")
  return rows


def write(
    directory: str | os.PathLike[str],
    combinations: Sequence[sweep.Combination],
    budgets: Mapping[str, float],
) -> pathlib.Path:
  """Writes the tables, the curves as PNG and `index.html`.

  Args:
    directory: of the sweep.
    combinations: with the runs that finished.
    budgets: as for `write_tables`.

  Returns:
    The page.

  Raises:
    atomic.StorageError: a file cannot be written.
  """
  folder = pathlib.Path(directory)
  rows = write_tables(folder, combinations, budgets)
  entries = atomic.read_json(folder / TABLE_FILE)["combinations"]
  figures = []
  for name, chart in _CHARTS.items():
    lines = _lines(rows, name)
    if not lines:
      continue
    legend = [
        dataclasses.replace(line, label=_legend(line.label, rows))
        for line in lines
    ]
    picture = png.draw(chart, legend, ())
    atomic.write(folder / f"{chart.name}.png", picture)
    figures.append(_figure(chart, lines))
  style = page.resource("page.css")
  html = page.fill(
      page.resource("sweep.html"),
      policy=(
          f"default-src 'none'; img-src data:; style-src '{page.digest(style)}'"
      ),
      title=escape(folder.resolve().name),
      style=style,
      lead=escape(_lead(rows)),
      combinations=_html(_combinations(entries)),
      notes="".join(f'<p class="hint">{escape(note)}</p>' for note in NOTES),
      charts="".join(figures),
      seeds=_html(_seeds(entries)),
  )
  atomic.write(folder / "index.html", html)
  return folder / "index.html"


def _lead(rows: Sequence[sweep.Row]) -> str:
  """How much of the sweep is there."""
  planned = sum(len(row.combination.seeds) for row in rows)
  done = sum(len(row.outcomes) for row in rows)
  return f"{done} of {planned} runs finished, {len(rows)} combinations."


def _lines(rows: Sequence[sweep.Row], name: str) -> list[curves.Series]:
  """A line for each combination that has looks at dev."""
  lines = []
  for i, row in enumerate(rows):
    found = sweep.curve(row, name)
    if found is None:
      continue
    spent, mean, low, high = found
    known = not np.isnan(low).any()
    lines.append(
        curves.Series(
            label=str(i + 1),
            colour=i,
            dashed=False,
            steps=spent,
            values=mean,
            smoothed=mean,
            low=low if known else None,
            high=high if known else None,
        )
    )
  return lines


def _legend(number: str, rows: Sequence[sweep.Row]) -> str:
  """What a combination is called where there is room."""
  row = rows[int(number) - 1]
  return f"{number}: {row.combination.name} (n = {len(row.outcomes)})"


def _figure(chart: curves.Chart, lines: Sequence[curves.Series]) -> str:
  """A chart for the page."""
  last = max(float(line.steps[-1]) for line in lines)
  whole = curves.Stage(name="", first=0, last=round(last))
  drawing, _ = svg.chart(chart, lines, [whole])
  return (
      f"<figure><figcaption><span>{escape(chart.title)}</span></figcaption>"
      f"{drawing}</figure>"
  )


def _combinations(entries: Sequence[Mapping[str, Any]]) -> Table:
  """The table of combinations, as text."""
  names = _names(entries)
  header = ["#", "combination", "seeds"]
  for name in _TIMES:
    header += [name, f"{name}, by questions"]
  header += [_heading(name) for name in names]
  at = entries[0]["dev_accuracy_at"] if entries else {}
  header += [
      f"dev at {one['tokens']:,.0f} {name.replace('_', ' ')}"
      for name, one in at.items()
  ]
  rows = []
  for entry in entries:
    measures, n = entry["measures"], len(entry["finished_seeds"])
    cells = [
        str(entry["number"]),
        entry["name"],
        f"{n} of {len(entry['planned_seeds'])}",
    ]
    for name in _TIMES:
      cells += [
          _mean(measures.get(name), name, n),
          _questions(measures.get(name)),
      ]
    cells += [_mean(measures.get(name), name, n) for name in names]
    at = entry["dev_accuracy_at"].values()
    cells += [_mean(one, "accuracy", n) for one in at]
    rows.append(tuple(cells))
  return tuple(header), rows


def _seeds(entries: Sequence[Mapping[str, Any]]) -> Table:
  """The table of single runs, as text."""
  names = [*_TIMES, *_names(entries)]
  at = list(entries[0]["dev_accuracy_at"]) if entries else []
  header = ["#", "combination", "seed", *map(_heading, names)]
  header += [f"dev at {name.replace('_', ' ')}" for name in at]
  rows = []
  for entry in entries:
    for seed in map(str, entry["finished_seeds"]):
      cells = [str(entry["number"]), entry["name"], seed]
      cells += [
          _number(
              entry["measures"].get(name, {}).get("seeds", {}).get(seed), name
          )
          for name in names
      ]
      cells += [
          _number(entry["dev_accuracy_at"][name]["seeds"].get(seed), "accuracy")
          for name in at
      ]
      rows.append(tuple(cells))
  return tuple(header), rows


def _names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
  """Measures that have a column, in order; `calls` of 1 everywhere do not."""
  found = dict.fromkeys(name for one in entries for name in one["measures"])
  return [
      name
      for name in found
      if name not in _TIMES
      and not (name.startswith("calls/") and _is_one(entries, name))
  ]


def _is_one(entries: Sequence[Mapping[str, Any]], name: str) -> bool:
  """Whether a measure is 1 in every run, as the calls of a root are."""
  found = [one["measures"].get(name, {}).get("seeds", {}) for one in entries]
  return all(value == 1 for seeds in found for value in seeds.values())


def _heading(name: str) -> str:
  """A measure's name as a column's."""
  family, _, key = name.replace("_", " ").partition("/")
  return f"{family} of {key}" if key else family


def _mean(measure: Mapping[str, Any] | None, name: str, n: int) -> str:
  """A mean with its interval, and n where it is not of all runs."""
  if not measure or measure["mean"] is None:
    return _UNKNOWN
  text = _number(measure["mean"], name)
  if measure["over_seeds"]:
    text += f" {_interval(measure['over_seeds'], name)}"
  return text if measure["n"] == n else f"{text} (n = {measure['n']})"


def _questions(measure: Mapping[str, Any] | None) -> str:
  """The interval of an accuracy that comes from its questions, and their n."""
  if not measure or "over_questions" not in measure:
    return _UNKNOWN
  ends = _interval(measure["over_questions"], "accuracy")
  return f"{ends} (n = {measure['questions']})"


def _interval(ends: Sequence[float], name: str) -> str:
  """An interval as text."""
  low, high = (_number(end, name) for end in ends)
  return f"[{low}, {high}]"


def _number(value: float | None, name: str) -> str:
  """A number in the digits that its measure has."""
  if value is None:
    return _UNKNOWN
  if name in (*sweep.BUDGETS, "seconds"):
    return f"{value:,.0f}"
  if name == "change":
    return f"{value:+.3f}"
  return f"{value:.2f}" if name.startswith("calls/") else f"{value:.3f}"


def _markdown(table: Table) -> str:
  """A table in Markdown."""
  header, rows = table
  lines = [header, tuple("---" for _ in header), *rows]
  return "\n".join(
      f"| {' | '.join(spell(c).replace('|', chr(92) + '|') for c in line)} |"
      for line in lines
  )


def _html(table: Table) -> str:
  """A table in HTML."""
  header, rows = table
  head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
  body = "".join(
      f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
      for row in rows
  )
  return f"<table><tr>{head}</tr>{body}</table>"
