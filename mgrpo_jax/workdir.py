"""A run's directory: who may use it, and for which configuration.

config.json  run_id.json  metrics.jsonl  tensorboard/  rollouts/  checkpoints/
bucket/  policies/  report/  summary.json
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mgrpo_jax import atomic

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
_ID_FILE = "run_id.json"
LOCK_FILE = ".lock"
_EARLY = ("bucket", "jobs")  # others of a run's jobs may make them first
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_SHOWN = 5  # differences listed in the error


class ConfigMismatchError(atomic.MismatchError):
  """The directory belongs to a run with another configuration."""


class NotARunError(ValueError):
  """The directory given is not a run's."""


@dataclasses.dataclass(frozen=True)
class Workdir:
  """The paths of a run.

  Attributes:
    path: the directory.
  """

  path: pathlib.Path

  @property
  def rollouts(self) -> pathlib.Path:
    """One file of rollout records a step."""
    return self.path / "rollouts"

  @property
  def checkpoints(self) -> pathlib.Path:
    """What a run resumes from."""
    return self.path / "checkpoints"

  @property
  def bucket(self) -> pathlib.Path:
    """Where the store lies unless the configuration names another one."""
    return self.path / "bucket"

  @property
  def policies(self) -> pathlib.Path:
    """The trained policies, as `policy.load` reads them."""
    return self.path / "policies"

  @property
  def summary(self) -> pathlib.Path:
    """The outcome of the run."""
    return self.path / SUMMARY_FILE

  @property
  def is_new(self) -> bool:
    """Whether no run has begun there."""
    return not _is_there(self.path / CONFIG_FILE)

  def read_config(self) -> dict[str, Any]:
    """Reads the configuration the run was started with.

    Returns:
      Nested dictionaries of JSON values.

    Raises:
      NotARunError: the directory does not exist or holds none.
      StorageError: it cannot be read.
    """
    if not self.path.is_dir():
      what = "is no directory" if self.path.exists() else "does not exist"
      raise NotARunError(f"workdir {self.path}: {what}")
    if not (self.path / CONFIG_FILE).is_file():
      raise NotARunError(
          f"workdir {self.path}: no {CONFIG_FILE}, so not a run's"
      )
    config = atomic.read_json(self.path / CONFIG_FILE)
    if not isinstance(config, dict):
      raise atomic.CorruptError(f"{self.path / CONFIG_FILE}: not an object")
    return config

  def read_id(self) -> str:
    """Reads the name that tells this run from others; `hold` gives it one.

    Returns:
      The id; empty where the directory is not a run's, or an old one's.

    Raises:
      StorageError: it cannot be read.
    """
    if not _is_there(self.path / _ID_FILE):
      return ""
    found = atomic.read_json(self.path / _ID_FILE)
    if not isinstance(found, dict) or not isinstance(found.get("run"), str):
      raise atomic.CorruptError(f"{self.path / _ID_FILE}: no id of a run")
    return found["run"]


def check(path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
  """Checks that a directory may be used for a run, and changes nothing.

  Args:
    path: the directory; may be missing.
    config: nested dictionaries of JSON values.

  Raises:
    ConfigMismatchError: it belongs to another run; lists the differences.
    StorageError: it cannot be used.
  """
  _check_name(os.fspath(path))
  directory = Workdir(pathlib.Path(path))
  check_ours(directory.path, CONFIG_FILE, "run")
  if not directory.is_new:
    _compare(directory, config)


@contextlib.contextmanager
def hold(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    name: Callable[[], str] | None = None,
) -> Iterator[Workdir]:
  """Takes a directory for a run, new or resumed.

  Args:
    path: made where it is missing.
    config: nested dictionaries of JSON values; written into a new directory,
      compared with what an old one holds.
    name: gives the id of the run that a new directory belongs to, or raises
      before anything but the lock is written; None for a new one.

  Yields:
    The directory, locked against other processes.

  Raises:
    ConfigMismatchError: it belongs to another run; lists the differences.
    StorageError: it cannot be used.
  """
  directory = Workdir(pathlib.Path(path))
  check_ours(directory.path, CONFIG_FILE, "run")
  with atomic.exclusive(directory.path / LOCK_FILE):
    atomic.sweep(directory.path)
    new = directory.is_new
    if not new:
      _compare(directory, config)
    run = directory.read_id()
    if not run:  # first: whom it refuses may come again with another config
      named = name() if name else uuid.uuid4().hex
    if new:
      atomic.write_json(directory.path / CONFIG_FILE, dict(config))
    if not run:
      atomic.write_json(directory.path / _ID_FILE, {"run": named})
    yield directory


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[str]:
  """Lists in which keys two configurations differ.

  Args:
    old: nested dictionaries.
    new: nested dictionaries.
    prefix: of the keys, dotted.

  Returns:
    One entry a key, `loss.clip_low: 0.2 -> 0.3`, in order of the keys.
  """
  found: list[str] = []
  for key in sorted({*old, *new}):
    name = f"{prefix}{key}"
    before, after = old.get(key), new.get(key)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      found += differences(before, after, f"{name}.")
    elif key not in old:
      found.append(f"{name}: absent -> {after!r}")
    elif key not in new:
      found.append(f"{name}: {before!r} -> absent")
    elif before != after:
      found.append(f"{name}: {before!r} -> {after!r}")
  return found


def listed(found: Sequence[str]) -> str:
  """Lists differences in one line, the first few in words.

  Args:
    found: what `differences` returned.

  Returns:
    They, and how many more there are.
  """
  shown = "; ".join(found[:_MAX_SHOWN])
  more = len(found) - _MAX_SHOWN
  return f"{shown}; and {more} more" if more > 0 else shown


def check_ours(path: pathlib.Path, file: str, kind: str) -> None:
  """Raises where a directory with other things in it would be written to.

  Args:
    path: the directory; may be missing.
    file: that says whose it is.
    kind: of what it is made for: `run`.

  Raises:
    StorageError: it cannot be read, or is neither empty nor one of this kind.
  """
  if not _is_there(path):
    return
  try:
    entries = os.listdir(path)
  except OSError as error:
    raise atomic.StorageError(
        f"directory {path}: {atomic.reason(error)}"
    ) from error
  foreign = [
      name
      for name in entries  # one killed at its very first write leaves ours
      if name not in (LOCK_FILE, *_EARLY) and not atomic.is_partial(name, file)
  ]
  if foreign and file not in entries:
    raise atomic.StorageError(
        f"directory {path} is not empty and holds no {file}; give an empty"
        f" directory or that of a {kind}"
    )


def _check_name(path: str) -> None:
  """Raises where a path is none that a run can be kept under."""
  if _URL.match(path):
    raise atomic.StorageError(
        f"workdir {path}: must be a local directory; only the published weights"
        f" may lie elsewhere, config.publish.bucket={path}"
    )
  try:  # TensorStore takes no other paths
    os.fsencode(os.path.abspath(path)).decode("utf-8")
  except UnicodeDecodeError as error:
    raise atomic.StorageError(
        f"workdir {path}: its path must be UTF-8"
    ) from error


def _is_there(path: pathlib.Path) -> bool:
  """Whether something has that name, be it readable or not."""
  try:
    os.stat(path)
  except FileNotFoundError:
    return False
  except OSError as error:
    raise atomic.StorageError(
        f"workdir {path}: {atomic.reason(error)}"
    ) from error
  return True


def _compare(directory: Workdir, config: Mapping[str, Any]) -> None:
  """Raises unless the directory belongs to this configuration."""
  found = differences(directory.read_config(), config)
  if found:
    raise ConfigMismatchError(
        f"workdir {directory.path} belongs to a run with another config:"
        f" {listed(found)}; give another --workdir"
    )
