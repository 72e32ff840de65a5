"""Rollout records: every token a team produced, one file per step.

`rollouts/step_000123.jsonl.gz` holds one JSON object per `RolloutGroup`, in
ASCII, written whole or not at all. The objects have the shape of
`record.GroupRecord` and need nothing of this package to be read. Reading is
tolerant: a record that is damaged is named, skipped and counted.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax import atomic
from mgrpo_jax.report import record
from mgrpo_jax.report.record import (
    FORMAT,
    GroupRecord,
    TokenRole,
    TrajectoryRecord,
)
from mgrpo_jax.types import RolloutGroup, Status, Task, Trajectory

LOGPROB_DECIMALS = 4
_FILE_NAME = re.compile(r"step_(\d{6,})\.jsonl\.gz")

Pieces = Callable[[str, Sequence[int]], Sequence[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecords:
  """What could be read of one step's file.

  Attributes:
    groups: the records that are whole, in file order.
    problems: one line for each record (or rest of file) that was skipped.
  """

  groups: tuple[GroupRecord, ...]
  problems: tuple[str, ...]


def step_path(directory: str | os.PathLike[str], step: int) -> pathlib.Path:
  """Returns where the rollouts of a step are kept."""
  if step < 0:
    raise ValueError(f"step: {step}, allowed: 0 or more")
  return pathlib.Path(directory) / f"step_{step:06d}.jsonl.gz"


def list_steps(
    directory: str | os.PathLike[str],
) -> dict[int, pathlib.Path]:
  """Returns the files of a rollout directory by step, ascending.

  Args:
    directory: a run's `rollouts` directory; may be absent.

  Returns:
    step -> path. Files with other names are left alone.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    return {}
  matches = [
      (_FILE_NAME.fullmatch(path.name), path) for path in directory.iterdir()
  ]
  found = {
      int(match[1]): path for match, path in matches if match and path.is_file()
  }
  return dict(sorted(found.items()))


def remove_after(directory: str | os.PathLike[str], step: int) -> int:
  """Deletes the files of later steps and files that were never finished.

  A resumed run calls this before its first step, so that the directory holds
  exactly the steps the run still counts.

  Args:
    directory: a run's `rollouts` directory; may be absent.
    step: the last step to keep.

  Returns:
    How many steps were deleted.
  """
  later = [path for n, path in list_steps(directory).items() if n > step]
  for path in later:
    path.unlink()
  atomic.sweep(directory)
  return len(later)


def write_step(
    directory: str | os.PathLike[str],
    step: int,
    groups: Sequence[RolloutGroup],
    *,
    rewards: Sequence[Sequence[Mapping[str, float]]],
    advantages: Sequence[Sequence[float] | np.ndarray],
    pieces: Pieces,
    stage: str,
) -> pathlib.Path:
  """Writes the rollouts of one step, atomically.

  Args:
    directory: a run's `rollouts` directory; made if absent.
    step: the optimizer step the rollouts were trained on.
    groups: B groups; group b has M_b trajectories.
    rewards: [B][M_b] components by name, and their weighted sum as `total`;
      an empty mapping where a trajectory has no reward (FAILED).
    advantages: [B][M_b], NaN where the update did not see the trajectory.
    pieces: (role, token ids) -> the text of each token.
    stage: name of the curriculum's stage.

  Returns:
    The path written.

  Raises:
    ValueError: lengths that do not match, naming the argument.
    atomic.StorageError: the file cannot be written.
  """
  _check_lengths("rewards", [len(row) for row in rewards], groups)
  _check_lengths("advantages", [len(row) for row in advantages], groups)
  records = (
      _group_record(group, scores, gains, pieces, step=step, stage=stage)
      for group, scores, gains in zip(groups, rewards, advantages, strict=True)
  )
  path = step_path(directory, step)
  atomic.write(path, _compressed(records))
  return path


def read_step(path: str | os.PathLike[str]) -> StepRecords:
  """Reads the rollouts of one step, skipping what is damaged.

  Args:
    path: a file written by `write_step`, whole or not.

  Returns:
    The whole records, and a line for each problem.

  Raises:
    OSError: the file cannot be opened.
  """
  path = pathlib.Path(path)
  groups: list[GroupRecord] = []
  problems: list[str] = []
  number = 0
  with gzip.open(path) as lines:
    try:
      for number, line in enumerate(lines, 1):
        try:
          groups.append(record.checked(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
          problems.append(f"{path.name}: record {number}: {_one_line(error)}")
    except (EOFError, OSError, zlib.error) as error:  # the stream is damaged
      problems.append(f"{path.name}: after record {number}: {error}")
  return StepRecords(groups=tuple(groups), problems=tuple(problems))


def token_roles(trajectory: TrajectoryRecord) -> list[TokenRole]:
  """Expands the run lengths of a trajectory to one role per token, [T]."""
  return [role for role, n in trajectory["spans"] for _ in range(n)]


def _check_lengths(
    name: str, lengths: list[int], groups: Sequence[RolloutGroup]
) -> None:
  """Raises ValueError unless there is one entry per trajectory."""
  expected = [len(group.trajectories) for group in groups]
  if lengths != expected:
    raise ValueError(
        f"{name}: {lengths} entries per group, expected {expected}"
    )


def _group_record(
    group: RolloutGroup,
    rewards: Sequence[Mapping[str, float]],
    advantages: Sequence[float] | np.ndarray,
    pieces: Pieces,
    *,
    step: int,
    stage: str,
) -> GroupRecord:
  """Builds the JSON object of one group."""
  return {
      "format": FORMAT,
      "step": step,
      "stage": stage,
      "task": _task_record(group.task),
      "num_rollouts": group.num_rollouts,
      "trajectories": [
          _trajectory_record(trajectory, int(parent), reward, gain, pieces)
          for trajectory, parent, reward, gain in zip(
              group.trajectories, group.parent, rewards, advantages, strict=True
          )
      ],
  }


def _task_record(task: Task) -> dict[str, Any]:
  """Builds the JSON object of a task."""
  return {
      **vars(task),
      "evidence": [dataclasses.asdict(hop) for hop in task.evidence],
      "meta": dict(task.meta),
  }


def _trajectory_record(
    trajectory: Trajectory,
    parent: int,
    rewards: Mapping[str, float],
    advantage: float,
    pieces: Pieces,
) -> TrajectoryRecord:
  """Builds the JSON object of one agent call."""
  tokens = [int(token) for token in trajectory.tokens]
  sampled = np.asarray(trajectory.loss_mask) > 0
  logprobs = np.asarray(trajectory.sampler_logprobs, np.float64)[sampled]
  record: TrajectoryRecord = {
      "rollout": trajectory.rollout,
      "role": trajectory.role,
      "call": trajectory.call,
      "parent": parent,
      "request": trajectory.request,
      "tokens": tokens,
      "pieces": list(pieces(trajectory.role, tokens)),
      "spans": _spans(sampled),
      "logprobs": np.round(logprobs, LOGPROB_DECIMALS).tolist(),
      "version_min": int(trajectory.version_min),
      "version_max": int(trajectory.version_max),
      "status": Status(trajectory.status).name,
      "turns": [dataclasses.asdict(turn) for turn in trajectory.turns],
      "result_text": trajectory.result_text,
      "seconds": round(float(trajectory.seconds), 3),
      "rewards": {name: _finite(value) for name, value in rewards.items()},
      "advantage": _finite(advantage),
      "attempt": trajectory.attempt,
  }
  if trajectory.account is not None:
    record["account"] = dataclasses.asdict(trajectory.account)
  return record


def _spans(sampled: np.ndarray) -> list[tuple[TokenRole, int]]:
  """Run lengths of prompt, sampled and result tokens."""
  if not sampled.size:
    return []
  borders = np.flatnonzero(np.diff(sampled)) + 1
  spans: list[tuple[TokenRole, int]] = []
  for start, end in itertools.pairwise([0, *borders.tolist(), sampled.size]):
    other: TokenRole = "result" if start else "prompt"
    spans.append(("sampled" if sampled[start] else other, end - start))
  return spans


def _finite(value: float) -> float | None:
  """Six decimals of a finite number, else None (JSON knows no NaN)."""
  value = float(value)
  return round(value, 6) if math.isfinite(value) else None


def _plain(value: object) -> object:
  """Turns NumPy values, which tasks may carry in `meta`, into JSON's."""
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  raise TypeError(f"{type(value).__name__} cannot be recorded as JSON")


def _compressed(records: Iterable[GroupRecord]) -> bytes:
  """Compresses records, one line each."""
  buffer = io.BytesIO()
  # No name and no time in the header: equal rollouts give equal bytes.
  with gzip.GzipFile("", "wb", 6, buffer, mtime=0) as stream:
    for one in records:
      line = json.dumps(one, default=_plain, separators=(",", ":"))
      stream.write(line.encode("ascii") + b"\n")
  return buffer.getvalue()


def _one_line(error: BaseException) -> str:
  """An error's type and message, on one line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())}"
