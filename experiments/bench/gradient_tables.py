"""Tables of what the estimators of the team game estimate, and their file."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax import atomic
from mgrpo_jax.report import shapes

COLUMNS = (
    "role",
    "split",
    "law",
    "attempts",
    "tasks",
    "rollouts",
    "slots",
    "alignment",
    "normaliser",
    "exact",
    "scale",
    "scale_error",
    "cosine",
    "angle_error",
    "cosine_true",
    "cosine_by_rollout",
    "noise",
    "draws",
    "gap",
)
DIGITS = 4  # that are kept of a figure
Row = Mapping[str, Any]

_ROW = shapes.tuple_of(
    *[shapes.is_text] * 3,
    *[shapes.is_count] * 4,
    shapes.optional(shapes.is_text),  # none where two are set side by side
    shapes.is_text,
    lambda value: isinstance(value, bool),
    *[shapes.optional(shapes.is_number)] * (len(COLUMNS) - 10),
)
_FILE = shapes.object_of(
    {
        "columns": shapes.list_of(shapes.is_text),
        "tables": shapes.mapping_of(
            lambda rows: bool(rows) and shapes.list_of(_ROW)(rows)
        ),
    }
)


def write(
    path: str | pathlib.Path, rows: Sequence[Row], *, setup: Mapping[str, Any]
) -> None:
  """Writes rows as JSON, one to a line.

  Args:
    path: the file; an existing one is replaced.
    rows: of all tables; a column that a row lacks is null.
    setup: what else to say of all of them.
  """
  tables = [
      f"{json.dumps(title)}: [\n" + ",\n".join(map(_line, found)) + "\n]"
      for title, found in _by_title(rows).items()
  ]
  head = json.dumps({**setup, "columns": COLUMNS})[:-1]
  body = ",\n".join(tables)
  atomic.write(path, f'{head}, "tables": {{\n{body}\n}}}}\n')


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Reads what `write` wrote.

  Args:
    path: the file.

  Returns:
    The rows.

  Raises:
    ValueError: the file is something else.
    OSError: it cannot be read.
  """
  found = atomic.read_json(pathlib.Path(path))
  if not _FILE(found) or found["columns"] != list(COLUMNS):
    raise ValueError(f"{path}: must be a file of experiments.bench.gradients")
  return [
      {"table": title, **dict(zip(COLUMNS, row, strict=True))}
      for title, rows in found["tables"].items()
      for row in rows
  ]


def markdown(rows: Sequence[Row]) -> str:
  """Lays rows out, each table under its title.

  Args:
    rows: of all tables.

  Returns:
    The tables.
  """
  return "\n".join(
      f"\n{title}\n\n{_table(found)}"
      for title, found in _by_title(rows).items()
  )


def _by_title(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Sorts rows into their tables."""
  tables: dict[str, list[Row]] = {}
  for row in rows:
    tables.setdefault(row["table"], []).append(row)
  return tables


def _line(row: Row) -> str:
  """One row as JSON, figures rounded."""
  values = [row.get(name) for name in COLUMNS]
  return json.dumps(
      [
          float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
          for value in values
      ],
      allow_nan=False,
      separators=(",", ":"),
  )


def _table(rows: Sequence[Row]) -> str:
  """The rows in Markdown, without the columns that say the same in all."""
  varying = [
      name
      for name in COLUMNS[1:8]  # from the split to the alignment
      if len({row.get(name) for row in rows}) > 1
  ]
  cells = [
      {name: str(row[name]) for name in (*varying, "normaliser")}
      | _figures(row)
      for row in rows
  ]
  lines = [f"| {' | '.join(cells[0])} |", "|---" * len(cells[0]) + "|"]
  lines += [f"| {' | '.join(cell.values())} |" for cell in cells]
  return "\n".join(lines)


def _figures(row: Row) -> dict[str, str]:
  """One row's numbers for a reader."""
  if row.get("gap") is not None:
    return {"gap": f"{row['gap']:.4f}"}
  errors = ("", "")
  if not row["exact"]:
    # A mean that is off by an angle has its cosine lowered by half its square.
    lowered = 1 - math.cos(row["angle_error"])
    errors = (f" ±{row['scale_error']:.3f}", f" ±{lowered:.4f}")
  return {
      "scale": f"{row['scale']:.3f}{errors[0]}",
      "cosine": f"{row['cosine']:.4f}{errors[1]}",
      "to ∇J": f"{row['cosine_true']:.4f}",
      "by rollout": f"{row['cosine_by_rollout']:.4f}",
      "noise": f"{row['noise']:.2f}",
      "draws": f"{row['draws']:.1%}",
  }
