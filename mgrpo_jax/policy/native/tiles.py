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

from mgrpo_jax.policy.native import targets


@flax.struct.dataclass
class Tiled:
  """Kernels [*inputs, *outputs] of the same inputs, in tiles of outputs."""

  tiles: Any  # float32 [tiles, inputs, columns]; the last is filled up with 0
  outputs: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)


def cut(
    kernels: Sequence[Float[Array, "inputs outputs"]],
    outputs: Sequence[tuple[int, ...]],
    *,
    columns: int,
) -> Tiled:
  """Cuts kernels of the same inputs into tiles.

  Args:
    kernels: as matrices; taken as float32.
    outputs: shape of each one's outputs.
    columns: outputs of a tile, of the compiled program.

  Returns:
    The same numbers.

  Raises:
    ValueError: outputs are not those of the kernels.
  """
  widths = [kernel.shape[1] for kernel in kernels]
  if widths != list(map(math.prod, outputs)):
    raise ValueError(f"outputs {list(outputs)} are not those of {widths}")
  matrix = jnp.concatenate(
      [jnp.asarray(kernel, jnp.float32) for kernel in kernels], axis=1
  )
  filled = jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % columns)))
  inputs, number = filled.shape
  tiles = filled.reshape(inputs, number // columns, columns)
  return Tiled(tiles=tiles.transpose(1, 0, 2), outputs=tuple(outputs))


def multiply(
    rows: Float[Array, "N inputs"], kernels: Tiled
) -> Float[Array, "N outputs"]:
  """Multiplies tokens with all of the kernels.

  A token's products are the same bits whatever tokens stand beside it.

  Args:
    rows: float32, on a CPU and one device.
    kernels: from `cut`, where `build.library` was called.

  Returns:
    Float32 products, one kernel's after the other's.

  Raises:
    ValueError: the tokens are not float32, or not as wide as kernels' inputs.
  """
  number, inputs, columns = kernels.tiles.shape
  if (rows.dtype, rows.shape[1:]) != (jnp.float32, (inputs,)):
    raise ValueError(
        f"rows must be float32 [N, {inputs}], got {rows.dtype}"
        f" {list(rows.shape)}"
    )
  call = jax.ffi.ffi_call(
      targets.MULTIPLY_TILES,
      jax.ShapeDtypeStruct((len(rows), number * columns), jnp.float32),
  )
  return call(rows, kernels.tiles)[:, : sum(map(math.prod, kernels.outputs))]
