"""From aligned trajectories to micro-batches of one fixed shape, on the host.

`fold` turns aligned slots into weighted trajectories, `count` takes the whole
batch's denominators, `pack` lays the trajectories into rows, in the pieces that
`prefixes` cuts. All NumPy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mgrpo_jax import fields, losses, prefixes
from mgrpo_jax.prefixes import Piece
from mgrpo_jax.types import Alignment, TrainBatch, Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credit:
  """A trajectory and what it is to be trained with.

  Attributes:
    trajectory: the tokens.
    advantage: of each of its sampled tokens.
    weight: how often it counts, ≥ 0.
  """

  trajectory: Trajectory
  advantage: float
  weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
  """The fixed shape of a micro-batch.

  Attributes:
    rows: N, packed rows, ≥ 1.
    row_tokens: T, tokens of a row and at most of a trajectory, ≥ 2.
    trajectories: M, most trajectories in the N rows, ≥ 1.
    row_targets: most sampled tokens in a row, 1 to T; the head runs for so
      many tokens of each row where only sampled ones are trained on.
    least_shared: tokens that trajectories of a row must begin with alike for
      them to stand there once, at least; 0 where each has its own.

  Raises:
    ValueError: if a field is out of range, naming the field.
  """

  rows: int
  row_tokens: int
  trajectories: int
  row_targets: int
  least_shared: int

  def __post_init__(self) -> None:
    """Checks every field."""
    least = {
        "rows": 1,
        "row_tokens": 2,
        "trajectories": 1,
        "row_targets": 1,
        "least_shared": 0,
    }
    for name, minimum in least.items():
      value = getattr(self, name)
      fields.check(name, value, value >= minimum, f">= {minimum}")
    fields.check(
        "row_targets",
        self.row_targets,
        self.row_targets <= self.row_tokens,
        f"at most row_tokens = {self.row_tokens}",
    )

  @property
  def most_wanted(self) -> int:
    """Tokens of a row that the head runs for; 0 where it runs for all."""
    return self.row_targets if self.row_targets < self.row_tokens else 0


def fold(
    calls: Sequence[Sequence[Sequence[Trajectory]]],
    alignment: Alignment,
    advantages: Float[np.ndarray, "B K D"],
) -> tuple[Credit, ...]:
  """Gathers the aligned trajectories, copies folded into weights.

  A trajectory that fills several slots with one advantage becomes one credit
  with the sum of their weights: the same loss as training on the copies.

  Args:
    calls: [B][K][d] trajectories of the role, in the order that was aligned.
    alignment: of these calls.
    advantages: float32, one for each slot.

  Returns:
    Credits in order of task, rollout, slot; slots of weight 0 have none.
  """
  index = np.asarray(alignment.index)
  weights = np.asarray(alignment.weight, np.float64)
  gains = np.asarray(advantages)
  leads, folded = weights > 0, np.zeros_like(weights)
  for slot in range(index.shape[-1]):
    here = slice(slot, slot + 1)
    same = (index == index[..., here]) & (gains == gains[..., here])
    folded += np.where(same, weights[..., here], 0.0)
    same &= weights[..., here] > 0
    leads[..., slot + 1 :] &= ~same[..., slot + 1 :]
  places = np.argwhere(leads)
  held = zip(
      places[:, :2].tolist(),
      index[leads].tolist(),
      gains[leads].tolist(),
      folded[leads].tolist(),
      strict=True,
  )
  return tuple(
      Credit(trajectory=calls[b][k][call], advantage=gain, weight=weight)
      for (b, k), call, gain, weight in held
  )


def count(credits: Sequence[Credit]) -> losses.Totals:
  """Computes the denominators of an optimizer batch.

  Args:
    credits: all of the batch, also those that are left out of the gradient
      because their advantage is 0.

  Returns:
    Totals of NumPy scalars, float32.
  """
  weights = np.array([credit.weight for credit in credits], np.float64)
  masks = [credit.trajectory.loss_mask > 0 for credit in credits]
  sampled = np.array([mask.sum() for mask in masks], np.float64)
  # The first token has no past and is never predicted.
  others = np.array([(~mask[1:]).sum() for mask in masks], np.float64)
  return losses.Totals(
      trajectories=np.float32(weights.sum()),
      tokens=np.float32(weights @ sampled),
      context_tokens=np.float32(weights @ others),
  )


def pack(
    credits: Sequence[Credit], *, shape: BatchShape
) -> tuple[TrainBatch, ...]:
  """Lays trajectories into rows, first fit by decreasing length.

  With `shape.least_shared`, those that begin alike stand beside each other and
  what they begin with before them, once, see `prefixes`.

  Args:
    credits: what to train on; the order does not change the update.
    shape: of every micro-batch.

  Returns:
    As many micro-batches of NumPy arrays as it takes. Old and reference
    log-probs are the sampler's until `score` replaces them.

  Raises:
    ValueError: if a trajectory does not fit a row, its arrays differ in
      length, or its first token is to be trained on; names the trajectory.
  """
  for credit in credits:
    _check_credit(credit, shape)
  pieces = prefixes.cut(
      [credit.trajectory for credit in credits],
      least_shared=shape.least_shared,
      row_tokens=shape.row_tokens,
      row_targets=shape.row_targets,
      most_members=shape.trajectories,
  )
  places = _first_fit(pieces, shape)
  num_batches = max((row for row, _ in places), default=-1) // shape.rows + 1
  batches = [empty(shape) for _ in range(num_batches)]
  used = [0] * num_batches
  segments = [0] * (num_batches * shape.rows)
  for piece, (row, offset) in zip(pieces, places, strict=True):
    number, row_in_batch = divmod(row, shape.rows)
    segments[row] = _lay(
        batches[number],
        [credits[member] for member in piece.members],
        shared=piece.shared,
        entry=used[number],
        row=row_in_batch,
        offset=offset,
        segment=segments[row] + 1,
    )
    used[number] += len(piece.members)
  return tuple(batches)


def _check_credit(credit: Credit, shape: BatchShape) -> None:
  """Raises ValueError, naming the trajectory, unless it can be packed."""
  one = credit.trajectory
  name = f"task {one.task_id!r} rollout {one.rollout} {one.role} {one.call}"
  length = len(one.tokens)
  if not 1 <= length <= shape.row_tokens:
    raise ValueError(
        f"trajectory of {name} has {length} tokens, allowed: 1 to row_tokens ="
        f" {shape.row_tokens}"
    )
  sampled = int(np.sum(one.loss_mask > 0))
  if sampled > shape.row_targets:
    raise ValueError(
        f"trajectory of {name} has {sampled} sampled tokens, allowed: at most"
        f" row_targets = {shape.row_targets}"
    )
  if not len(one.loss_mask) == len(one.sampler_logprobs) == length:
    raise ValueError(
        f"trajectory of {name} has {length} tokens, {len(one.loss_mask)} loss"
        f" mask entries and {len(one.sampler_logprobs)} log-probs, allowed:"
        " equal numbers"
    )
  if one.loss_mask[0] > 0:
    raise ValueError(
        f"trajectory of {name} has loss mask {one.loss_mask[0]} on its first"
        " token, which nothing predicts, allowed: 0"
    )
  if not (math.isfinite(credit.advantage) and 0 <= credit.weight < math.inf):
    raise ValueError(
        f"trajectory of {name} has advantage {credit.advantage} and weight"
        f" {credit.weight}, allowed: finite numbers, weight >= 0"
    )


def _first_fit(
    pieces: Sequence[Piece], shape: BatchShape
) -> list[tuple[int, int]]:
  """Finds (row, offset) of each piece; row r is in batch r // N."""
  num_batches = len(pieces)  # at most one for each piece
  room = np.full(num_batches * shape.rows, shape.row_tokens)
  target_room = np.full(num_batches * shape.rows, shape.row_targets)
  entries = np.full(num_batches, shape.trajectories)
  places = [(0, 0)] * len(pieces)
  opened = 1
  for number in sorted(range(len(pieces)), key=lambda i: -pieces[i].tokens):
    piece, end = pieces[number], min(opened + 1, num_batches)
    fits = room[: end * shape.rows] >= piece.tokens
    fits &= target_room[: end * shape.rows] >= piece.targets
    fits &= np.repeat(entries[:end] >= len(piece.members), shape.rows)
    row = int(np.argmax(fits))  # one fits: the last batch is empty
    places[number] = (row, shape.row_tokens - int(room[row]))
    room[row] -= piece.tokens
    target_room[row] -= piece.targets
    entries[row // shape.rows] -= len(piece.members)
    opened = max(opened, row // shape.rows + 1)
  return places


def empty(shape: BatchShape) -> TrainBatch:
  """Makes a micro-batch of padding.

  Args:
    shape: of the micro-batch.

  Returns:
    NumPy arrays, all zeros.
  """
  rows = (shape.rows, shape.row_tokens)
  entries = (shape.trajectories, shape.row_tokens)
  each = (shape.trajectories,)
  arrays: dict[str, Any] = {
      "tokens": np.zeros(rows, np.int32),
      "segment_ids": np.zeros(rows, np.int32),
      "positions": np.zeros(rows, np.int32),
      "sampled": np.zeros(rows, bool),
      "row": np.zeros(each, np.int32),
      "offset": np.zeros(each, np.int32),
      "loss_mask": np.zeros(entries, np.float32),
      "context_mask": np.zeros(entries, np.float32),
      "sampler_logprobs": np.zeros(entries, np.float32),
      "old_logprobs": np.zeros(entries, np.float32),
      "ref_logprobs": np.zeros(entries, np.float32),
      "old_values": np.zeros(entries, np.float32),
      "advantage": np.zeros(each, np.float32),
      "weight": np.zeros(each, np.float32),
  }
  if shape.least_shared:
    arrays["prefix_ids"] = np.zeros(rows, np.int32)
  return TrainBatch(**arrays)


def _lay(
    batch: TrainBatch,
    credits: Sequence[Credit],
    *,
    shared: int,
    entry: int,
    row: int,
    offset: int,
    segment: int,
) -> int:
  """Writes a piece into a micro-batch; returns its last segment.

  What is shared is a segment of its own, which the branches see.
  """
  if shared:
    span = slice(offset, offset + shared)
    batch.tokens[row, span] = credits[0].trajectory.tokens[:shared]
    batch.segment_ids[row, span] = segment
    batch.positions[row, span] = np.arange(shared)
  branch = offset + shared
  for number, credit in enumerate(credits):
    end = branch + len(credit.trajectory.tokens) - shared
    if shared:
      batch.prefix_ids[row, branch:end] = segment
    _place(
        batch,
        credit,
        shared=shared,
        entry=entry + number,
        row=row,
        offset=branch - shared,
        segment=segment + number + (shared > 0),
    )
    branch = end
  return segment + len(credits) - (shared == 0)


def _place(
    batch: TrainBatch,
    credit: Credit,
    *,
    shared: int,
    entry: int,
    row: int,
    offset: int,
    segment: int,
) -> None:
  """Writes what follows a trajectory's shared tokens, at offset + shared."""
  trajectory = credit.trajectory
  length = len(trajectory.tokens)
  span = slice(offset + shared, offset + length)
  sampled = np.asarray(trajectory.loss_mask) > 0
  batch.tokens[row, span] = trajectory.tokens[shared:]
  batch.segment_ids[row, span] = segment
  batch.positions[row, span] = np.arange(shared, length)
  batch.sampled[row, span] = sampled[shared:]
  batch.row[entry] = row
  batch.offset[entry] = offset
  batch.loss_mask[entry, :length] = sampled
  # Nothing in the row predicts the first token after a start.
  first = shared + 1
  batch.context_mask[entry, first:length] = ~sampled[first:]
  logprobs = np.where(sampled, trajectory.sampler_logprobs, 0.0)
  for target in (
      batch.sampler_logprobs,
      batch.old_logprobs,
      batch.ref_logprobs,
  ):
    target[entry, :length] = logprobs
  batch.advantage[entry] = credit.advantage
  batch.weight[entry] = credit.weight
