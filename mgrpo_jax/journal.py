"""What a run writes down: metrics, rollouts, checkpoints, the outcome.

A checkpoint closes all steps before it. A run that resumes removes what was
written after its checkpoint, so every step and task is there exactly once.
"""

import contextlib
import dataclasses
import io
import subprocess
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any, Self, TextIO

import numpy as np

from mgrpo_jax import atomic, metrics
from mgrpo_jax.checkpoint import Checkpoint, Checkpoints
from mgrpo_jax.learner import Step
from mgrpo_jax.report import records
from mgrpo_jax.report.progress import Progress
from mgrpo_jax.report.writer import MetricsWriter
from mgrpo_jax.rewards import Scores
from mgrpo_jax.types import RolloutGroup, TrainState
from mgrpo_jax.workdir import Workdir

_PLAIN_EVERY = 5.0  # seconds between progress lines that are no terminal's


class NonFiniteError(RuntimeError):
  """A loss or gradient was not finite; names where the batch was saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A step whose updates were dispatched but not yet waited for.

  Attributes:
    step: its number.
    stage: name of the curriculum's stage.
    values: metrics known so far.
    dispatched: updates by policy.
  """

  step: int
  stage: str
  values: Mapping[str, float]
  dispatched: Mapping[str, Step]


class Journal:
  """Keeps the files of one run directory; a context manager."""

  def __init__(
      self,
      workdir: Workdir,
      *,
      total_steps: int,
      limits: Mapping[str, float],
      keep_checkpoints: int,
      stream: TextIO,
      started: float,
      compiled: metrics.Compilations,
  ) -> None:
    """Opens nothing yet.

    Args:
      workdir: the run directory, held by this process.
      total_steps: of the whole curriculum.
      limits: of metrics that would end the run earlier, by name.
      keep_checkpoints: how many stay.
      stream: where the progress line goes.
      started: when this process began with the run, `time.monotonic()`.
      compiled: counts compilations since then.
    """
    self.workdir = workdir
    self.progress = Progress(
        stream,
        total_steps=total_steps,
        limits=limits,
        every_seconds=_PLAIN_EVERY,
        split="dev",
    )
    self._keep = keep_checkpoints
    self._stack = contextlib.ExitStack()
    self._started = started
    self._compiled = compiled
    self._carried: dict[str, float] = {}  # of the processes before this one
    self._corrupt = 0
    self._pending: Entry | None = None

  def __enter__(self) -> Self:
    """Opens the checkpoints."""
    self._checkpoints = self._stack.enter_context(
        Checkpoints(self.workdir.checkpoints, max_to_keep=self._keep)
    )
    return self

  def __exit__(
      self,
      kind: type[BaseException] | None,
      error: BaseException | None,
      trace: types.TracebackType | None,
  ) -> None:
    """Closes every file; what fails then never hides what failed before."""
    del kind, trace
    self.progress.close()
    try:
      self._stack.close()
    except OSError as late:
      if error is None:
        raise
      if str(late) != str(error):  # a save that failed says so again
        self.progress.note(f"closing: {late}")

  def restore(self, like: Mapping[str, TrainState]) -> Checkpoint | None:
    """Reads the newest good checkpoint and drops what came after it.

    Args:
      like: states, by policy.

    Returns:
      The checkpoint; None for a new run.
    """
    checkpoint = self._checkpoints.restore(like)
    last_step = checkpoint.step if checkpoint else -1
    if checkpoint:
      self._carried = dict(checkpoint.host["totals"])
      self.progress.note(
          f"goes on after step {checkpoint.step + 1}, from the checkpoint of"
          f" {self.workdir.checkpoints}"
      )
      self.skipped(checkpoint.skipped)
    records.remove_after(self.workdir.rollouts, last_step)
    self._writer = self._stack.enter_context(
        MetricsWriter(self.workdir.path, last_step=last_step)
    )
    return checkpoint

  def skipped(self, problems: Sequence[str]) -> None:
    """Names and counts what was found damaged and passed over."""
    self._corrupt += len(problems)
    for problem in problems:
      self.progress.note(f"skipped {problem}")

  def rollouts(
      self,
      step: int,
      stage: str,
      groups: Sequence[RolloutGroup],
      scores: Sequence[Scores],
      advantages: Sequence[np.ndarray],
      pieces: records.Pieces,
  ) -> None:
    """Writes every token of a step's rollouts.

    Args:
      step: its number.
      stage: name of the curriculum's stage.
      groups: B rollout groups.
      scores: of the groups.
      advantages: for each group [M], NaN where the update does not see a call.
      pieces: role, token ids -> a text for each.
    """
    records.write_step(
        self.workdir.rollouts,
        step,
        groups,
        rewards=[graded.records() for graded in scores],
        advantages=advantages,
        pieces=pieces,
        stage=stage,
    )

  def add(self, entry: Entry) -> None:
    """Takes a step in, and writes down the one before it.

    So the device works on a step while the host waits for its predecessor's
    metrics.

    Raises:
      NonFiniteError: the step before ended in a loss that is not finite.
    """
    self.flush()
    self._pending = entry

  def flush(self) -> None:
    """Waits for the step that is still open, and writes it down."""
    entry, self._pending = self._pending, None
    if entry is None:
      return
    values = dict(entry.values)
    for policy, step in entry.dispatched.items():
      found = step.metrics()
      if found.get("nonfinite"):
        raise NonFiniteError(self._save_batch(entry.step, policy, step))
      values |= {f"{name}/{policy}": value for name, value in found.items()}
    totals = self.totals()
    values["compilations"] = totals["compilations"]
    values["compile_seconds"] = totals["compile_seconds"]
    values["corrupt_records"] = totals["corrupt_records"]
    values["peak_rss_bytes"] = totals["peak_rss_bytes"]
    self._writer.write(entry.step, entry.stage, values)
    self.progress.update(entry.step + 1, entry.stage, values)

  def save(
      self,
      step: int,
      states: Mapping[str, TrainState],
      host: Mapping[str, Any],
  ) -> None:
    """Writes a checkpoint behind the last step that was flushed.

    Args:
      step: the last one that the checkpoint holds.
      states: by policy.
      host: what else a resumed run needs, as JSON.
    """
    self.flush()
    self._checkpoints.save(step, states, {**host, "totals": self.totals()})

  def totals(self) -> dict[str, float]:
    """What the run cost so far, earlier processes included."""
    carried = self._carried
    spent = time.monotonic() - self._started
    return {
        "seconds": carried.get("seconds", 0.0) + spent,
        "compilations": carried.get("compilations", 0) + self._compiled.count,
        "compile_seconds": (
            carried.get("compile_seconds", 0.0) + self._compiled.seconds
        ),
        "corrupt_records": carried.get("corrupt_records", 0.0) + self._corrupt,
        "peak_rss_bytes": max(
            carried.get("peak_rss_bytes", 0.0), float(metrics.peak_rss_bytes())
        ),
    }

  def summarise(self, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `summary.json`.

    Args:
      summary: what the run says of itself; costs are added.

    Returns:
      All of it.
    """
    self._checkpoints.wait()
    totals = self.totals()
    whole = {
        **summary,
        "commit": commit(),
        "seconds": round(totals["seconds"], 3),
        "peak_rss_bytes": int(totals["peak_rss_bytes"]),
        "compilations": int(totals["compilations"]),
        "corrupt_records": int(totals["corrupt_records"]),
    }
    atomic.write_json(self.workdir.summary, whole)
    return whole

  def _save_batch(self, step: int, policy: str, failed: Step) -> str:
    """Keeps the batch whose loss was not finite; returns what happened."""
    path = self.workdir.path / "nonfinite" / f"step_{step:06d}_{policy}.npz"
    arrays = {
        f"{number}/{field.name}": np.asarray(getattr(batch, field.name))
        for number, batch in enumerate(failed.batches)
        for field in dataclasses.fields(batch)
        if getattr(batch, field.name) is not None
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    atomic.write(path, buffer.getvalue())
    return (
        f"step {step}: loss or gradient of policy {policy!r} is not finite;"
        f" the update was not made, its batch is in {path}"
    )


def commit() -> str:
  """Names the commit of the code that runs, `-dirty` where it was changed.

  Returns:
    The hash; empty outside a repository.
  """
  try:
    found = subprocess.run(
        [
            "git",
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ],
        cwd=atomic.__file__.rsplit("/", 1)[0],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return found.stdout.strip()
