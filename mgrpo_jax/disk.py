"""Files of a local disk: read straight to their place, on the disk soon.

What nobody has read or written lately comes past the page cache: that takes
files in pages of 4 KiB until it knows them, so that of many files of a few MB
this disk gave half as much a second. What lies in the page cache, as what was
published a moment ago does, is copied from there.

What is written stays in the page cache for half a minute before a system begins
to move it to the disk, which then is busy while whoever needs it there waits.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import io
import os
import stat

import numpy as np

PAGE = 4096  # bytes; what is read past the page cache lies at multiples
_LEAST = 1 << 19  # bytes; less is read before it could be asked about
_AT_ONCE = 8  # files; enough to keep a disk busy


@functools.cache
def threads(purpose: str) -> concurrent.futures.Executor:
  """Returns this process's threads that do one thing with files.

  Args:
    purpose: part of their names; none waits for another one's.
  """
  return concurrent.futures.ThreadPoolExecutor(
      _AT_ONCE, thread_name_prefix=f"disk_{purpose}"
  )


def read(path: str, into: np.ndarray, *, size: int) -> None:
  """Reads the beginning of a file.

  Args:
    path: of the file.
    into: uint8 [bytes], contiguous, which is filled.
    size: bytes that the file must have.

  Raises:
    OSError: there is no such file, or it cannot be read.
    ValueError: it has another size, or is no file but a pipe, a device or a
      folder, from which a read may never return.
  """
  with os.fdopen(_open(path), "rb", buffering=0) as file:
    if os.fstat(file.fileno()).st_size != size:
      raise ValueError(f"{path} has another size")
    done = _read_past_cache(file, into)
    file.seek(done)
    while done < into.size:
      got = file.readinto(into[done:].data)
      if not got:
        raise OSError(errno.EIO, "the file ended", path)
      done += got


def hasten(path: str) -> None:
  """Has a file that was just written begin its way to the disk.

  Nobody waits for that. What has not arrived stays in the page cache, so that
  readers find most of the file there.

  Args:
    path: of the file; one that is gone, or is no file, is left alone.
  """
  if hasattr(os, "posix_fadvise"):
    with contextlib.suppress(RuntimeError):  # Python ends, and takes no more
      threads("hasten").submit(_begin_to_write, path)


def _begin_to_write(path: str) -> None:
  """Asks for a file's memory back, which first has to be on the disk."""
  with contextlib.suppress(OSError, ValueError):
    descriptor = _open(path)
    try:
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
      os.close(descriptor)


def _open(path: str) -> int:
  """Opens a file, and nothing else; of a pipe it would wait for a writer."""
  flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
  descriptor = os.open(path, flags)
  if not stat.S_ISREG(os.fstat(descriptor).st_mode):
    os.close(descriptor)
    raise ValueError(f"{path} is not a file")
  return descriptor


def _read_past_cache(file: io.FileIO, into: np.ndarray) -> int:
  """Reads whole pages where that is possible and quicker; returns bytes."""
  pages = into.size - into.size % PAGE
  if pages < _LEAST or into.ctypes.data % PAGE or _is_cached(file):
    return 0
  descriptor, done = file.fileno(), 0
  flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
  try:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    while done < pages and done % PAGE == 0:
      got = os.preadv(descriptor, [into[done:pages].data], done)
      if not got:
        break
      done += got
  except OSError:
    pass  # not every file system can; one that cannot read says so once more
  finally:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
  return done


def _is_cached(file: io.FileIO) -> bool:
  """Whether a file's first byte is in memory; true where nobody can say."""
  if not hasattr(os, "RWF_NOWAIT"):
    return True
  descriptor = file.fileno()
  os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # not more than that
  try:
    os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
  except BlockingIOError:
    return False
  except OSError:
    pass
  os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
  return True
