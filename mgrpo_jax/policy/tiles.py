"""Products of float32 tokens with kernels in tiles, on a CPU's cores.

XLA's products of few tokens keep little more than one core of two busy, and it
arranges the kernel anew in every one. `tiles.cc` shares a product's tiles among
all cores until none is left, and finds the kernel as it needs it (measured, see
experiments/README.md). It is compiled for the machine it runs on, once, into
$XDG_CACHE_HOME/mgrpo_jax, or ~/.cache/mgrpo_jax.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SOURCE = pathlib.Path(__file__).with_name("tiles.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_TARGET = "mgrpo_multiply_tiles"
_TIMEOUT = 300  # seconds; it takes four
_ADVICE = (
    "install one (g++ or clang++), name it by the environment variable CXX, or"
    " choose other kernels: turned"
)


@flax.struct.dataclass
class Tiled:
  """Kernels [*inputs, *outputs] of the same inputs, in tiles of outputs."""

  tiles: Any  # float32 [tiles, inputs, columns]; the last is filled up with 0
  outputs: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)


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


def arrange(
    kernels: Sequence[Float[Array, "inputs outputs"]],
    outputs: Sequence[tuple[int, ...]],
) -> Tiled:
  """Cuts kernels of the same inputs into tiles.

  Args:
    kernels: as matrices; taken as float32.
    outputs: shape of each one's outputs.

  Returns:
    The same numbers.

  Raises:
    ValueError: no program for them can be compiled here; says why.
  """
  columns = load()
  matrix = jnp.concatenate(
      [jnp.asarray(kernel, jnp.float32) for kernel in kernels], axis=1
  )
  filled = jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % columns)))
  inputs, number = filled.shape
  tiles = filled.reshape(inputs, number // columns, columns).transpose(1, 0, 2)
  return Tiled(tiles=tiles, outputs=tuple(outputs))


def multiply(
    rows: Float[Array, "N inputs"], kernels: Tiled
) -> Float[Array, "N outputs"]:
  """Multiplies tokens with all of the kernels.

  A token's products are the same bits whatever tokens stand beside it.

  Args:
    rows: float32, on a CPU and one device.
    kernels: from `arrange`.

  Returns:
    Float32 products, one kernel's after the other's.
  """
  number, _, columns = kernels.tiles.shape
  call = jax.ffi.ffi_call(
      _TARGET,
      jax.ShapeDtypeStruct((len(rows), number * columns), jnp.float32),
  )
  return call(rows, kernels.tiles)[:, : sum(map(math.prod, kernels.outputs))]


@functools.cache
def load() -> int:
  """Compiles the program where that was not done before, and tells XLA of it.

  Returns:
    Outputs of a tile.

  Raises:
    ValueError: there is no compiler, or it failed; says why.
  """
  library = ctypes.CDLL(str(_compiled()))
  jax.ffi.register_ffi_target(
      _TARGET, jax.ffi.pycapsule(library.MgrpoMultiplyTiles), platform="cpu"
  )
  return int(library.MgrpoTileColumns())


def _compiled() -> pathlib.Path:
  """The program for this machine, from the cache or made."""
  target = _cache() / f"tiles-{_digest()}.so"
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
      _run([*command, *_FLAGS, include, str(_SOURCE), "-o", str(made)])
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
  """Names what a program depends on: its source, its headers, the machine."""
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
  digest = hashlib.sha256(_SOURCE.read_bytes())
  digest.update("\n".join(parts).encode())
  return digest.hexdigest()[:16]
