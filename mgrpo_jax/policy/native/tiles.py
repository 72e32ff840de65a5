"""Products of float32 tokens with kernels in tiles, on a CPU's cores.

XLA's products of few tokens keep little more than one core of two busy, and it
arranges the kernel anew in every one. `tiles.cc` shares a product's tiles among
all cores until none is left, and finds the kernel as it needs it (measured, see
experiments/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgrpo_jax.policy.native import build


@flax.struct.dataclass
class Tiled:
  """Kernels [*inputs, *outputs] of the same inputs, in tiles of outputs."""

  tiles: Any  # float32 [tiles, inputs, columns]; the last is filled up with 0
  outputs: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)


def columns() -> int:
  """How many outputs a tile has on this machine.

  Raises:
    ValueError: no program for them can be compiled here; says why.
  """
  return int(build.library().MgrpoTileColumns())


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
  width = columns()
  matrix = jnp.concatenate(
      [jnp.asarray(kernel, jnp.float32) for kernel in kernels], axis=1
  )
  filled = jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % width)))
  inputs, number = filled.shape
  tiles = filled.reshape(inputs, number // width, width).transpose(1, 0, 2)
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
  number, _, width = kernels.tiles.shape
  call = jax.ffi.ffi_call(
      build.MULTIPLY_TILES,
      jax.ShapeDtypeStruct((len(rows), number * width), jnp.float32),
  )
  return call(rows, kernels.tiles)[:, : sum(map(math.prod, kernels.outputs))]
