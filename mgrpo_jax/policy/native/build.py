"""Compiles this folder's C++ for the machine that runs it, once.

The library is kept in $XDG_CACHE_HOME/mgrpo_jax, or ~/.cache/mgrpo_jax, under a
name that says of what it was made, and for what processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence

import jax

from mgrpo_jax.policy.native import targets

_FOLDER = pathlib.Path(__file__).parent
_SOURCES = ("tiles.cc", "streams.cc")
_HEADERS = ("shares.h",)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 300  # seconds; it takes ten
_ONE = threading.Lock()  # XLA takes a program once
_ADVICE = (
    "install one (g++ or clang++), name it by the environment variable CXX, or"
    " choose kernels and decode_attention that need none: turned, blocks"
)


def compiler() -> list[str] | None:
  """Finds a compiler of C++, as a command with what it is always told.

  Returns:
    What the environment variable CXX says, or the first of c++, g++ and clang++
    that is installed; None for none.

  Raises:
    ValueError: CXX is no command.
  """
  try:
    own = shlex.split(os.environ.get("CXX", ""))
  except ValueError as error:
    raise ValueError(f"CXX: {error}: {os.environ['CXX']!r}") from error
  if own:
    return own
  found = next(filter(None, map(shutil.which, _COMPILERS)), None)
  return [found] if found else None


def library() -> ctypes.CDLL:
  """Compiles the programs where that was not done, and tells XLA of them.

  Returns:
    The library that has them.

  Raises:
    ValueError: there is no compiler, it failed, or what it made cannot be kept
      or is not safe to load; says why.
  """
  with _ONE:
    return _registered()


@functools.cache
def _registered() -> ctypes.CDLL:
  """The library, when XLA was told of it."""
  found = _found()
  for target, handler in targets.HANDLERS.items():
    capsule = jax.ffi.pycapsule(getattr(found, handler))
    jax.ffi.register_ffi_target(target, capsule, platform="cpu")
  return found


def _found() -> ctypes.CDLL:
  """The library for this machine, from its place or made."""
  try:
    place = _place()
    return _kept(place) or _made(place)
  except (OSError, RuntimeError) as error:  # the latter where there is no home
    raise ValueError(
        f"cannot keep what is compiled: {error}; XDG_CACHE_HOME names a place"
    ) from error


def _place() -> pathlib.Path:
  """Where the library for this machine is, or will be."""
  home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
  if not home.is_absolute():  # as the specification has it
    home = pathlib.Path.home() / ".cache"
  return home / "mgrpo_jax" / f"native-{_digest()}.so"


def _kept(place: pathlib.Path) -> ctypes.CDLL | None:
  """The library, None where there is none that can be loaded."""
  if not place.exists():
    return None
  _check_owned(place.parent)
  _check_owned(place)
  return _loaded(place)


def _made(place: pathlib.Path) -> ctypes.CDLL:
  """Compiles the library; it is in its place once it was loaded."""
  command = compiler()
  if command is None:
    raise ValueError(f"there is no compiler of C++: {_ADVICE}")
  place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
  _check_owned(place.parent)
  with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
    made = pathlib.Path(scratch) / place.name
    include = f"-isystem{jax.ffi.include_dir()}"
    sources = [str(_FOLDER / name) for name in _SOURCES]
    _run([*command, *_FLAGS, include, *sources, "-o", str(made)])
    found = _loaded(made) if made.is_file() else None
    if found is None:
      raise ValueError(
          f"{command[0]} made nothing that can be loaded; {_ADVICE}"
      )
    made.chmod(0o600)
    with made.open("rb") as file:  # whole, whatever happens to the machine
      os.fsync(file.fileno())
    if place.is_dir() and not place.is_symlink():
      shutil.rmtree(place)
    made.replace(place)
  return found


def _loaded(place: pathlib.Path) -> ctypes.CDLL | None:
  """Loads a library, None where it is not one with all of the programs."""
  try:
    found = ctypes.CDLL(str(place))
  except OSError:
    return None
  names = (*targets.HANDLERS.values(), "MgrpoTileColumns")
  return found if all(hasattr(found, name) for name in names) else None


def _check_owned(path: pathlib.Path) -> None:
  """Raises ValueError where others could have written what is loaded."""
  status = path.stat()
  if status.st_uid != os.geteuid() or status.st_mode & 0o022:
    raise ValueError(
        f"{path} is another user's, or others may write to it: what lies there"
        " is not loaded; XDG_CACHE_HOME names another place"
    )


def _run(command: Sequence[str]) -> None:
  """Runs a compiler, and ends with it whatever it has started."""
  with tempfile.TemporaryFile() as errors:
    try:
      process = subprocess.Popen(
          command,
          stdin=subprocess.DEVNULL,
          stdout=subprocess.DEVNULL,
          stderr=errors,
          start_new_session=True,
      )
    except OSError as error:
      raise ValueError(f"{command[0]} failed: {error}; {_ADVICE}") from error
    try:
      code = process.wait(_TIMEOUT)
    except subprocess.TimeoutExpired as error:
      why = f"it took more than {_TIMEOUT} s"
      raise ValueError(f"{command[0]} failed: {why}; {_ADVICE}") from error
    finally:
      with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
  if code:
    last = said[-1] if said else f"code {code}"
    what = next((line for line in said if "error" in line), last)
    raise ValueError(f"{command[0]} failed: {what}; {_ADVICE}")


def _digest() -> str:
  """Names what the library depends on: its sources, JAX's headers, the machine.

  Not the compiler, which need not be there any more.
  """
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    text = platform.processor()
  told = {
      line
      for line in text.splitlines()
      if line.startswith(("model name", "flags", "Features"))
  }
  parts = (
      *(platform.machine(), *platform.libc_ver(), jax.__version__),
      *(*sorted(told), *_FLAGS),
  )
  digest = hashlib.sha256("\n".join(parts).encode())
  for name in (*_SOURCES, *_HEADERS):
    digest.update((_FOLDER / name).read_bytes())
  return digest.hexdigest()[:16]
