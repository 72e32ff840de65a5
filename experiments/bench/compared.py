"""What players told, side by side: a table, and a file that keeps it."""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax import atomic


def table(told: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
  """Compares players with the first.

  Args:
    told: of `measure`.

  Returns:
    Lines in Markdown: tokens a second where tokens were counted, seconds where
    not, and how many times faster the first was, round by round.
  """
  first = next(iter(told.values()))
  unit = "tokens/s" if "tokens" in first[0] else "s"
  lines = [f"| player | {unit} | first over this |", "|---|---|---|"]
  for name, rounds in told.items():
    values = [
        one["tokens"] / one["seconds"] if "tokens" in one else one["seconds"]
        for one in rounds
    ]
    ratios = [
        there["seconds"] / here["seconds"]
        for here, there in zip(first, rounds, strict=True)
    ]
    lines.append(f"| {name} | {spread(values)} | {spread(ratios)} |")
  return lines


def spread(values: Sequence[float]) -> str:
  """Writes median, smallest and largest.

  Args:
    values: at least one.

  Returns:
    Three significant digits of each.
  """
  middle = statistics.median(values)
  return f"{middle:.3g} ({min(values):.3g} to {max(values):.3g})"


def keep(
    path: pathlib.Path,
    key: str,
    found: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
  """Adds what was measured to what there is.

  Args:
    path: JSON file, which need not exist.
    key: of what was measured.
    found: what was measured; gets commit, machine and arguments.
    arguments: of the command.
  """
  there = json.loads(path.read_text()) if path.exists() else {}
  commit = subprocess.run(
      ["git", "rev-parse", "--short", "HEAD"],
      capture_output=True,
      text=True,
      check=False,
  ).stdout.strip()
  found |= {
      "commit": commit,
      "machine": platform.processor() or platform.machine(),
      "arguments": {name: str(one) for name, one in vars(arguments).items()},
  }
  atomic.write_json(path, {**there, key: found})
