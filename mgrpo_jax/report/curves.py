"""Which curves a report shows, and their data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mgrpo_jax import metrics

MAX_POINTS = 400  # of a drawn line; longer series are averaged in bins
_DECADES = 300  # of a logarithmic axis, either way: floats end soon after
SMOOTHING = 1 / 12  # of a series' points, the width of the moving mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
  """One small plot.

  Attributes:
    name: of its file; lower case.
    title: what a reader sees.
    families: metrics drawn into it; a second one is drawn dashed.
    smooth: whether a moving mean is drawn over the single steps.
    log: whether the vertical axis is logarithmic.
    keys: the only keys shown; empty for all.
    x: what the horizontal axis counts.
  """

  name: str
  title: str
  families: tuple[str, ...]
  smooth: bool = False
  log: bool = False
  keys: tuple[str, ...] = ()
  x: str = "step"

  @property
  def unit(self) -> str:
    """The unit of its values; empty for pure numbers."""
    unit = metrics.METRICS[self.families[0]].unit
    return "" if unit == "1" else unit


CHARTS = (
    Chart(name="reward", title="Reward", families=("reward",), smooth=True),
    Chart(name="accuracy", title="Held-out accuracy", families=("accuracy",)),
    Chart(
        name="calls",
        title="Calls",
        families=("calls",),
        smooth=True,
    ),
    Chart(
        name="malformed",
        title="Malformed calls",
        families=("malformed",),
        smooth=True,
    ),
    Chart(
        name="kl",
        title="KL within a step, from the reference dashed",
        families=("old_kl", "kl"),
        smooth=True,
    ),
    Chart(
        name="clip_fraction",
        title="Clipped tokens",
        families=("clip_fraction",),
        smooth=True,
    ),
    Chart(
        name="logprob_gap",
        title="Sampler against trainer, largest dashed",
        families=("logprob_gap_mean", "logprob_gap_max"),
        log=True,
    ),
    Chart(name="entropy", title="Entropy", families=("entropy",), smooth=True),
    Chart(
        name="gradient_norm",
        title="Gradient norm",
        families=("gradient_norm",),
        smooth=True,
    ),
    Chart(name="nll", title="Imitation loss", families=("nll",), smooth=True),
    Chart(
        name="tokens_per_second",
        title="Throughput",
        families=("tokens_per_second",),
        smooth=True,
    ),
    Chart(
        name="seconds",
        title="Time of a step's phases",
        families=("seconds",),
        smooth=True,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
  """One line of a chart; n points, ascending in what its x counts.

  Attributes:
    label: the role, policy, split or phase; the title where there is none.
    colour: index into the palette; a name has one colour in all charts.
    dashed: whether it belongs to the chart's second family.
    steps: [n] the steps.
    values: [n] finite.
    smoothed: [n] moving mean; equal to `values` where nothing is smoothed.
    low: [n] lower end of the 95% interval, or None.
    high: [n] upper end of the 95% interval, or None.
  """

  label: str
  colour: int
  dashed: bool
  steps: Float[np.ndarray, " n"]
  values: Float[np.ndarray, " n"]
  smoothed: Float[np.ndarray, " n"]
  low: Float[np.ndarray, " n"] | None
  high: Float[np.ndarray, " n"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A stretch of the run: its curriculum stage and its steps."""

  name: str
  first: int
  last: int


def stages(rows: Iterable[Mapping[str, Any]]) -> list[Stage]:
  """Finds the stretches of a run.

  Args:
    rows: of `writer.read_metrics`, ascending.

  Returns:
    The stages in the order they were trained.
  """
  found: list[Stage] = []
  for row in rows:
    name, step = str(row.get("stage", "")), row["step"]
    if found and found[-1].name == name:
      found[-1] = dataclasses.replace(found[-1], last=step)
    else:
      found.append(Stage(name=name, first=step, last=step))
  return found


def series(rows: Sequence[Mapping[str, Any]], chart: Chart) -> list[Series]:
  """Collects the lines of a chart.

  Args:
    rows: of `writer.read_metrics`, ascending.
    chart: what to draw.

  Returns:
    A line for each family and key with at least one finite value; in the
    order in which the keys first appear.
  """
  colours = palette(rows)
  lines = []
  for family in chart.families:
    for key in _keys(rows, family):
      if chart.keys and key not in chart.keys:
        continue
      dashed = family != chart.families[0]
      line = _series(rows, chart, family, key, colours[key], dashed)
      if line is not None:
        lines.append(line)
  return lines


def shares(rows: Iterable[Mapping[str, Any]], family: str) -> dict[str, float]:
  """Averages shares that add up to 1 in every row that has any.

  Args:
    rows: of `writer.read_metrics`.
    family: of the metric; its keys are whole numbers.

  Returns:
    Key -> mean share, of keys that are such and values that are finite.
  """
  prefix, count = f"{family}/", 0
  sums: dict[str, float] = {}
  for row in rows:
    found = {
        name.removeprefix(prefix): float(value)
        for name, value in row.items()
        if name.startswith(prefix)
        and name.removeprefix(prefix).isdecimal()
        and isinstance(value, int | float)
        and 0 <= value <= 1
    }
    count += bool(found)
    for key, value in found.items():
      sums[key] = sums.get(key, 0.0) + value
  return {key: total / count for key, total in sums.items()}


def palette(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  """Gives every key a colour, so that a name has the same one everywhere.

  Args:
    rows: of `writer.read_metrics`, ascending.

  Returns:
    Key -> index. Roles and policies count from 0 together; every other kind of
    key, as splits or phases, counts from 0 as well, for charts are of one kind.
  """
  kinds: dict[str, dict[str, None]] = {"team": {}}
  for family, metric in metrics.METRICS.items():
    kind = "team" if metric.per in ("role", "policy") else metric.per
    kinds.setdefault(kind, {}).update(dict.fromkeys(_keys(rows, family)))
  colours: dict[str, int] = {}
  for keys in kinds.values():
    new = [key for key in keys if key not in colours]
    colours |= {key: i for i, key in enumerate(new)}
  return colours


def ticks(low: float, high: float, *, count: int) -> list[float]:
  """Chooses round numbers within a range.

  Args:
    low: lower end.
    high: upper end, above `low`.
    count: about how many.

  Returns:
    Multiples of 1, 2 or 5 times a power of ten within the range.
  """
  rough = (high - low) / max(count, 1)
  power = 10.0 ** math.floor(math.log10(rough))
  step = power * min(
      (m for m in (1, 2, 5, 10) if m * power >= rough * 0.999), default=10
  )
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def value_range(lines: Sequence[Series], *, log: bool) -> tuple[float, float]:
  """Chooses the vertical range of a chart.

  Args:
    lines: at least one.
    log: whole decades around the positive values; else from 0, where no
      value is negative, to a little above the largest.

  Returns:
    The lower and the upper end, never equal.
  """
  parts = [
      part
      for line in lines
      for part in (line.values, line.low, line.high)
      if part is not None
  ]
  values = np.concatenate(parts)
  if log:
    positive = values[values > 0]
    low, high = np.log10(positive.min()), np.log10(positive.max())
    bottom = min(max(math.floor(low), -_DECADES), _DECADES - 1)
    top = min(max(math.floor(high), bottom) + 1, _DECADES)
    return 10.0**bottom, 10.0**top
  low, high = min(0.0, float(values.min())), float(values.max())
  margin = 0.06 * (high - low)
  if margin == 0:
    return low, high + 1.0
  return low - (margin if low < 0 else 0.0), high + margin


def is_log(chart: Chart, lines: Sequence[Series]) -> bool:
  """Whether a chart's axis is logarithmic: zeros alone have no logarithm."""
  return chart.log and any((line.values > 0).any() for line in lines)


def short(value: float) -> str:
  """Writes a number in a few characters.

  Args:
    value: finite.

  Returns:
    `0.25`, `1,200`, `38k`, `2.1M` or `3e-07`.
  """
  size = abs(value)
  if size == 0:
    return "0"
  if size < 1e-3:
    digits, power = f"{value:.1e}".split("e")  # ticks are halves of others
    return f"{float(digits):g}e{power}"
  for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
    if size >= limit:
      scale = 1e3 if unit == "k" else limit
      return f"{value / scale:.3g}{unit}"
  return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def _keys(rows: Sequence[Mapping[str, Any]], family: str) -> list[str]:
  """Keys of a family in order of appearance; one empty key if it has none."""
  if not metrics.METRICS[family].per:
    return [""] if any(family in row for row in rows) else []
  prefix = family + "/"
  found: dict[str, None] = {}
  for row in rows:
    for name in row:
      if name.startswith(prefix):
        found[name.removeprefix(prefix)] = None
  return list(found)


def _series(
    rows: Sequence[Mapping[str, Any]],
    chart: Chart,
    family: str,
    key: str,
    colour: int,
    dashed: bool,
) -> Series | None:
  """The line of one metric; None where it has no finite value."""
  name = f"{family}/{key}" if key else family
  points = [
      (row["step"], row[name], *_interval(row, key, row[name]))
      for row in rows
      if isinstance(row.get(name), int | float) and math.isfinite(row[name])
  ]
  if not points:
    return None
  steps, values, low, high = _thin(np.array(points, np.float64)).T
  has_interval = family == "accuracy"
  return Series(
      label=key or chart.title,
      colour=colour,
      dashed=dashed,
      steps=steps,
      values=values,
      smoothed=_moving_mean(values, steps, rows) if chart.smooth else values,
      low=low if has_interval else None,
      high=high if has_interval else None,
  )


def _interval(
    row: Mapping[str, Any], key: str, value: float
) -> tuple[float, float]:
  """The 95% interval written beside an accuracy; its value where none is."""
  low = row.get(f"accuracy_low/{key}", value)
  high = row.get(f"accuracy_high/{key}", value)
  known = math.isfinite(low) and math.isfinite(high)
  return (low, high) if known else (value, value)


def _thin(points: np.ndarray) -> np.ndarray:
  """Averages neighbours until at most MAX_POINTS rows are left."""
  if len(points) <= MAX_POINTS:
    return points
  bins = np.array_split(points, MAX_POINTS)
  return np.stack([chunk.mean(axis=0) for chunk in bins])


def _moving_mean(
    values: np.ndarray, steps: np.ndarray, rows: Sequence[Mapping[str, Any]]
) -> np.ndarray:
  """Centred mean over a twelfth of the series, never across stages."""
  half = int(len(values) * SMOOTHING / 2)
  if half == 0:
    return values
  starts = [stage.first for stage in stages(rows)]
  bounds = np.append(np.searchsorted(steps, starts), len(values))
  stage_of = np.searchsorted(bounds, np.arange(len(values)), side="right") - 1
  at = np.arange(len(values))
  first = np.maximum(at - half, bounds[stage_of])
  last = np.minimum(at + half + 1, bounds[stage_of + 1])
  total = np.concatenate([[0.0], np.cumsum(values)])
  return (total[last] - total[first]) / (last - first)
