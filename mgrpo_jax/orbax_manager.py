"""Orbax's manager of checkpoints: alone in its process, quiet, asked first."""

import logging
import os
import pathlib

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

_NOTES = "_CHECKPOINT_METADATA"  # a file of orbax's
_ORBAX = os.path.dirname(os.path.dirname(ocp.__file__))


def open_manager(
    directory: pathlib.Path, *, max_to_keep: int
) -> tuple[ocp.CheckpointManager, tuple[str, ...]]:
  """Opens a directory of checkpoints, and makes it where it is missing.

  Args:
    directory: absolute; what a killed save left behind in it is removed.
    max_to_keep: how many stay, ≥ 1.

  Returns:
    The manager of items `arrays` and `record`; what was found damaged and
    removed, a line each.

  Raises:
    OSError: the directory cannot be made or read.
    ValueError: orbax cannot open it.
  """
  _quieten()
  options = ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep,
      create=False,
      cleanup_tmp_directories=True,
      multiprocessing_options=_alone(),
  )
  try:
    directory.mkdir(parents=True, exist_ok=True)
    return _opened(directory, options), ()
  except (ValueError, RecursionError):
    dropped = _drop_notes(directory)
    return _opened(directory, options), dropped


def probe(path: pathlib.Path) -> None:
  """Finds out whether stored values can be read at all.

  Orbax reads on an event loop that it closes at the first failure; the reads
  still under way then complain on the console. So failures are found first.

  Args:
    path: of a checkpoint's arrays.

  Raises:
    ValueError: they cannot.
  """
  base = {"driver": "file", "path": f"{path}/"}
  kvstore = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
  keys = kvstore.list().result()
  if not keys:
    raise ValueError("the arrays are missing")
  for read in [kvstore.read(key) for key in keys]:
    if not read.result().value:  # empty where the file that held it is gone
      raise ValueError("stored values are missing")


def _opened(
    directory: pathlib.Path, options: ocp.CheckpointManagerOptions
) -> ocp.CheckpointManager:
  """Opens the directory with orbax."""
  return ocp.CheckpointManager(
      directory,
      options=options,
      item_handlers={
          "arrays": ocp.PyTreeCheckpointHandler(),
          "record": ocp.JsonCheckpointHandler(),
      },
  )


def _alone() -> ocp.options.MultiprocessingOptions:
  """Has orbax wait for no other process: they have no part in this."""
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  this = jax.process_index()
  return ocp.options.MultiprocessingOptions(
      primary_host=this,
      active_processes={this},
      barrier_sync_key_prefix=f"process_{this}",
  )


def _drop_notes(directory: pathlib.Path) -> tuple[str, ...]:
  """Removes orbax's notes on checkpoints, at whose damage it fails to open.

  Reading a checkpoint does not take them. Returns a line that names them.
  """
  for path in (notes := sorted(directory.glob(f"*/{_NOTES}"))):
    path.unlink()
  names = ", ".join(path.parent.name for path in notes)
  return (f"damaged {_NOTES} of checkpoints {names} in {directory}",)


class _NotOrbax(logging.Filter):
  """Drops what orbax says; what matters reaches the caller as an error."""

  def filter(self, record: logging.LogRecord) -> bool:
    """Returns whether to keep a record."""
    return not record.pathname.startswith(_ORBAX)


def _quieten() -> None:
  """Keeps orbax's log off the console."""
  logger = logging.getLogger("absl")
  if not any(isinstance(f, _NotOrbax) for f in logger.filters):
    logger.addFilter(_NotOrbax())
