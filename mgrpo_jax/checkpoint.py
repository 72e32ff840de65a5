"""Checkpoints of a whole run: every policy's state and the host's.

    checkpoints/<step>/arrays/   all arrays of all policies (orbax, OCDBT)
    checkpoints/<step>/record/   host state, shapes, dtypes, digests (JSON)
    checkpoints/<step>.corrupt   set aside when a run resumed past it

A checkpoint appears by one rename: SIGKILL during a save leaves earlier ones
as they were. Restoring checks every digest; a corrupt checkpoint is named and
skipped for the previous good one, and set aside once that one has been read.
Arrays go through the host as numpy, so neither way compiles anything.
"""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from mgrpo_jax import atomic, leaves, orbax_manager
from mgrpo_jax.keys import check_name
from mgrpo_jax.types import TrainState

FORMAT = 1
_LOG = logging.getLogger(__name__)


class CheckpointError(atomic.StorageError):
  """A checkpoint cannot be written or none can be read; one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A run as it was saved.

  Attributes:
    step: the step it was saved under.
    states: by policy.
    host: everything else (data position, random state, stage, counters).
    skipped: newer checkpoints (and notes of orbax) found corrupt, each with
      what is wrong, newest first; empty where all is well.
  """

  step: int
  states: dict[str, TrainState]
  host: dict[str, Any]
  skipped: tuple[str, ...]


class Checkpoints:
  """The checkpoints of one run directory; a context manager.

  One process at a time may write (`atomic.exclusive`), also of a job's several.
  Saving copies the states to the host and returns; they are written in the
  background.
  """

  def __init__(
      self, directory: str | os.PathLike[str], *, max_to_keep: int
  ) -> None:
    """Opens the directory, and makes it where it is missing.

    What a killed save left behind is removed.

    Args:
      directory: where the checkpoints lie.
      max_to_keep: how many stay, ≥ 1; older ones are deleted.

    Raises:
      CheckpointError: the directory cannot be made or read.
      ValueError: `max_to_keep` is out of range.
    """
    if max_to_keep < 1:
      raise ValueError(f"max_to_keep: {max_to_keep} must be at least 1")
    self._saving: int | None = None
    self._directory = pathlib.Path(directory).absolute()
    try:
      self._manager, self._dropped = orbax_manager.open_manager(
          self._directory, max_to_keep=max_to_keep
      )
    except (OSError, ValueError) as error:
      what = f"cannot open checkpoints in {directory}"
      raise CheckpointError(f"{what}: {atomic.reason(error)}") from error

  def __enter__(self) -> "Checkpoints":
    """Returns itself."""
    return self

  def __exit__(self, *_: object) -> None:
    """Closes."""
    self.close()

  def steps(self) -> list[int]:
    """Waits for the last save; returns the steps saved, ascending."""
    self.wait()
    return sorted(self._manager.all_steps())

  def save(
      self,
      step: int,
      states: Mapping[str, TrainState],
      host: Mapping[str, Any],
  ) -> None:
    """Starts saving a run; waits only for an earlier save and for the copies.

    Args:
      step: later than every checkpoint there is.
      states: pytrees of arrays, by policy.
      host: what JSON gives back unchanged: no tuples, numpy values or keys
        that are not text.

    Raises:
      CheckpointError: this save, or the one before it, cannot be written.
      ValueError: the step is not later, or the host state is not JSON.
    """
    newest = self._manager.latest_step()
    if newest is not None and step <= newest:
      raise ValueError(f"step: {step} must be later than checkpoint {newest}")
    _check_host(host)
    self.wait()
    arrays = {
        f"{check_name(policy, 'policy')}/{name}": array
        for policy, state in states.items()
        for name, array in leaves.to_host(state).items()
    }
    record = leaves.seal(
        {
            "format": FORMAT,
            "step": step,
            "policies": sorted(states),
            # A copy to the ground: the caller's may change while it is written.
            "host": json.loads(json.dumps(dict(host))),
            "arrays": {name: leaves.describe(a) for name, a in arrays.items()},
        }
    )
    self._saving = step
    self._check_space(sum(array.nbytes for array in arrays.values()))
    try:
      self._manager.save(  # orbax copies the arrays before it returns
          step,
          args=ocp.args.Composite(
              arrays=ocp.args.PyTreeSave(arrays),
              record=ocp.args.JsonSave(record),
          ),
          force=True,
      )
    except (OSError, ValueError, RuntimeError) as error:
      raise self._write_error(error) from error

  def wait(self) -> None:
    """Waits until the last save is on the disk.

    Raises:
      CheckpointError: it cannot be written; earlier checkpoints are whole.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except (OSError, ValueError, RuntimeError) as error:
      raise self._write_error(error) from error

  def restore(self, like: Mapping[str, TrainState]) -> Checkpoint | None:
    """Reads the newest good checkpoint.

    Args:
      like: states or their abstract shapes, by policy; arrays go to their
        shardings.

    Returns:
      The run as it was saved, bit for bit; None where nothing was saved.

    Raises:
      CheckpointError: there are checkpoints, but none is good.
      MismatchError: a good checkpoint does not fit `like`.
    """
    skipped: dict[int, str] = {}
    for step in reversed(self.steps()):
      try:
        record, arrays = self._read(step)
      except atomic.CorruptError as error:
        skipped[step] = f"checkpoint {step} in {self._directory}: {error}"
        _LOG.warning("%s; trying the one before it", skipped[step])
        continue
      states = self._states(step, record, arrays, like)
      self._set_aside(list(skipped))
      return Checkpoint(
          step=step,
          states=states,
          host=record["host"],
          skipped=(*self._dropped, *skipped.values()),
      )
    if skipped:
      raise CheckpointError(
          f"no good checkpoint in {self._directory}; remove it to start over: "
          + "; ".join(skipped.values())
      )
    return None

  def close(self) -> None:
    """Waits for the last save and lets the directory go.

    Raises:
      CheckpointError: the last save cannot be written.
    """
    try:
      self.wait()
    finally:
      self._manager.close()

  def _read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads and verifies one checkpoint."""
    try:
      orbax_manager.probe(self._directory / str(step) / "arrays")
      found = self._manager.restore(
          step,
          args=ocp.args.Composite(
              arrays=ocp.args.PyTreeRestore(), record=ocp.args.JsonRestore()
          ),
      )
    except PermissionError as error:
      raise CheckpointError(
          f"cannot read checkpoint {step} in {self._directory}: "
          f"{atomic.reason(error)}"
      ) from error
    except (OSError, ValueError, KeyError) as error:
      raise atomic.CorruptError(atomic.reason(error)) from error
    record = leaves.check_seal(found["record"])
    if record["format"] != FORMAT:
      raise atomic.MismatchError(
          f"checkpoint {step} in {self._directory}: format {record['format']}"
          f" is not {FORMAT}"
      )
    if record["step"] != step:
      raise atomic.CorruptError(f"it is that of step {record['step']}")
    arrays = {name: np.asarray(a) for name, a in found["arrays"].items()}
    leaves.verify(arrays, record["arrays"])
    return record, arrays

  def _states(
      self,
      step: int,
      record: Mapping[str, Any],
      arrays: Mapping[str, np.ndarray],
      like: Mapping[str, TrainState],
  ) -> dict[str, TrainState]:
    """Rebuilds the states; they must be those of this configuration."""
    what = f"checkpoint {step} in {self._directory}"
    if record["policies"] != sorted(like):
      raise atomic.MismatchError(
          f"{what} holds the policies {record['policies']}, not {sorted(like)}"
      )
    return {
        policy: leaves.from_host(
            {
                name.removeprefix(f"{policy}/"): array
                for name, array in arrays.items()
                if name.startswith(f"{policy}/")
            },
            state,
            what=f"{what}, policy {policy},",
        )
        for policy, state in like.items()
    }

  def _set_aside(self, steps: list[int]) -> None:
    """Renames corrupt checkpoints, so that their steps can be saved again."""
    for step in steps:
      path = self._directory / str(step)
      number = 0
      while (target := _aside(path, number)).exists():
        number += 1
      try:
        path.rename(target)
      except OSError as error:
        raise CheckpointError(
            f"cannot set aside {path}: {atomic.reason(error)}"
        ) from error
    if steps:
      self._manager.reload()

  def _check_space(self, needed: int) -> None:
    """Raises where the disk is too full, before orbax finds out.

    Orbax closes its event loop at the first write that fails; the others then
    each print a traceback.
    """
    try:
      free = shutil.disk_usage(self._directory).free
    except OSError as error:
      raise self._write_error(error) from error
    if free < needed:
      raise CheckpointError(
          f"cannot write checkpoint {self._saving} to {self._directory}:"
          f" {os.strerror(errno.ENOSPC)}, {needed / 1e6:.0f} MB are needed and"
          f" {free / 1e6:.0f} MB free"
      )

  def _write_error(self, error: BaseException) -> CheckpointError:
    """Removes what a failed save left, and returns what to raise for it."""
    step = self._saving
    for path in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
      shutil.rmtree(path, ignore_errors=True)
    self._manager.reload()  # its list already lacks what it meant to delete
    return CheckpointError(
        f"cannot write checkpoint {step} to {self._directory}: "
        f"{atomic.reason(error)}"
    )


def _aside(path: pathlib.Path, number: int) -> pathlib.Path:
  """Returns the name of a corrupt checkpoint that was set aside."""
  return path.with_name(f"{path.name}.corrupt" + (f".{number}" * (number > 0)))


def _check_host(host: Mapping[str, Any]) -> None:
  """Raises ValueError unless JSON gives the host state back unchanged."""
  for key, value in host.items():
    try:
      same = json.loads(json.dumps({key: value})) == {key: value}
    except (TypeError, ValueError) as error:
      raise ValueError(f"host: {key!r} is not JSON: {error}") from error
    if not same or _has_tuple(value):
      raise ValueError(f"host: {key!r} comes back from JSON changed")


def _has_tuple(value: Any) -> bool:
  """Returns whether a tuple, which JSON turns into a list, is inside."""
  if isinstance(value, dict):
    return any(_has_tuple(item) for item in value.values())
  if isinstance(value, list):
    return any(_has_tuple(item) for item in value)
  return isinstance(value, tuple)
