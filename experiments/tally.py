"""How far a sweep is: a line for each run that ends, and a live count."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TextIO

import numpy as np

from mgrpo_jax.report.live import Field, Line
from mgrpo_jax.report.progress import duration

_PLAIN_EVERY = 300.0  # seconds between counts that are no terminal's


class Tally:
  """Counts runs that finished, failed and wait, and estimates the rest."""

  def __init__(
      self,
      stream: TextIO,
      *,
      total: int,
      finished: int,
      parallel: int,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Writes nothing yet.

    Args:
      stream: where the lines go, such as sys.stderr.
      total: runs of the sweep.
      finished: runs that had finished before.
      parallel: runs at a time.
      clock: seconds that never go backwards; another one in tests.
    """
    self.failed = 0
    self._line = Line(stream, every_seconds=_PLAIN_EVERY, clock=clock)
    self._total = total
    self._before = finished
    self._finished = finished
    self._parallel = parallel
    self._news = False
    self._took: list[float] = []  # seconds of each run that finished

  def add(self, seconds: float, finished: bool, text: str) -> None:
    """Takes in a run that ended, and says so; the next `show` counts it.

    Args:
      seconds: that it took.
      finished: whether it did what it should.
      text: what to say of it.
    """
    if finished:
      self._finished += 1
      self._took.append(seconds)
    else:
      self.failed += 1
    self._line.note(text)
    self._news = True

  def show(self, ages: Sequence[float]) -> None:
    """Shows the count.

    Args:
      ages: of the runs under way, seconds.
    """
    self._line.show(self._fields(ages), force=self._news)
    self._news = False

  def close(self) -> None:
    """Leaves the last count standing."""
    self._line.close()

  def seconds_left(self, ages: Sequence[float]) -> float | None:
    """Estimates the rest from the runs of this call that finished.

    Args:
      ages: of the runs under way, seconds.

    Returns:
      Seconds; None before one has finished, and when nothing is left.
    """
    left = self._total - self._finished - self.failed
    if not self._took or not left:
      return None
    one = float(np.mean(self._took))
    work = left * one - sum(min(age, one) for age in ages)
    return max(0.0, work) / min(self._parallel, left)

  def _fields(self, ages: Sequence[float]) -> list[Field]:
    """What the line says."""
    fields: list[Field] = [
        (0, (f"{self._finished} of {self._total} runs finished",))
    ]
    if self._before:
      fields.append((4, (f"{self._before} of them before",)))
    if self.failed:
      fields.append((1, (f"{self.failed} failed",)))
    if ages:
      longest = duration(max(ages))
      fields.append((3, (f"{len(ages)} running, for {longest}",)))
    left = self.seconds_left(ages)
    if left is not None:
      fields.append((2, (f"{duration(left)} left", duration(left))))
    return fields
