"""Curves and intervals as SVG that takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mgrpo_jax.report import curves
from mgrpo_jax.report.text import escape

WIDTH, HEIGHT = 460, 212
LEFT, RIGHT, TOP, BOTTOM = 46, 92, 20, 24
PALETTE = 6  # colours the style sheet defines
_PATTERNS = 4  # of lines, one whole: it defines three that are broken
_LABEL_GAP = 13.0


def chart(
    plot: curves.Chart,
    lines: Sequence[curves.Series],
    stages: Sequence[curves.Stage],
) -> tuple[str, dict[str, Any]]:
  """Draws a chart.

  Args:
    plot: the chart.
    lines: its lines, at least one. Past the palette's end colours come again,
      in lines that are broken another way.
    stages: the run's stages, at least one.

  Returns:
    The SVG element, and what a pointer over it needs: the points of each
    line and the horizontal scale.
  """
  first, last = stages[0].first, max(stages[-1].last, stages[0].first + 1)
  log = curves.is_log(plot, lines)
  low, high = curves.value_range(lines, log=log)
  scale = _Scale(first, last, low, high, log)
  parts = [
      f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
      f' aria-label="{escape(plot.title)}">',
      *_stage_marks(stages, scale),
      *_axes(scale),
      *(_band(line, scale) for line in lines if line.low is not None),
      *(_line(line, scale) for line in lines),
      *_labels(lines, scale),
      '<line class="cursor" y1="20" y2="188"/></svg>',
  ]
  pointer = {
      "x": [LEFT, WIDTH - RIGHT],
      "steps": [first, last],
      "unit": plot.unit,
      "lines": [
          {
              "label": line.label + (" (dashed)" if line.dashed else ""),
              "colour": line.colour % PALETTE,
              "steps": _rounded(line.steps),
              "values": _rounded(line.values),
          }
          for line in lines
      ],
  }
  return "".join(parts), pointer


def intervals(
    rows: Sequence[tuple[str, float, tuple[float, float], int]],
) -> str:
  """Draws accuracies as points on their intervals, one below the other.

  Args:
    rows: (label, accuracy, its 95% interval, n).

  Returns:
    The SVG element; its axis runs from 0 to 1.
  """
  width, left, right, pitch = 620, 64, 150, 34
  height = pitch * len(rows) + 26
  span = width - left - right

  def x(share: float) -> float:
    return left + span * share

  parts = [
      f'<svg class="intervals" viewBox="0 0 {width} {height}" role="img"'
      ' aria-label="Accuracy before and after">'
  ]
  for share in (0.0, 0.25, 0.5, 0.75, 1.0):
    parts.append(
        f'<line class="grid" x1="{x(share):.1f}" x2="{x(share):.1f}" y1="4"'
        f' y2="{height - 20}"/><text class="tick" text-anchor="middle"'
        f' x="{x(share):.1f}" y="{height - 6}">{share:.0%}</text>'
    )
  for i, (label, share, (low, high), n) in enumerate(rows):
    y = pitch * i + 22
    parts.append(
        f'<text class="row" x="0" y="{y + 4}">{escape(label)}</text>'
        f'<line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}"'
        f' y2="{y}"/><circle class="dot" cx="{x(share):.1f}" cy="{y}" r="5"/>'
        f'<text class="value" x="{left + span + 14}" y="{y + 5}">'
        f'{share:.1%}<tspan class="tick" dx="8">n = {n}</tspan></text>'
    )
  return "".join(parts) + "</svg>"


def bars(rows: Sequence[tuple[str, float]], title: str) -> str:
  """Draws shares as bars, one below the other.

  Args:
    rows: (label, share in [0, 1]).
    title: what a screen reader says.

  Returns:
    The SVG element.
  """
  width, left, right, pitch = 460, 92, 60, 24
  parts = [
      f'<svg class="intervals" viewBox="0 0 {width} {pitch * len(rows)}"'
      f' role="img" aria-label="{escape(title)}">'
  ]
  for i, (label, share) in enumerate(rows):
    y, end = pitch * i + 12, left + share * (width - left - right)
    parts.append(
        f'<text class="row" x="0" y="{y + 4}">{escape(label)}</text>'
        f'<line class="whisker" x1="{left}" x2="{end:.1f}" y1="{y}" y2="{y}"/>'
        f'<text class="tick" x="{end + 7:.1f}" y="{y + 4}">{share:.1%}</text>'
    )
  return "".join(parts) + "</svg>"


class _Scale:
  """From steps and values to the coordinates of a chart."""

  def __init__(
      self, first: float, last: float, low: float, high: float, log: bool
  ):
    """Keeps the ranges, logarithms taken."""
    self.first, self.last, self.low, self.high = first, last, low, high
    self.log = log
    self._bottom = math.log10(low) if log else low
    self._top = math.log10(high) if log else high

  def x(self, steps: Any) -> Any:
    """Horizontal place of steps."""
    share = (steps - self.first) / (self.last - self.first)
    return LEFT + share * (WIDTH - LEFT - RIGHT)

  def y(self, values: Any) -> Any:
    """Vertical place of values; zeros stand on a logarithmic axis' floor."""
    if self.log:
      values = np.log10(np.maximum(values, self.low))
    share = (values - self._bottom) / (self._top - self._bottom)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

  def y_ticks(self) -> list[float]:
    """The values that are labelled."""
    if not self.log:
      return curves.ticks(self.low, self.high, count=4)
    decades = range(round(self._bottom), round(self._top) + 1)
    return [10.0**d for d in decades[:: max(1, len(decades) // 4)]]


def _axes(scale: _Scale) -> list[str]:
  """Grid lines and their labels."""
  end = WIDTH - RIGHT
  parts = []
  for value in scale.y_ticks():
    y = float(scale.y(value))
    parts.append(
        f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}"'
        f' y2="{y:.1f}"/><text class="tick" text-anchor="end"'
        f' x="{LEFT - 7}" y="{y + 3.5:.1f}">{curves.short(value)}</text>'
    )
  for step in curves.ticks(scale.first, scale.last, count=5):
    if step == int(step):
      parts.append(
          '<text class="tick" text-anchor="middle"'
          f' x="{scale.x(step):.1f}" y="{HEIGHT - 7}">'
          f"{curves.short(step)}</text>"
      )
  return parts


def _stage_marks(stages: Sequence[curves.Stage], scale: _Scale) -> list[str]:
  """A hairline where each stage begins, and its name where there is room."""
  parts = []
  for i, stage in enumerate(stages):
    start = float(scale.x(stage.first))
    following = stages[i + 1].first if i + 1 < len(stages) else stage.last
    if i:
      parts.append(
          f'<line class="stage" x1="{start:.1f}" x2="{start:.1f}" y1="6"'
          f' y2="{HEIGHT - BOTTOM}"/>'
      )
    if scale.x(following) - start > 6.2 * len(stage.name):
      parts.append(
          f'<text class="stage" x="{start + 4:.1f}" y="13">'
          f"{escape(stage.name)}</text>"
      )
  return parts


def _line(line: curves.Series, scale: _Scale) -> str:
  """A line; thin single steps below it where it is smoothed."""
  colour = f"c{line.colour % PALETTE}"
  again = line.colour // PALETTE % _PATTERNS
  dash = " dashed" * line.dashed + f" again{again}" * (again > 0)
  xs = scale.x(line.steps)
  parts = []
  if len(xs) == 1:
    y = float(scale.y(line.values)[0])
    return f'<circle class="{colour}" cx="{xs[0]:.1f}" cy="{y:.1f}" r="3"/>'
  if line.smoothed is not line.values:
    raw = _path(xs, scale.y(line.values))
    parts.append(f'<path class="raw {colour}" d="{raw}"/>')
  smooth = _path(xs, scale.y(line.smoothed))
  parts.append(f'<path class="line {colour}{dash}" d="{smooth}"/>')
  return "".join(parts)


def _band(line: curves.Series, scale: _Scale) -> str:
  """The area between the ends of the intervals."""
  if line.low is None or line.high is None:
    return ""
  xs = scale.x(line.steps)
  there = _path(xs, scale.y(line.high))
  back = _path(xs[::-1], scale.y(line.low)[::-1])
  colour = f"c{line.colour % PALETTE}"
  return f'<path class="band {colour}" d="{there}L{back[1:]}Z"/>'


def _labels(lines: Sequence[curves.Series], scale: _Scale) -> list[str]:
  """Names of the lines where they end, moved apart where they would meet."""
  solid = [line for line in lines if not line.dashed] or list(lines)
  ends = sorted(
      ((float(scale.y(line.smoothed[-1])), line) for line in solid),
      key=lambda end: end[0],
  )
  places: list[float] = []
  for y, _ in ends:
    places.append(max(y, places[-1] + _LABEL_GAP) if places else y)
  excess = max(0.0, places[-1] - (HEIGHT - BOTTOM))
  return [
      f'<text class="label c{line.colour % PALETTE}"'
      f' x="{scale.x(line.steps[-1]) + 7:.1f}"'
      f' y="{place - excess + 4:.1f}">{escape(line.label[:14])}</text>'
      for place, (_, line) in zip(places, ends, strict=True)
  ]


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
  """An SVG path through points."""
  return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def _rounded(values: Float[np.ndarray, " n"]) -> list[float]:
  """Five significant digits, which is what a pointer's label shows."""
  return [float(f"{value:.5g}") for value in values]
