"""Files are read as they are, whichever way the bytes come and go."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

from mgrpo_jax import disk

SIZES = [0, 1, disk.PAGE - 1, disk.PAGE, 3 << 20, (3 << 20) + 1, (3 << 20) - 1]


def memory(size, *, shift=0):
  """Memory that begins so many bytes after a page does."""
  room = np.full(size + 2 * disk.PAGE, 7, np.uint8)
  start = -room.ctypes.data % disk.PAGE + shift
  return room[start : start + size]


@pytest.fixture
def make(tmp_path):
  """Makes a file of random bytes, which is in the page cache or not."""

  def file(size, *, cached):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    path = tmp_path / "file"
    path.write_bytes(data.tobytes())
    if not cached:
      descriptor = os.open(path, os.O_RDONLY)
      os.fsync(descriptor)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(descriptor)
    return str(path), data

  return file


@pytest.fixture
def flagged(monkeypatch):
  """The flags that files were given while they were read."""
  said, straight = [], fcntl.fcntl

  def listen(descriptor, what, *flags):
    if what == fcntl.F_SETFL:
      said.extend(flags)
    return straight(descriptor, what, *flags)

  monkeypatch.setattr(fcntl, "fcntl", listen)
  return said


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_all_of_a_file_is_read(make, size, cached, shift):
  path, data = make(size, cached=cached)
  into = memory(size, shift=shift)
  disk.read(path, into, size=size)
  np.testing.assert_array_equal(into, data)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("wanted", [0, 5, 2 << 20, (2 << 20) + 5])
def test_the_beginning_of_a_file_is_read_and_no_more(make, wanted, cached):
  path, data = make(3 << 20, cached=cached)
  room = memory(3 << 20)
  disk.read(path, room[:wanted], size=data.size)
  np.testing.assert_array_equal(room[:wanted], data[:wanted])
  assert (room[wanted:] == 7).all()


@pytest.mark.parametrize("size", [0, 10, 3 << 20])
def test_a_file_of_another_size_is_refused(make, size):
  path, _ = make(size, cached=False)
  for other in (size + 1, max(0, size - 1) or 7):
    with pytest.raises(ValueError, match="another size"):
      disk.read(path, memory(min(size, 5)), size=other)
  with pytest.raises(FileNotFoundError):
    disk.read(f"{path}s", memory(1), size=1)


def test_what_is_in_the_page_cache_is_copied_from_there(make, flagged):
  """What was published a moment ago need not be on the disk yet."""
  path, data = make(3 << 20, cached=True)
  disk.read(path, memory(data.size), size=data.size)
  assert not flagged


def test_only_memory_that_begins_with_a_page_is_read_to_past_the_cache(
    make, flagged
):
  path, data = make(3 << 20, cached=False)
  disk.read(path, memory(data.size, shift=64), size=data.size)
  assert not flagged


def test_where_the_page_cache_cannot_be_passed_it_is_not(make, monkeypatch):
  path, data = make(3 << 20, cached=False)
  straight, asked = fcntl.fcntl, []

  def refuse(descriptor, what, *flags):
    if what == fcntl.F_SETFL and flags[0] & os.O_DIRECT:
      asked.append(flags)
      raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return straight(descriptor, what, *flags)

  monkeypatch.setattr(fcntl, "fcntl", refuse)
  into = memory(data.size)
  disk.read(path, into, size=data.size)
  np.testing.assert_array_equal(into, data)
  assert asked or disk._is_cached(open(path, "rb", buffering=0))


@pytest.mark.parametrize("gives", [[disk.PAGE, 0], [disk.PAGE, -1], [9], [-1]])
def test_what_comes_short_past_the_page_cache_is_read_on(
    make, monkeypatch, gives
):
  path, data = make(3 << 20, cached=False)
  straight, left = os.preadv, list(gives)

  def some(descriptor, buffers, offset, flags=0):
    if flags:  # whether it is cached: it is not
      raise BlockingIOError
    give = left.pop(0)
    if give < 0:
      raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return straight(descriptor, [buffers[0][:give]], offset) if give else 0

  monkeypatch.setattr(os, "preadv", some)
  monkeypatch.setattr(fcntl, "fcntl", lambda *_: 0)
  into = memory(data.size)
  disk.read(path, into, size=data.size)
  np.testing.assert_array_equal(into, data)
  assert not left


def test_a_file_that_ends_before_it_should_is_told(make, monkeypatch):
  path, data = make(100, cached=True)
  with monkeypatch.context() as patch:
    longer = os.stat_result([stat.S_IFREG] + [0] * 5 + [200] + [0] * 3)
    patch.setattr(os, "fstat", lambda _: longer)
    with pytest.raises(OSError, match="the file ended"):
      disk.read(path, memory(200), size=200)


def test_where_nobody_can_say_what_is_cached_files_are_read(make, monkeypatch):
  path, data = make(3 << 20, cached=False)
  monkeypatch.delattr(os, "RWF_NOWAIT")
  monkeypatch.delattr(os, "O_DIRECT")
  into = memory(data.size)
  disk.read(path, into, size=data.size)
  np.testing.assert_array_equal(into, data)


def hastened(path):
  """Waits until what was asked of a file is done: no thread is left at it."""
  disk.hasten(str(path))
  together = threading.Barrier(disk._AT_ONCE, timeout=60)
  for wait in [
      disk.threads("hasten").submit(together.wait) for _ in range(disk._AT_ONCE)
  ]:
    wait.result()


def test_a_file_on_its_way_to_the_disk_is_as_it_was(make, monkeypatch):
  path, data = make(3 << 20, cached=True)
  asked, really = [], os.posix_fadvise

  def advise(*given):
    asked.append(given[1:])
    really(*given)

  with monkeypatch.context() as patch:
    patch.setattr(os, "posix_fadvise", advise)
    hastened(path)
  assert asked == [(0, 0, os.POSIX_FADV_DONTNEED)]
  into = memory(data.size)
  disk.read(path, into, size=data.size)
  np.testing.assert_array_equal(into, data)


@pytest.mark.parametrize("name", ["pipe", ".", "gone"])
def test_only_files_are_hastened(tmp_path, monkeypatch, name):
  """What came in a file's place, or went, holds nobody and fails nothing."""
  os.mkfifo(tmp_path / "pipe")
  monkeypatch.setattr(os, "posix_fadvise", lambda *_: pytest.fail("asked"))
  disk._begin_to_write(str(tmp_path / name))


def test_no_file_stays_open(make):
  path, _ = make(10, cached=True)
  disk._begin_to_write(path)
  held = {os.path.realpath(one.path) for one in os.scandir("/proc/self/fd")}
  assert os.path.realpath(path) not in held


def test_where_nobody_can_be_asked_no_thread_is(monkeypatch):
  monkeypatch.delattr(os, "posix_fadvise")
  monkeypatch.setattr(disk, "threads", lambda _: pytest.fail("a thread"))
  disk.hasten("file")


def test_what_is_written_as_python_ends_is_written(tmp_path):
  """Threads, that read files or have them written, take no more by then."""
  code = """
import sys, threading
import numpy as np
from mgrpo_jax import store
def write():
  threading.main_thread().join()
  store.open_folder(sys.argv[1]).write_arrays("v", {"w": np.ones(9)})
  print("written")
threading.Thread(target=write).start()
"""
  command = [sys.executable, "-c", code, str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert (done.stdout, done.returncode) == ("written\n", 0), done.stderr
