"""The outcome of a run, `summary.json`, as a report reads it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from mgrpo_jax import atomic
from mgrpo_jax.report import shapes
from mgrpo_jax.report.shapes import is_count, is_number

_NUMBERS = {
    "steps": is_count,
    "seconds": is_number,
    "compilations": is_count,
    "corrupt_records": is_count,
    "peak_rss_bytes": is_count,
    "commit": shapes.is_text,
    "seed": is_count,
}
_TOKENS = {"generated": is_count, "trained": is_count, "evaluated": is_count}
SCORE = shapes.object_of(
    {
        "accuracy": shapes.is_share,
        "n": is_count,
        "ci95": shapes.tuple_of(shapes.is_share, shapes.is_share),
    }
)
_SCORES = {"before": SCORE, "after": SCORE}
_PARTS: Mapping[str, Mapping[str, shapes.Check]] = {
    "": _NUMBERS,
    "tokens": _TOKENS,
    "eval": _SCORES,
}


def read(path: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
  """Reads a summary; what is damaged in it is named and left out.

  Args:
    path: the file; a run under way has none.

  Returns:
    What is whole of it, empty where there is none, and a line for each
    problem.
  """
  if not path.exists():
    return {}, ()
  try:
    value = atomic.read_json(path)
  except atomic.StorageError as error:
    return {}, (str(error),)
  if not isinstance(value, dict):
    return {}, (f"{path} is not a JSON object",)
  problems = []
  for part, checks in _PARTS.items():
    fields = value.get(part, {}) if part else value
    if not isinstance(fields, dict):
      del value[part]
      problems.append(f"{path}: {part} is no object")
      continue
    for name in shapes.misfits(fields, checks):
      if name in fields:  # else a run of another version did not write it
        del fields[name]
        where = f"{part}.{name}" if part else name
        problems.append(f"{path}: {where} does not hold what it should")
  return value, tuple(problems)
