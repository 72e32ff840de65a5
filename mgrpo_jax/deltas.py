"""Differences between arrays: the exclusive or of their bits.

    words = new ^ base          new = words ^ base

Nothing is rounded and every value survives, NaNs and the sign of zero too. Of
weights of neighbouring steps most high bits are equal, so the words compress.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from mgrpo_jax import leaves
from mgrpo_jax.chunks import Grid, Parts

Held = TypeVar("Held", np.ndarray, Parts)


def words(grid: Grid) -> Grid:
  """The form of differences between arrays of a form: unsigned, packed."""
  return dataclasses.replace(grid, dtype=_word(grid.dtype), packed=True)


def between(
    new: Mapping[str, Parts], base: Mapping[str, Parts]
) -> dict[str, Parts]:
  """Takes the differences of chunks, on as many threads as there are cores.

  Args:
    new: chunks of arrays by name.
    base: the same chunks of the base, cut alike.

  Returns:
    Words by name, as many bytes again as `new`.
  """

  def one(held: Parts, before: Parts) -> Parts:
    grid = words(held.grid)
    pieces = {
        number: np.asarray(
            piece.view(grid.dtype) ^ before.pieces[number].view(grid.dtype)
        )
        for number, piece in held.pieces.items()
    }
    return Parts(grid=grid, pieces=pieces)

  return leaves.threaded(one, new, base)


def apply(base: Held, difference: Held) -> Held:
  """Makes the base what its difference says, in the base's own memory.

  Args:
    base: an array, or chunks of one, which are changed.
    difference: words of the same shape, of the same chunks.

  Returns:
    The base.
  """
  changes = _pieces(difference)
  for number, into in _pieces(base).items():
    view = into.view(changes[number].dtype)
    np.bitwise_xor(view, changes[number], out=view)
  return base


def _pieces(held: np.ndarray | Parts) -> Mapping[int, np.ndarray]:
  """An array as one piece, or the pieces that are here."""
  return held.pieces if isinstance(held, Parts) else {0: held}


def _word(dtype: np.dtype) -> np.dtype:
  """An unsigned integer as wide as an element."""
  return np.dtype(f"u{dtype.itemsize}")
