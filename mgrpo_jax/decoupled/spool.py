"""A step's groups on this job's disk, until a checkpoint has the step.

    spool/step_000012.json.gz

A job that resumes from an older checkpoint replays the steps behind it from
here: nothing is sampled again, so no other job has to go back.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax import atomic, leaves, rollout
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.decoupled import codec, wire
from mgrpo_jax.rewards import Scores
from mgrpo_jax.types import RolloutGroup, Task

_NAME = re.compile(r"step_(\d{6,})\.json\.gz")
_COLUMNS = tuple(field.name for field in dataclasses.fields(Scores))


class Spool:
  """The spooled steps of one job."""

  def __init__(
      self,
      folder: pathlib.Path,
      *,
      tasks: Mapping[str, Task],
      environments: Callable[[int], Environment],
  ) -> None:
    """Opens nothing yet.

    Args:
      folder: where they lie.
      tasks: by id.
      environments: step -> that of its rollouts, for the order of the roles.
    """
    self._folder = folder
    self._tasks = tasks
    self._environments = environments

  def write(
      self,
      step: int,
      groups: Sequence[RolloutGroup],
      scores: Sequence[Scores] | None,
  ) -> None:
    """Keeps a step, whole or not at all.

    Args:
      step: its number.
      groups: of the step.
      scores: of the groups, None where they are computed again.

    Raises:
      StorageError: it cannot be written.
    """
    record = leaves.seal(
        {
            "step": step,
            "groups": [
                {
                    "task": group.task.id,
                    "rollouts": [
                        [
                            codec.encode(t)
                            for t in group.trajectories
                            if t.rollout == k
                        ]
                        for k in range(group.num_rollouts)
                    ],
                }
                for group in groups
            ],
            "scores": None
            if scores is None
            else [write_scores(graded) for graded in scores],
        }
    )
    data = gzip.compress(wire.dump(record), compresslevel=1, mtime=0)
    atomic.write(self._path(step), data)

  def read(
      self, step: int
  ) -> tuple[list[RolloutGroup], list[Scores] | None] | None:
    """Reads a step.

    Args:
      step: its number.

    Returns:
      Groups and scores as they were written; None where the step is not here.

    Raises:
      CorruptError: it is damaged, naming the file.
      StorageError: it cannot be read.
    """
    path = self._path(step)
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return None
    except OSError as error:
      raise atomic.StorageError(
          f"cannot read {path}: {atomic.reason(error)}"
      ) from error
    try:
      record = leaves.check_seal(json.loads(gzip.decompress(data)))
      environment = self._environments(step)
      groups = [self._group(one, environment) for one in record["groups"]]
    except (
        EOFError,
        KeyError,
        ValueError,
        OSError,
        RecursionError,
        zlib.error,
    ) as error:
      raise atomic.CorruptError(
          f"{path} is damaged: {atomic.reason(error)}"
      ) from error
    scores = record["scores"]
    return groups, scores and [read_scores(rows) for rows in scores]

  def trim(self, before: int) -> None:
    """Removes the steps before one: a checkpoint that stays has them."""
    if not self._folder.is_dir():
      return
    for path in self._folder.iterdir():
      match = _NAME.fullmatch(path.name)
      if match and int(match[1]) < before:
        path.unlink(missing_ok=True)

  def _path(self, step: int) -> pathlib.Path:
    """Where a step lies."""
    return self._folder / f"step_{step:06d}.json.gz"

  def _group(
      self, values: Mapping[str, Any], environment: Environment
  ) -> RolloutGroup:
    """Rebuilds one group."""
    return rollout.group_of(
        self._tasks[values["task"]],
        [[codec.decode(t) for t in calls] for calls in values["rollouts"]],
        environment=environment,
    )


def write_scores(scores: Scores) -> list[list[float]]:
  """Scores as M rows of JSON numbers, each the shortest that float32 reads."""
  table = np.stack([getattr(scores, name) for name in _COLUMNS], 1)
  return [[float(str(value)) for value in row] for row in table]


def read_scores(rows: Sequence[Sequence[float]]) -> Scores:
  """Reads what `write_scores` returned; bit for bit."""
  table = np.asarray(rows, np.float32).reshape(len(rows), len(_COLUMNS))
  return Scores(**dict(zip(_COLUMNS, table.T, strict=True)))
