"""What the device does in one visit, as arrays of fixed shapes, and as bytes.

All that decides which compiled programs run, in which order and with which
arguments, stands in `Orders`: whoever has them, the weights and the same cache
as before does exactly the same. So an engine over several processes sends them
from the process that decides to those that only carry out.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

import jax
import numpy as np

from mgrpo_jax.policy import sampling as drawing
from mgrpo_jax.policy.decode import Slots
from mgrpo_jax.sampler import batching
from mgrpo_jax.sampler.batching import Call
from mgrpo_jax.sampler.sizes import Sizes

_HEAD = struct.Struct("<qII")  # version, prefill calls, copies
_SHAPE = struct.Struct("<II")  # rows and tokens of a call
_WORD = np.dtype("<i4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orders:
  """What one visit does on the device.

  Attributes:
    version: of the weights.
    prefills: calls to make, in order.
    copies: (source, target) slots, copied after the prefills.
    slots: what the device must know about each slot, to decode.
  """

  version: int
  prefills: Sequence[Call]
  copies: Sequence[tuple[int, int]]
  slots: Slots


def idle_slots(num_slots: int) -> Slots:
  """Describes slots in which nothing is being sampled.

  Args:
    num_slots: S.

  Returns:
    Arrays on the host, to be written to.
  """
  stops = (num_slots, drawing.MAX_STOP_IDS)
  return Slots(
      token=np.zeros(num_slots, np.int32),
      length=np.zeros(num_slots, np.int32),
      budget=np.zeros(num_slots, np.int32),
      seed=np.zeros((num_slots, 2), np.uint32),
      drawing=drawing.plainly(num_slots),
      stop_ids=np.full(stops, drawing.NO_TOKEN, np.int32),
  )


def pack(orders: Orders) -> bytes:
  """Writes orders as bytes, the same on every machine.

  Args:
    orders: with arrays on the host.

  Returns:
    What `unpack` reads.
  """
  parts = [_HEAD.pack(orders.version, len(orders.prefills), len(orders.copies))]
  for call in orders.prefills:
    parts.append(_SHAPE.pack(*call.tokens.shape))
    columns = (call.tokens, call.lengths, call.slots, call.starts)
    parts += [np.asarray(array, _WORD).tobytes() for array in columns]
  parts.append(np.asarray(orders.copies, _WORD).tobytes())
  parts += [
      leaf.astype(leaf.dtype.newbyteorder("<")).tobytes()
      for leaf in jax.tree.leaves(orders.slots)
  ]
  return b"".join(parts)


def unpack(data: bytes, *, sizes: Sizes) -> Orders:
  """Reads orders, if they are of an engine of the same sizes.

  Args:
    data: of `pack`.
    sizes: of the engine that is to carry them out.

  Returns:
    The orders.

  Raises:
    ValueError: they are of other shapes, or cut off; nothing was done.
  """
  reader = _Reader(data)
  version, num_calls, num_copies = reader.head(_HEAD)
  allowed = {
      batching.empty(bucket, call_tokens=sizes.prefill_tokens).tokens.shape
      for bucket in sizes.prefill_buckets
  }
  calls = []
  for _ in range(num_calls):
    rows, width = reader.head(_SHAPE)
    if (rows, width) not in allowed:
      raise ValueError(
          f"orders: a prefill of {rows} x {width} tokens, here there are only"
          f" {sorted(allowed)}"
      )
    calls.append(
        Call(
            tokens=reader.array((rows, width), _WORD),
            lengths=reader.array((rows,), _WORD),
            slots=reader.array((rows,), _WORD),
            starts=reader.array((rows,), _WORD),
        )
    )
  pairs = reader.array((num_copies, 2), _WORD)
  slots = jax.tree.map(
      lambda leaf: reader.array(leaf.shape, leaf.dtype),
      idle_slots(sizes.num_slots),
  )
  reader.end()
  return Orders(
      version=version,
      prefills=calls,
      copies=[(source, target) for source, target in pairs.tolist()],
      slots=slots,
  )


class _Reader:
  """Takes arrays off the front of some bytes."""

  def __init__(self, data: bytes) -> None:
    """Begins at the front."""
    self._data, self._at = data, 0

  def head(self, form: struct.Struct) -> tuple[int, ...]:
    """Takes some numbers."""
    return form.unpack(self._take(form.size))

  def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Takes an array."""
    there = dtype.newbyteorder("<")
    size = dtype.itemsize * int(np.prod(shape))
    found = np.frombuffer(self._take(size), there).reshape(shape)
    return found.astype(dtype.newbyteorder("="))

  def end(self) -> None:
    """Raises if something is left."""
    if self._at != len(self._data):
      raise ValueError(
          f"orders: {len(self._data)} bytes, of which an engine of these sizes"
          f" expects {self._at}"
      )

  def _take(self, size: int) -> bytes:
    """Takes bytes; raises if there are too few."""
    taken = self._data[self._at : self._at + size]
    if len(taken) < size:
      raise ValueError(
          f"orders: {len(self._data)} bytes, of which an engine of these sizes"
          f" expects at least {self._at + size}"
      )
    self._at += size
    return taken
