"""Compiles this folder's C++ for the machine that runs it, once.

The program is kept in $XDG_CACHE_HOME/mgrpo_jax, or ~/.cache/mgrpo_jax, under a
name that says of what it was made, and for what processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import jax

# What XLA calls each program, and the function that it is.
MULTIPLY_TILES = "mgrpo_multiply_tiles"
ATTEND_STREAMS = "mgrpo_attend_streams"
_HANDLERS = {
    MULTIPLY_TILES: "MgrpoMultiplyTiles",
    ATTEND_STREAMS: "MgrpoAttendStreams",
}
_FOLDER = pathlib.Path(__file__).parent
_SOURCES = ("tiles.cc", "streams.cc")
_HEADERS = ("shares.h",)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 300  # seconds; it takes ten
_ADVICE = (
    "install one (g++ or clang++), name it by the environment variable CXX, or"
    " choose kernels and decode_attention that need none: turned, blocks"
)


def compiler() -> list[str] | None:
  """Finds a compiler of C++, as a command with what it is always told.

  Returns:
    What the environment variable CXX says, or the first of c++, g++ and clang++
    that is installed; None for none.
  """
  if own := shlex.split(os.environ.get("CXX", "")):
    return own
  found = next(filter(None, map(shutil.which, _COMPILERS)), None)
  return [found] if found else None


@functools.cache
def library() -> ctypes.CDLL:
  """Compiles the programs where that was not done, and tells XLA of them.

  Returns:
    The library that has them.

  Raises:
    ValueError: there is no compiler, or it failed; says why.
  """
  found = ctypes.CDLL(str(_compiled()))
  for target, handler in _HANDLERS.items():
    capsule = jax.ffi.pycapsule(getattr(found, handler))
    jax.ffi.register_ffi_target(target, capsule, platform="cpu")
  return found


def _compiled() -> pathlib.Path:
  """The library for this machine, from the cache or made."""
  target = _cache() / f"native-{_digest()}.so"
  if target.exists():
    return target
  command = compiler()
  if command is None:
    raise ValueError(f"there is no compiler of C++: {_ADVICE}")
  try:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
      made = pathlib.Path(scratch) / target.name
      include = f"-isystem{jax.ffi.include_dir()}"
      sources = [str(_FOLDER / name) for name in _SOURCES]
      _run([*command, *_FLAGS, include, *sources, "-o", str(made)])
      made.replace(target)
  except OSError as error:
    raise ValueError(
        f"cannot keep what it compiles: {error}; XDG_CACHE_HOME names a place"
    ) from error
  return target


def _run(command: Sequence[str]) -> None:
  """Runs a compiler."""
  try:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    raise ValueError(f"{command[0]} failed: {error}; {_ADVICE}") from error
  if done.returncode:
    said = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
    what = next((line for line in said if "error" in line), said[-1])
    raise ValueError(f"{command[0]} failed: {what}; {_ADVICE}")


def _cache() -> pathlib.Path:
  """Where compiled programs are kept."""
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(home).expanduser() / "mgrpo_jax"


def _digest() -> str:
  """Names what a program depends on: its sources, headers, the machine."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    text = platform.processor()
  told = {
      line
      for line in text.splitlines()
      if line.startswith(("model name", "flags", "Features"))
  }
  parts = (platform.machine(), jax.__version__, *sorted(told), *_FLAGS)
  digest = hashlib.sha256("\n".join(parts).encode())
  for name in (*_SOURCES, *_HEADERS):
    digest.update((_FOLDER / name).read_bytes())
  return digest.hexdigest()[:16]
