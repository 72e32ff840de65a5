"""New tokens of many streams -> prefill calls of fixed shapes.

A stream's tokens are cut into pieces, and each piece padded to a bucket, by its
own lengths only; a bucket always goes with the same number of rows. So the
shapes that compute a stream do not depend on what is computed beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mgrpo_jax.sampler.slots import Slot


class Piece(NamedTuple):
  """Some tokens of a stream, prefilled at once.

  Attributes:
    order: among the pieces of its stream.
    bucket: tokens after padding.
    slot: whose stream it is.
    start: position of the first token.
    length: tokens before padding.
  """

  order: int
  bucket: int
  slot: Slot
  start: int
  length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """One call of `device.prefill`; P rows of T tokens, unused rows last."""

  tokens: np.ndarray  # [P, T] int32
  lengths: np.ndarray  # [P] int32
  slots: np.ndarray  # [P] int32
  starts: np.ndarray  # [P] int32


def cut(slot: Slot, end: int, *, buckets: Sequence[int]) -> Iterator[Piece]:
  """Cuts a stream from its first uncached token on.

  Args:
    slot: of the stream.
    end: position after the last token to prefill.
    buckets: lengths to pad to, ascending.

  Yields:
    Pieces of the largest bucket's length, then a shorter one.
  """
  for order, start in enumerate(range(slot.cached, end, buckets[-1])):
    length = min(end - start, buckets[-1])
    bucket = next(size for size in buckets if size >= length)
    yield Piece(order, bucket, slot, start, length)


def calls(pieces: Iterable[Piece], *, call_tokens: int) -> Iterator[Call]:
  """Lays pieces into calls, each stream's pieces in order.

  Args:
    pieces: of any streams.
    call_tokens: of one call, padding included; a bucket has call_tokens /
      bucket rows, at least 1.

  Yields:
    What to call `device.prefill` with.
  """
  groups: dict[tuple[int, int], list[Piece]] = {}
  for piece in pieces:
    groups.setdefault((piece.order, piece.bucket), []).append(piece)
  for (_, bucket), group in sorted(groups.items(), key=lambda item: item[0]):
    rows = _rows(bucket, call_tokens)
    for first in range(0, len(group), rows):
      yield _pad(group[first : first + rows], rows, bucket)


def empty(bucket: int, *, call_tokens: int) -> Call:
  """A call of a bucket's shape that prefills nothing.

  Args:
    bucket: tokens of a row.
    call_tokens: see `calls`.

  Returns:
    The call; all its rows are unused.
  """
  return _pad([], _rows(bucket, call_tokens), bucket)


def _rows(bucket: int, call_tokens: int) -> int:
  """Rows of a bucket's calls."""
  return max(1, call_tokens // bucket)


def _pad(group: Sequence[Piece], rows: int, bucket: int) -> Call:
  """Writes pieces into arrays."""
  tokens = np.zeros((rows, bucket), np.int32)
  columns = np.zeros((3, rows), np.int32)
  for row, piece in enumerate(group):
    stop = piece.start + piece.length
    tokens[row, : piece.length] = piece.slot.stream[piece.start : stop]
    columns[:, row] = piece.length, piece.slot.index, piece.start
  lengths, slots, starts = columns
  return Call(tokens=tokens, lengths=lengths, slots=slots, starts=starts)
