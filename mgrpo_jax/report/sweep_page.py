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
CHARTS = {
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
      markdown(_combinations(entries)),
      "\n".join(f"- {note}" for note in NOTES),
      "## Seeds",
      markdown(_seeds(entries)),
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
  for name, chart in CHARTS.items():
    found = lines(rows, name)
    if not found:
      continue
    picture = png.draw(chart, with_names(found, rows), ())
    atomic.write(folder / f"{chart.name}.png", picture)
    figures.append(_figure(chart, found))
  style = page.resource("page.css")
  whole = page.fill(
      page.resource("sweep.html"),
      policy=(
          f"default-src 'none'; img-src data:; style-src '{page.digest(style)}'"
      ),
      title=escape(folder.resolve().name),
      style=style,
      lead=escape(_lead(rows)),
      combinations=html(_combinations(entries)),
      notes="".join(f'<p class="hint">{escape(note)}</p>' for note in NOTES),
      charts="".join(figures),
      seeds=html(_seeds(entries)),
  )
  atomic.write(folder / "index.html", whole)
  return folder / "index.html"


def _lead(rows: Sequence[sweep.Row]) -> str:
  """How much of the sweep is there."""
  planned = sum(len(row.combination.seeds) for row in rows)
  done = sum(len(row.outcomes) for row in rows)
  return f"{done} of {planned} runs finished, {len(rows)} combinations."


def lines(rows: Sequence[sweep.Row], name: str) -> list[curves.Series]:
  """Makes a line for each combination that has looks at dev.

  Args:
    rows: of the sweep.
    name: of what is spent, a key of CHARTS.

  Returns:
    Mean dev accuracy with its t interval; labels are numbers from 1.
  """
  drawn = []
  for i, row in enumerate(rows):
    found = sweep.curve(row, name)
    if found is None:
      continue
    spent, mean, low, high = found
    known = not np.isnan(low).any()
    drawn.append(
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
  return drawn


def with_names(
    numbered: Sequence[curves.Series], rows: Sequence[sweep.Row]
) -> list[curves.Series]:
  """Labels lines for where there is room.

  Args:
    numbered: what `lines` returned.
    rows: of the sweep.

  Returns:
    The same lines, labelled with number, name and seeds.
  """
  named = []
  for line in numbered:
    row = rows[int(line.label) - 1]
    label = f"{line.label}: {row.combination.name} (n = {len(row.outcomes)})"
    named.append(dataclasses.replace(line, label=label))
  return named


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
          mean_text(measures.get(name), name, n),
          questions_text(measures.get(name)),
      ]
    cells += [mean_text(measures.get(name), name, n) for name in names]
    at = entry["dev_accuracy_at"].values()
    cells += [mean_text(one, "accuracy", n) for one in at]
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


def mean_text(measure: Mapping[str, Any] | None, name: str, n: int) -> str:
  """Spells a mean with its interval, and n where it is not of all runs.

  Args:
    measure: what `sweep.measure` returned; None where there is none.
    name: of the measure.
    n: finished runs.

  Returns:
    Text, `0.600 [0.352, 0.848] (n = 3)` at most.
  """
  if not measure or measure["mean"] is None:
    return _UNKNOWN
  text = _number(measure["mean"], name)
  if measure["over_seeds"]:
    text += f" {_interval(measure['over_seeds'], name)}"
  return text if measure["n"] == n else f"{text} (n = {measure['n']})"


def questions_text(measure: Mapping[str, Any] | None) -> str:
  """Spells the interval of an accuracy that comes from its questions.

  Args:
    measure: what `sweep.measure` returned; None where there is none.

  Returns:
    Text, with the number of questions.
  """
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
  if name in ("change", "difference"):
    return f"{value:+.3f}"
  return f"{value:.2f}" if name.startswith("calls/") else f"{value:.3f}"


def markdown(table: Table) -> str:
  """Writes a table in Markdown.

  Args:
    table: header and rows, any text.

  Returns:
    Its lines.
  """
  header, rows = table
  lines = [header, tuple("---" for _ in header), *rows]
  return "\n".join(
      f"| {' | '.join(spell(c).replace('|', chr(92) + '|') for c in line)} |"
      for line in lines
  )


def html(table: Table) -> str:
  """Writes a table in HTML.

  Args:
    table: header and rows, any text.

  Returns:
    The element.
  """
  header, rows = table
  head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
  body = "".join(
      f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
      for row in rows
  )
  return f"<table><tr>{head}</tr>{body}</table>"
