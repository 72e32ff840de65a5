"""Which trajectories are laid into a row together, what they share once.

The rollouts of a task begin with one prompt, and the calls of a role with one
system prompt. Trajectories that begin alike form a piece: the tokens that they
share stand in the row once, and what each goes on with, its branch, behind
them. On the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mgrpo_jax.types import TrainBatch, Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """Trajectories that stand in one row, side by side.

  Attributes:
    members: where they stand in the sequence that was cut into pieces.
    shared: tokens that all of them begin with; 0 for a lone one.
    tokens: of the row that the piece takes.
    targets: sampled tokens of all members.
  """

  members: tuple[int, ...]
  shared: int
  tokens: int
  targets: int


def cut(
    trajectories: Sequence[Trajectory],
    *,
    least_shared: int,
    row_tokens: int,
    row_targets: int,
    most_members: int,
) -> list[Piece]:
  """Cuts trajectories into pieces of which each fits a row.

  Sorted by prompt, those that begin alike are neighbours; of all ways to cut
  that order, one is taken that leaves least tokens to compute. The last token
  before the first sampled one is never shared: it predicts that one, and each
  branch has it for itself.

  Args:
    trajectories: each fits a row.
    least_shared: tokens that are worth sharing, at least; 0 shares none.
    row_tokens: of a row.
    row_targets: sampled tokens of a row, at most.
    most_members: trajectories of a piece, at most.

  Returns:
    Pieces; without sharing one for each trajectory, in their order.
  """
  sizes = [len(one.tokens) for one in trajectories]
  targets = [int(np.sum(one.loss_mask > 0)) for one in trajectories]
  order = list(range(len(sizes)))
  bounds = [(i, i + 1, 0) for i in order]
  if least_shared:
    beginnings = [_beginning(one) for one in trajectories]
    # Big-endian, so that bytes are in the order of the numbers.
    order.sort(key=lambda i: beginnings[i].astype(">i4").tobytes())
    ordered = [beginnings[i] for i in order]
    bounds = _least_tokens(
        [sizes[i] for i in order],
        [targets[i] for i in order],
        [0, *map(_common, ordered, ordered[1:])],
        least_shared=least_shared,
        row_tokens=row_tokens,
        row_targets=row_targets,
        most_members=most_members,
    )
  return [
      Piece(
          members=tuple(order[first:end]),
          shared=shared,
          tokens=sum(sizes[i] for i in order[first:end])
          - (end - first - 1) * shared,
          targets=sum(targets[i] for i in order[first:end]),
      )
      for first, end, shared in bounds
  ]


def shared_fraction(batches: Sequence[TrainBatch]) -> float:
  """Computes how much of the trajectories need not be computed.

  Args:
    batches: micro-batches of NumPy arrays that may share; others share nothing.

  Returns:
    Tokens of the trajectories that rows lack, because another trajectory's
    stand for them, over all tokens of the trajectories; 0 without any.
  """
  lacking = real = 0
  for batch in batches:
    segments, seen = np.asarray(batch.segment_ids), batch.prefix_ids
    real += int(np.sum(segments > 0))
    if seen is None:
      continue
    starts = np.diff(segments, axis=1, prepend=0) != 0
    lacking += int(np.sum(np.asarray(batch.positions)[starts & (segments > 0)]))
    lacking -= sum(
        int(np.sum(np.isin(row, ids[ids > 0])))
        for row, ids in zip(segments, np.asarray(seen), strict=True)
    )
  return lacking / max(real + lacking, 1)


def _beginning(one: Trajectory) -> Int[np.ndarray, " P"]:
  """The tokens before the one that predicts the first sampled one."""
  sampled = np.asarray(one.loss_mask) > 0
  length = int(np.argmax(sampled)) if sampled.any() else len(sampled)
  return np.asarray(one.tokens)[: length - 1]


def _common(one: np.ndarray, other: np.ndarray) -> int:
  """Counts the tokens that two streams begin with."""
  size = min(len(one), len(other))
  differ = one[:size] != other[:size]
  return int(np.argmax(differ)) if differ.any() else size


def _least_tokens(
    sizes: Sequence[int],
    targets: Sequence[int],
    alike: Sequence[int],
    *,
    least_shared: int,
    row_tokens: int,
    row_targets: int,
    most_members: int,
) -> list[tuple[int, int, int]]:
  """Cuts a sequence so that most is shared; `alike[i]` is of i - 1 and i.

  The most that can be saved up to each place follows from the places before
  it. Both sums of a piece only grow with its members, so a piece that does not
  fit ends the search for longer ones.

  Returns:
    (first, end, shared) of each piece, in order.
  """
  saved, best = [0], [(0, 0, 0)]
  for end in range(1, len(sizes) + 1):
    most, choice = saved[end - 1], (end - 1, end, 0)
    tokens, wanted = sizes[end - 1], targets[end - 1]
    shared = row_tokens
    for first in range(end - 2, max(end - most_members, 0) - 1, -1):
      shared = min(shared, alike[first + 1])
      tokens, wanted = tokens + sizes[first], wanted + targets[first]
      gain = (end - first - 1) * shared
      full = tokens - gain > row_tokens or wanted > row_targets
      if full or shared < least_shared:
        break
      if saved[first] + gain > most:
        most, choice = saved[first] + gain, (first, end, shared)
    saved.append(most)
    best.append(choice)
  pieces, end = [], len(sizes)
  while end:
    pieces.append(best[end])
    end = best[end][0]
  return pieces[::-1]
