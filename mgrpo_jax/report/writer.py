"""The files that keep a run's metrics: `metrics.jsonl` and TensorBoard's."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any, SupportsFloat

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from mgrpo_jax import atomic, metrics
from mgrpo_jax.report import shapes

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"

_NOT_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ROW = {"step": shapes.is_count, "stage": shapes.is_text}


class MetricsWriter:
  """Appends each step's metrics to `metrics.jsonl` and TensorBoard files.

  Opening it removes what a killed run had written beyond its checkpoint, so
  that every step is there once, in order.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, last_step: int):
    """Opens the files of a run.

    Args:
      workdir: the run's directory.
      last_step: the last step that counts, -1 for a new run.

    Raises:
      StorageError: the files cannot be written.
    """
    self._workdir = pathlib.Path(workdir)
    self._last_step = last_step
    path = self._workdir / METRICS_FILE
    with self._writing():
      self._workdir.mkdir(parents=True, exist_ok=True)
      truncate_after(path, last_step)
      self._lines: IO[str] = path.open("a", encoding="ascii")
      self._events = _EventFile(
          self._workdir / TENSORBOARD_DIRECTORY, first_step=last_step + 1
      )

  def write(
      self, step: int, stage: str, values: Mapping[str, SupportsFloat]
  ) -> None:
    """Appends one step and flushes.

    Args:
      step: greater than all written before.
      stage: name of the curriculum's stage.
      values: name -> number, NumPy or JAX scalar.

    Raises:
      StorageError: the files cannot be written.
      ValueError: a name that is not defined, or a step out of order.
    """
    if step <= self._last_step:
      raise ValueError(f"step: {step}, allowed: above {self._last_step}")
    for name in values:
      metrics.define(name)
    numbers = {name: float(value) for name, value in values.items()}
    now = time.time()
    row = {"step": step, "stage": stage, "time": round(now, 3)}
    with self._writing():
      self._lines.write(_encode_row(row | numbers) + "\n")
      self._lines.flush()
      self._events.write(step, numbers, now)
    self._last_step = step

  def close(self) -> None:
    """Closes the files."""
    with self._writing(), contextlib.closing(self._events):
      self._lines.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says where it was that the disk refused."""
    try:
      yield
    except atomic.StorageError:
      raise
    except OSError as error:
      raise atomic.StorageError(
          f"cannot write metrics in {self._workdir}: {atomic.reason(error)}"
      ) from error

  def __enter__(self) -> MetricsWriter:
    """Returns itself."""
    return self

  def __exit__(self, *exception: object) -> None:
    """Closes the files."""
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the rows of a `metrics.jsonl`.

  Args:
    path: the file; may end in a torn line, which a killed run leaves.

  Returns:
    One dictionary a step, ascending: `step`, `stage`, `time` and metrics.
    Lines that no run wrote are skipped; of a step written twice the later
    row counts.

  Raises:
    OSError: the file cannot be read.
  """
  rows: dict[int, dict[str, Any]] = {}
  for line in pathlib.Path(path).read_bytes().splitlines():
    row = _decode_row(line)
    if row is not None:
      rows[row["step"]] = row
  return [rows[step] for step in sorted(rows)]


def truncate_after(path: str | os.PathLike[str], step: int) -> int:
  """Drops the rows of later steps and torn lines from a `metrics.jsonl`.

  Args:
    path: the file; may be absent.
    step: the last step to keep.

  Returns:
    How many lines were dropped. The file is replaced atomically, and only
    if there was something to drop.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return 0
  before = path.read_bytes()
  rows = [row for row in read_metrics(path) if row["step"] <= step]
  after = "".join(_encode_row(row) + "\n" for row in rows).encode("ascii")
  if after == before:
    return 0
  atomic.write(path, after)
  return len(before.splitlines()) - len(rows)


class _EventFile:
  """A TensorBoard event file, written without threads or queues."""

  def __init__(self, directory: pathlib.Path, *, first_step: int):
    """Starts a file; TensorBoard hides earlier files' later steps."""
    directory.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()  # TensorBoard reads files in the order of names
    name = f"events.out.tfevents.{now // 10**9}.{now % 10**9:09d}.mgrpo"
    self._records = RecordWriter(str(directory / name))
    version = event_pb2.Event(file_version="brain.Event:2")
    start = event_pb2.Event(
        step=first_step,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
    )
    for event in (version, start):
      event.wall_time = now / 1e9
      self._records.write(event.SerializeToString())
    self._records.flush()

  def write(self, step: int, values: Mapping[str, float], now: float) -> None:
    """Appends the metrics of a step and flushes."""
    summary = summary_pb2.Summary()
    for name, value in values.items():
      summary.value.add(tag=name, simple_value=value)
    event = event_pb2.Event(step=step, wall_time=now, summary=summary)
    self._records.write(event.SerializeToString())
    self._records.flush()

  def close(self) -> None:
    """Closes the file."""
    self._records.close()


def _encode_row(row: Mapping[str, Any]) -> str:
  """One line of JSON; what JSON cannot say as a number is said as text."""
  return json.dumps(
      {
          name: _spell(value) if isinstance(value, float) else value
          for name, value in row.items()
      }
  )


def _spell(value: float) -> float | str:
  """Spells NaN and the infinities, which are not JSON."""
  if math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"


def _decode_row(line: bytes) -> dict[str, Any] | None:
  """Reads a line; None if it is torn or not a row."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or shapes.misfits(row, _ROW):
    return None
  for name, value in row.items():
    if name == "stage":
      continue
    if isinstance(value, str):
      row[name] = _NOT_JSON.get(value, math.nan)
    elif not shapes.is_number(value):
      return None
  return row
