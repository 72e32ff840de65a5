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

SIZES = (1, 2, 4, 8)  # bytes of an element; words are as wide


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
            np.asarray(piece).view(grid.dtype)
            ^ np.asarray(before.pieces[number]).view(grid.dtype)
        )
        for number, piece in held.pieces.items()
    }
    return Parts(grid=grid, pieces=pieces)

  return leaves.threaded(one, new, base)


def apply(base: Held, difference: Held) -> Held:
  """Makes of a difference what it was taken from, in its own memory.

  Args:
    base: an array, or chunks of one.
    difference: words of the same shape, of the same chunks; overwritten.

  Returns:
    What has the base's dtype and the difference's memory.
  """
  if isinstance(base, Parts):
    pieces = {
        number: _applied(
            np.asarray(piece), np.asarray(difference.pieces[number])
        )
        for number, piece in base.pieces.items()
    }
    return Parts(grid=base.grid, pieces=pieces)
  return _applied(base, difference)


def _applied(base: np.ndarray, words: np.ndarray) -> np.ndarray:
  """Applies words to an array, in the memory of the words."""
  np.bitwise_xor(words, base.view(words.dtype), out=words)
  return words.view(base.dtype)


def _word(dtype: np.dtype) -> np.dtype:
  """An unsigned integer as wide as an element."""
  return np.dtype(f"u{dtype.itemsize}")
