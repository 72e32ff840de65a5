"""The live progress line, and the table that a run ends with."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TextIO

from mgrpo_jax.metrics import Accuracy
from mgrpo_jax.report import alerts
from mgrpo_jax.report.live import Field, Line, printable

WINDOW = 32  # steps that the estimate of the time left looks back on
_STEP = "step"
_LETTERS = (4, 1)  # of a name, at least, where names are cut


class Progress:
  """Shows where a run stands, on one line.

  On a terminal the line is rewritten in place, in words that fit its width.
  Anywhere else (a file, a pipe) plain lines come at most every few seconds, and
  at the first step, the last one, and where the stage changes.
  """

  def __init__(
      self,
      stream: TextIO,
      *,
      total_steps: int,
      every_seconds: float,
      split: str,
      limits: Mapping[str, float] | None = None,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      stream: where the line goes, such as sys.stderr.
      total_steps: number of the run's last step.
      every_seconds: least time between plain lines, seconds.
      split: the held-out split whose accuracy is shown.
      limits: metrics that only grow, by name, and where each of them would
        end the run before its last step.
      clock: seconds that never go backwards; another one in tests.
    """
    self._line = Line(stream, every_seconds=every_seconds, clock=clock)
    self._total = total_steps
    self._ends = {**(limits or {}), _STEP: float(total_steps)}
    self._split = split
    self._clock = clock
    self._stage = ""
    self._accuracies: dict[str, float] = {}  # last measured
    self._paces: dict[str, float] = {}  # seconds by what ends the run
    # (time, how far each of what ends the run had come) after the last steps.
    self._past: collections.deque[tuple[float, dict[str, float]]] = (
        collections.deque(maxlen=WINDOW + 1)
    )

  def update(self, step: int, stage: str, values: Mapping[str, float]) -> None:
    """Shows a step.

    Args:
      step: the step just finished.
      stage: name of the curriculum's stage.
      values: metrics by name. Accuracies, which are not measured at every
        step, keep their last value; nothing else does.
    """
    now = self._clock()
    turned = stage != self._stage
    if turned:
      # Steps of another stage cost something else: measure anew.
      self._past.clear()
    self._stage = stage
    self._accuracies |= {
        name: value
        for name, value in values.items()
        if name.startswith("accuracy/")
    }
    come = {_STEP: float(step), **values}
    self._past.append((now, {name: come.get(name, 0.0) for name in self._ends}))
    fields = progress_fields(
        step=step,
        total_steps=self._total,
        stage=stage,
        values=self._accuracies | dict(values),
        split=self._split,
        seconds_left=self._seconds_left(),
    )
    self._line.show(fields, force=turned or step >= self._total)

  def _seconds_left(self) -> float:
    """Until the first end is reached, at the pace of the last steps."""
    (before, earlier), (now, come) = self._past[0], self._past[-1]
    self._paces |= {
        name: (now - before) / (come[name] - earlier[name])
        for name in self._ends
        if come[name] > earlier[name]
    }
    left = [
        pace * max(self._ends[name] - come[name], 0.0)
        for name, pace in self._paces.items()
    ]
    return min(left, default=math.nan)

  def note(self, text: str) -> None:
    """Prints a line of its own above the progress line.

    Args:
      text: what to say.
    """
    self._line.note(text)

  def close(self) -> None:
    """Leaves the last line standing; what is printed next starts below."""
    self._line.close()


def progress_fields(
    *,
    step: int,
    total_steps: int,
    stage: str,
    values: Mapping[str, float],
    split: str,
    seconds_left: float,
) -> list[Field]:
  """Chooses what the progress line says.

  Args:
    step: the step just finished.
    total_steps: number of the last step.
    stage: name of the curriculum's stage.
    values: metrics by name; fields without a value are left out.
    split: the held-out split whose accuracy is shown.
    seconds_left: estimate, NaN where there is none yet.

  Returns:
    Fields in the order of the line.
  """
  fields: list[Field] = [(0, (f"{stage} {step}/{total_steps}",))]
  rewards = _keyed(values, "reward")
  if rewards:
    fields.append((1, (f"reward {_named(rewards, 2)}", *_briefly(rewards))))
  found = alerts.find(values)
  if found:
    more = f" +{len(found) - 1}" if len(found) > 1 else ""
    fields.append((1, (f"! {found[0].text}{more}", f"! {found[0].name}", "!")))
  nlls = _keyed(values, "nll")
  if nlls:
    brief = (f"nll {text}" for text in _briefly(nlls))
    fields.append((6, (f"nll {_named(nlls, 3)}", *brief)))
  accuracy = values.get(f"accuracy/{split}")
  if accuracy is not None:
    brief_accuracy = f"{split} {_decimal(accuracy, 3)}"
    fields.append((3, (f"{split} accuracy {accuracy:.3f}", brief_accuracy)))
  speed = values.get("tokens_per_second/step")
  if speed is not None:
    rate = _rounded(speed)
    in_short = f"{rate} tok/s"
    fields.append(
        (4, (f"{speed:,.0f} tokens/s", in_short, in_short, f"{rate}/s"))
    )
  gaps = _keyed(values, "logprob_gap_mean")
  largest = _keyed(values, "logprob_gap_max")
  if gaps and largest:
    mean, most = (_power(max(gap.values())) for gap in (gaps, largest))
    fields.append(
        (5, (f"log-prob gap {mean} max {most}", f"gap {mean}/{most}"))
    )
  ages = _keyed(values, "staleness_mean")
  oldest = max(_keyed(values, "staleness").values(), default=0.0)
  if ages and oldest:
    age = f"{max(ages.values()):.1f}"
    fields.append((7, (f"age {age} max {oldest:.0f}", f"age {age}")))
  if math.isfinite(seconds_left):
    time_left = duration(seconds_left)
    fields.append((2, (f"{time_left} left", time_left)))
  return fields


def duration(seconds: float) -> str:
  """Writes a time span as people do.

  Args:
    seconds: finite, not negative.

  Returns:
    `42s`, `3m20s`, `2h05m` or `3d04h`.
  """
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f"{days}d{hours:02d}h"
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def accuracies(overall: Accuracy, by_name: Mapping[str, Accuracy]) -> str:
  """Lays out accuracies with 95% intervals.

  Args:
    overall: of all questions, the first row.
    by_name: name of the row (a kind of question) -> accuracy.

  Returns:
    A table, one line per row under a header.
  """
  rows = {"all": overall, **by_name}
  table = _table(
      [
          ("accuracy [95% interval]", "n", ""),
          *(
              (printable(name), str(one.n), _with_interval(one))
              for name, one in rows.items()
          ),
      ]
  )
  return table + _left_out(overall.failed)


def comparison(rows: Mapping[str, tuple[Accuracy, Accuracy]]) -> str:
  """Lays out accuracies before and after training, with 95% intervals.

  Args:
    rows: name of the row (a split or a kind of question) -> (before, after).

  Returns:
    A table, one line per row under a header.
  """
  table = [("accuracy [95% interval]", "n", "before", "after", "change")]
  for name, (before, after) in rows.items():
    counts = dict.fromkeys((before.n, after.n))
    table.append(
        (
            printable(name),
            "/".join(map(str, counts)),
            _with_interval(before),
            _with_interval(after),
            f"{after.share - before.share:+.3f}",
        )
    )
  failed = [one.failed for one in rows.get("all", ())]
  return _table(table) + _left_out(*failed)


def _left_out(*failed: int) -> str:
  """A line about questions that are not among n; none where all are."""
  if not any(failed):
    return ""
  counts = ", then ".join(map(str, failed))
  return f"\nleft out, a machine or judge failed on them: {counts} questions"


def _table(table: Sequence[Sequence[str]]) -> str:
  """Aligns columns, the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return "\n".join(
      "  ".join(
          cell.ljust(width) if i == 0 else cell.rjust(width)
          for i, (cell, width) in enumerate(zip(row, widths, strict=True))
      )
      for row in table
  )


def _with_interval(accuracy: Accuracy) -> str:
  """An accuracy and its interval."""
  low, high = accuracy.interval
  return f"{accuracy.share:.3f} [{low:.3f}, {high:.3f}]"


def _keyed(values: Mapping[str, float], family: str) -> dict[str, float]:
  """The values of a metric by their key."""
  prefix = family + "/"
  return {
      name.removeprefix(prefix): value
      for name, value in values.items()
      if name.startswith(prefix)
  }


def _named(values: Mapping[str, float], digits: int) -> str:
  """Names and values."""
  return " ".join(f"{name} {one:.{digits}f}" for name, one in values.items())


def _briefly(values: Mapping[str, float]) -> tuple[str, ...]:
  """Names and values with whole names, then with ever fewer letters."""
  whole = {name: name for name in values}
  cuts = (whole, *(_cut(values, letters) for letters in _LETTERS))
  return tuple(
      " ".join(f"{cut[n]} {_decimal(one, 2)}" for n, one in values.items())
      for cut in cuts
  )


def _cut(names: Iterable[str], letters: int) -> dict[str, str]:
  """The shortest beginnings that tell names apart, of some letters at least."""
  whole = list(names)
  longest = max(map(len, whole))
  for length in range(letters, longest):
    short = {name: name[:length] for name in whole}
    if len(set(short.values())) == len(whole):
      return short
  return {name: name for name in whole}


def _decimal(value: float, digits: int) -> str:
  """A number without the zero before its point: `.45`."""
  text = f"{value:.{digits}f}"
  sign = "-" if text.startswith("-") else ""
  return sign + text.removeprefix("-").removeprefix("0")


def _rounded(value: float) -> str:
  """A number of two or three digits and its scale: `5.1k`, `12k`."""
  for scale, letter in ((1e6, "M"), (1e3, "k")):
    if value >= scale:
      part = value / scale
      return f"{part:.1f}{letter}" if part < 9.95 else f"{part:.0f}{letter}"
  return f"{value:.0f}"


def _power(value: float) -> str:
  """A number's first digit and its power of ten: `3e-5`."""
  digit, _, exponent = f"{value:.0e}".partition("e")
  return f"{digit}e{int(exponent)}" if exponent and value else digit
