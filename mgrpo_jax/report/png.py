"""Curves as PNG files, for slides."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax import atomic
from mgrpo_jax.report import curves
from mgrpo_jax.report.text import spell

COLOURS = ("#2f5d8a", "#b5562b", "#4d7a4a", "#7e66b3", "#471f38", "#63757b")
DPI = 160
_GREY = "#77736a"
_DASHES = ("-", "-.", ":", (0, (5, 1)))
_LONG = 24  # characters of a label that has no room within a chart
_LEGEND_ROW = 0.19  # inches


def write(
    rows: Sequence[Mapping[str, Any]], directory: str | os.PathLike[str]
) -> list[pathlib.Path]:
  """Draws every chart that has data.

  Args:
    rows: of `writer.read_metrics`, ascending.
    directory: where `NAME.png` go.

  Returns:
    The files written.

  Raises:
    atomic.StorageError: a file cannot be written.
  """
  stages = curves.stages(rows)
  written = []
  for chart in curves.CHARTS:
    lines = curves.series(rows, chart)
    if lines:
      path = pathlib.Path(directory) / f"{chart.name}.png"
      atomic.write(path, draw(chart, lines, stages))
      written.append(path)
  return written


def draw(
    chart: curves.Chart,
    lines: Sequence[curves.Series],
    stages: Sequence[curves.Stage],
) -> bytes:
  """Draws one chart.

  Args:
    chart: what to draw.
    lines: at least one. Past the palette's end colours come again, in lines
      that are broken another way.
    stages: of the run; a hairline stands where one begins.

  Returns:
    The bytes of its file.
  """
  # Imported here: matplotlib takes longer to import than this page to write.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  below = len(lines) if any(len(one.label) > _LONG for one in lines) else 0
  size = (6.4, 3.4 + below * _LEGEND_ROW)
  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  log = curves.is_log(chart, lines)
  for line in lines:
    colour = COLOURS[line.colour % len(COLOURS)]
    if line.smoothed is not line.values:
      axes.plot(line.steps, line.values, color=colour, alpha=0.22, lw=0.8)
    again = line.colour // len(COLOURS) % len(_DASHES)
    axes.plot(
        line.steps,
        line.smoothed,
        color=colour,
        lw=1.2 if line.dashed else 1.8,
        ls="--" if line.dashed and not again else _DASHES[again],
        marker="o" if len(line.steps) < 2 else None,
        label=None if line.dashed else _literal(line.label),
    )
    if line.low is not None and line.high is not None:
      axes.fill_between(
          line.steps, line.low, line.high, color=colour, alpha=0.15, lw=0
      )
  if log:
    axes.set_yscale("log")
  axes.set_ylim(*curves.value_range(lines, log=log))
  for stage in stages[1:]:
    axes.axvline(stage.first, color=_GREY, lw=0.7, ls=":")
  unit = f" [{chart.unit}]" if chart.unit else ""
  axes.set_title(chart.title + unit, loc="left", fontsize=11)
  axes.set_xlabel(chart.x, color=_GREY)
  axes.tick_params(colors=_GREY)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e4e0d6", lw=0.7)
  if below:
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
  else:
    axes.legend(frameon=False, fontsize=9)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=DPI)
  return buffer.getvalue()


def _literal(label: str) -> str:
  """A label in which matplotlib reads no mathematics and hides nothing."""
  return spell(label).replace("$", r"\$").lstrip("_") or "-"
