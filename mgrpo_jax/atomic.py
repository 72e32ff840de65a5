"""Files of a run directory that exist whole or not at all.

Everything small that a run leaves on the local disk (summary.json, pages,
pictures, finished rollout files) is written through `write`: to a temporary
file beside the target, flushed to the disk, then renamed over it. A reader, or
a run started again after SIGKILL, sees the old contents or the new ones.
`exclusive` keeps a second run out of a run directory.

Failures are `StorageError`s whose text is one line: what, where, why.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

_PARTIAL = ".partial"
_count = itertools.count()
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # as TensorStore says it


class StorageError(OSError):
  """Reading or writing failed; the text says what, where and why."""


class CorruptError(StorageError):
  """What was read is not what was written."""


class MismatchError(ValueError):
  """What was read is whole, but of another run, configuration or format."""


def reason(error: BaseException) -> str:
  """Returns why a storage operation failed, in one line.

  Args:
    error: what the operation raised.

  Returns:
    The operating system's words where they are known, else the first line of
    the error's text, at most 200 characters.
  """
  text = str(error)
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if code := _OS_ERROR.search(text):
    return os.strerror(int(code[1]))
  lines = text.strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


def write(path: str | os.PathLike[str], data: bytes | str) -> None:
  """Writes a file so that it is seen whole or not at all.

  Missing parent directories are made. A SIGKILL may leave a temporary file
  whose name starts with a dot and ends with `.partial`; `sweep` removes it.

  Args:
    path: the file; an existing one is replaced.
    data: its contents; text is encoded as UTF-8.

  Raises:
    StorageError: the file cannot be written (disk full, no permission, …).
  """
  path = pathlib.Path(path)
  name = f".{path.name}.{os.getpid()}.{next(_count)}{_PARTIAL}"
  temporary = path.with_name(name)
  payload = data.encode("utf-8") if isinstance(data, str) else data
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temporary, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise
    _sync_directory(path.parent)
  except OSError as error:
    raise StorageError(f"cannot write {path}: {reason(error)}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes a value as indented JSON, whole or not at all.

  Args:
    path: the file; an existing one is replaced.
    value: anything JSON can hold; NaN and infinities are refused, because
      other languages cannot read them.

  Raises:
    StorageError: the file cannot be written.
    ValueError: the value is not JSON.
  """
  try:
    text = json.dumps(value, indent=2, allow_nan=False)
  except (TypeError, ValueError) as error:
    raise ValueError(f"value for {path} is not JSON: {error}") from error
  write(path, text + "\n")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives an empty directory that takes a path's place if all goes well.

  What had that name (a directory, a file, a symlink itself) stays until the
  new one is complete. A SIGKILL leaves it as it was; between the two renames
  it leaves it as `.NAME.old`, which the next call puts back. One process at a
  time may call it.

  Args:
    path: the directory to make or replace.

  Yields:
    `.NAME.new` beside it, to be filled.

  Raises:
    StorageError: the old one cannot be removed, or the new one not made.
  """
  path = pathlib.Path(path)
  new, old = (path.with_name(f".{path.name}.{end}") for end in ("new", "old"))
  with _replacing(path):
    if not os.path.lexists(path) and os.path.lexists(old):
      os.replace(old, path)
    _remove(new)
    _remove(old)
    new.mkdir(parents=True)
  try:
    yield new
    with _replacing(path):
      if os.path.lexists(path):
        os.replace(path, old)
      os.replace(new, path)
      _sync_directory(path.parent)
      _remove(old)
  except BaseException:
    shutil.rmtree(new, ignore_errors=True)
    raise


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[None]:
  """Says which directory it was that could not be replaced."""
  try:
    yield
  except OSError as error:
    raise StorageError(f"cannot replace {path}: {reason(error)}") from error


def _remove(path: pathlib.Path) -> None:
  """Removes whatever has that name, if anything."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> Any:
  """Reads a JSON file.

  Args:
    path: the file.

  Returns:
    Its value.

  Raises:
    StorageError: the file cannot be read.
    CorruptError: it does not hold JSON.
  """
  try:
    return json.loads(pathlib.Path(path).read_bytes())
  except OSError as error:
    raise StorageError(f"cannot read {path}: {reason(error)}") from error
  except (ValueError, RecursionError) as error:  # brackets without end
    raise CorruptError(f"{path} is not JSON: {reason(error)}") from error


def is_partial(name: str, target: str) -> bool:
  """Says whether a file is what a killed `write` of a target left.

  Args:
    name: of the file.
    target: name of what was being written.

  Returns:
    Whether it is.
  """
  return name.startswith(f".{target}.") and name.endswith(_PARTIAL)


def sweep(directory: str | os.PathLike[str]) -> int:
  """Removes the temporary files that killed writers left behind.

  Call it only while no other process writes there.

  Args:
    directory: searched with everything below it.

  Returns:
    How many files were removed.

  Raises:
    StorageError: a file cannot be removed.
  """
  removed = 0
  try:
    for path in pathlib.Path(directory).rglob(f".*{_PARTIAL}"):
      path.unlink()
      removed += 1
  except OSError as error:
    raise StorageError(f"cannot sweep {directory}: {reason(error)}") from error
  return removed


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str]) -> Iterator[None]:
  """Holds a lock file, so that one process at a time uses a directory.

  The lock belongs to the process: it is gone when the process is, also after
  SIGKILL. The file itself stays.

  Args:
    path: the lock file, made where it is missing.

  Yields:
    Nothing; the lock is held inside the block.

  Raises:
    StorageError: another process holds it, or it cannot be made.
  """
  path = pathlib.Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    raise StorageError(f"cannot lock {path}: {reason(error)}") from error
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise StorageError(
          f"{path.parent} is in use by another process (lock {path.name})"
      ) from error
    yield
  finally:
    os.close(descriptor)


def _sync_directory(directory: pathlib.Path) -> None:
  """Makes a rename durable."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
