"""What writers that were killed leave on a local disk.

TensorStore's file driver writes the value of `KEY` to `KEY.__lock`, which it
locks, and renames that. Who comes after one that was killed in between writes
over what is there, and does not shorten it: the end of a longer value becomes
part of the key (0.1.86).
"""

import fcntl
import os
import pathlib
import struct

SUFFIX = ".__lock"


def empty(root: pathlib.Path | None, key: str) -> None:
  """Empties the lock file of a key, if there is one that nobody holds.

  Args:
    root: where keys lie; None for nowhere on a disk.
    key: which is written next. What cannot be emptied stays as it is.
  """
  if root is None:
    return
  lock = root / f"{key}{SUFFIX}"
  try:
    descriptor = os.open(lock, os.O_WRONLY | os.O_CLOEXEC)
  except OSError:
    return  # as a rule it is not there; the writer says if there is more to it
  try:
    if _take(descriptor) and os.path.samestat(
        os.stat(lock), os.fstat(descriptor)
    ):
      os.ftruncate(descriptor, 0)  # still a lock: only who holds it renames it
  except OSError:
    pass
  finally:
    os.close(descriptor)


def _take(descriptor: int) -> bool:
  """Locks a file as TensorStore does; False where it is locked."""
  if not hasattr(fcntl, "F_OFD_SETLK"):
    return False
  whole = struct.pack("hhqqiI", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0, 0)
  try:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)
  except BlockingIOError:
    return False
  return True
