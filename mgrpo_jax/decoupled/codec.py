"""Trajectories as JSON values and back, bit for bit.

For this job's own disk only: they hold tokens. Arrays are base64 of their
little-endian bytes.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mgrpo_jax.atomic import CorruptError
from mgrpo_jax.types import Account, Status, Trajectory, Turn

_ARRAYS = {"tokens": "<i4", "loss_mask": "<f4", "sampler_logprobs": "<f4"}


def encode(trajectory: Trajectory) -> dict[str, Any]:
  """A trajectory as JSON values.

  Args:
    trajectory: of this job or another one.

  Returns:
    Its fields by name.
  """
  values = dataclasses.asdict(trajectory)
  values["status"] = int(trajectory.status)
  for name, kind in _ARRAYS.items():
    data = np.ascontiguousarray(values[name], kind).tobytes()
    values[name] = base64.b64encode(data).decode()
  return values


def decode(values: Mapping[str, Any]) -> Trajectory:
  """Reads what `encode` returned.

  Args:
    values: JSON values.

  Returns:
    The trajectory.

  Raises:
    CorruptError: they are none of a trajectory.
  """
  try:
    fields = dict(values)
    for name, kind in _ARRAYS.items():
      data = base64.b64decode(fields[name], validate=True)
      native = np.dtype(kind).newbyteorder("=")
      fields[name] = np.frombuffer(data, kind).astype(native)
    fields["status"] = Status(fields["status"])
    fields["turns"] = tuple(Turn(**turn) for turn in fields["turns"])
    if fields["account"] is not None:
      fields["account"] = Account(**fields["account"])
    return Trajectory(**fields)
  except (KeyError, TypeError, ValueError) as error:
    raise CorruptError(f"not a trajectory: {error}") from error
