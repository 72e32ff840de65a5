"""What the device does on each visit, and who is answered after it.

Decisions on the host: which request gets which slot, which tokens are prefilled
or copied, how many are sampled, who is done. Nothing here waits or touches the
device; `engine` does both.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from mgrpo_jax.policy import sampling as drawing
from mgrpo_jax.policy.decode import Drawn, Slots
from mgrpo_jax.sampler import batching
from mgrpo_jax.sampler.batching import Call, Piece
from mgrpo_jax.sampler.slots import Request, Slot, SlotTable
from mgrpo_jax.types import Completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
  """One visit of the device.

  Attributes:
    version: of the weights.
    prefills: calls to make, in order.
    copies: (source, target) slots, copied after the prefills.
    slots: what the device must know about each slot, to decode.
    busy: slots that are sampled, and their requests.
  """

  version: int
  prefills: list[Call]
  copies: list[tuple[int, int]]
  slots: Slots
  busy: list[tuple[Slot, Request]]


class Schedule:
  """The requests of an engine, waiting and in slots."""

  def __init__(
      self,
      version: int,
      *,
      num_slots: int,
      context: int,
      prefill_tokens: int,
      prefill_buckets: Sequence[int],
      decode_steps: int,
  ) -> None:
    """Starts with every slot free and nobody waiting.

    Args:
      version: of the weights.
      num_slots: requests and idle sessions that can stand in the cache.
      context: tokens that a stream can have.
      prefill_tokens: tokens of one prefill call, padding included.
      prefill_buckets: tokens that a stream's pieces are padded to.
      decode_steps: tokens sampled for each slot in a visit.
    """
    self.version = version
    self._context = context
    self._prefill_tokens = prefill_tokens
    self._buckets = sorted(set(prefill_buckets))
    self._decode_steps = decode_steps
    self._table = SlotTable(num_slots)
    self._inputs = _idle_slots(num_slots)
    self._queue: collections.deque[Request] = collections.deque()
    self._counts: collections.Counter[str] = collections.Counter()

  def add(self, request: Request) -> None:
    """Lets a request wait for a slot."""
    self._queue.append(request)

  def release(self, session: str) -> None:
    """Ends a session: frees its slot now, or once its request has finished.

    Args:
      session: unknown ones are ignored.
    """
    for request in self._queue:
      if request.session == session:
        request.session = None
    self._table.release(session)

  def renew(self, version: int) -> None:
    """Plans with other weights; drops what is cached and not being sampled.

    Args:
      version: of the weights.
    """
    self.version = version
    self._table.forget()

  def clear(self) -> list[Request]:
    """Frees every slot; returns the requests that nobody serves any more."""
    waiting = list(self._queue)
    self._queue.clear()
    for slot, request in self._table.busy():
      waiting.append(request)
      self._table.free(slot)
    self._table.forget()
    self._inputs.budget[:] = 0
    return waiting

  def stats(self) -> dict[str, Any]:
    """Counts what was done so far, see `Engine.stats`."""
    names = ("prefilled", "generated", "visits", "copied", "cancelled")
    return {name: self._counts[name] for name in names} | {
        "slots": self._table.counts(),
        "requests": len(self._queue),
        "evictions": self._table.evictions,
        "mismatches": self._table.mismatches,
    }

  def rehearsals(self) -> list[Visit]:
    """Visits that change nothing, one for every program that the device has."""
    calls = [
        [batching.empty(bucket, call_tokens=self._prefill_tokens)]
        for bucket in self._buckets
    ]
    steps = [([], []), *((call, []) for call in calls), ([], [(0, 0)])]
    return [
        Visit(
            version=self.version,
            prefills=prefills,
            copies=copies,
            slots=_idle_slots(len(self._inputs.token)),
            busy=[],
        )
        for prefills, copies in steps
    ]

  def plan(self) -> Visit | None:
    """Decides the next visit; None if there is nothing to do."""
    for slot, request in self._table.busy():
      if request.future.done():
        self._counts["cancelled"] += 1
        self._inputs.budget[slot.index] = 0
        self._table.free(slot)
    prefills, copies = self._fill(self._admit())
    busy = self._table.busy()
    if not busy:
      return None
    for slot, request in busy:
      self._inputs.budget[slot.index] = min(
          request.limit - slot.cached - 1, self._decode_steps
      )
    return Visit(
        version=self.version,
        prefills=prefills,
        copies=copies,
        slots=jax.tree.map(np.copy, self._inputs),
        busy=busy,
    )

  def absorb(self, visit: Visit, drawn: Drawn) -> None:
    """Takes a visit's tokens in and answers the requests that are done.

    Args:
      visit: what was planned.
      drawn: by `decode_steps` steps in `num_slots` slots, on the host.

    Raises:
      FloatingPointError: a log-probability is not finite.
    """
    for scores in (drawn.logprobs, drawn.raw_logprobs):
      if not np.isfinite(scores).all():
        raise FloatingPointError(
            f"log-probabilities under version {visit.version} are not finite"
        )
    counts = np.sum(drawn.tokens != drawing.NO_TOKEN, axis=0)
    self._inputs.length[:] += counts.astype(np.int32)
    self._counts["visits"] += 1
    self._counts["generated"] += int(counts.sum())
    for slot, request in visit.busy:
      index = slot.index
      slot.cached += _take(request, drawn, index, int(counts[index]))
      request.versions.append(visit.version)
      self._inputs.token[index] = request.sampled[-1]
      if request.future.done() or not (
          request.ended or slot.cached + 1 == request.limit
      ):
        continue
      slot.stream = np.append(
          request.tokens, np.asarray(request.sampled, np.int32)
      )
      self._inputs.budget[index] = 0
      self._table.finish(slot)
      request.future.set_result(completion(request, self._context))

  def _admit(self) -> list[tuple[Slot, Request]]:
    """Gives slots to waiting requests: sessions' own first, then in order."""
    placed = []
    for place in (self._table.resume, self._table.place):
      waiting: collections.deque[Request] = collections.deque()
      while self._queue:
        request = self._queue.popleft()
        if request.future.done():
          self._counts["cancelled"] += 1
          continue
        slot = place(request)
        if slot is None:
          waiting.append(request)
        else:
          placed.append((slot, request))
      self._queue = waiting
    return placed

  def _fill(
      self, placed: list[tuple[Slot, Request]]
  ) -> tuple[list[Call], list[tuple[int, int]]]:
    """Plans how the new requests' tokens get into the cache."""
    pieces: list[Piece] = []
    copies = []
    for slot, request in placed:
      self._describe(slot.index, request)
      donor = (
          self._table.donor(slot, request.tenant) if slot.cached == 0 else None
      )
      end = len(slot.stream) - 1
      if donor is not None:
        copies.append((donor.index, slot.index))
        self._counts["copied"] += 1
      else:
        self._counts["prefilled"] += end - slot.cached
        pieces += batching.cut(slot, end, buckets=self._buckets)
      slot.cached = end
      self._inputs.length[slot.index] = end
    calls = batching.calls(pieces, call_tokens=self._prefill_tokens)
    return list(calls), copies

  def _describe(self, index: int, request: Request) -> None:
    """Writes what the device must know about a new request."""
    inputs, sampling = self._inputs, request.sampling
    stops = sampling.stop_ids
    inputs.token[index] = request.tokens[-1]
    inputs.seed[index] = request.seed
    inputs.drawing.temperature[index] = sampling.temperature
    inputs.drawing.filters.top_k[index] = sampling.top_k
    inputs.drawing.filters.top_p[index] = sampling.top_p
    inputs.drawing.filters.min_p[index] = sampling.min_p
    inputs.stop_ids[index] = drawing.NO_TOKEN
    inputs.stop_ids[index, : len(stops)] = stops


def completion(request: Request, context: int) -> Completion:
  """Says what a finished request yielded, and why it ended.

  Args:
    request: with what was sampled, and under which versions.
    context: tokens that a stream can have.

  Returns:
    The completion.
  """
  tokens = request.sampled
  finish: Literal["stop", "length", "context"]
  if request.ended:
    finish = "stop"
  elif len(request.tokens) + len(tokens) == context:
    finish = "context"
  else:
    finish = "length"
  return Completion(
      tokens=np.asarray(tokens, np.int32),
      logprobs=np.asarray(request.logprobs, np.float32),
      raw_logprobs=np.asarray(request.raw_logprobs, np.float32),
      finish=finish,
      version_min=request.versions[0],
      version_max=request.versions[-1],
  )


def _take(request: Request, drawn: Drawn, index: int, count: int) -> int:
  """Adds what a slot has drawn to its request; returns how much it keeps."""
  tokens = drawn.tokens[:count, index].tolist()
  with _failing_alone(request):
    tokens = _until(request, tokens)
  kept = len(tokens)
  logprobs = drawn.logprobs[:kept, index].tolist()
  request.sampled += tokens
  request.logprobs += logprobs
  request.raw_logprobs += drawn.raw_logprobs[:kept, index].tolist()
  request.ended |= tokens[-1] in request.sampling.stop_ids
  if request.on_tokens is not None and not request.future.done():
    with _failing_alone(request):
      request.on_tokens(tokens, logprobs)
  return kept


def _until(request: Request, tokens: list[int]) -> list[int]:
  """The tokens up to the one that ends the request, all if none does."""
  if request.until is None or request.future.done():
    return tokens
  for number, token in enumerate(tokens):
    if request.until(token):
      request.ended = True
      return tokens[: number + 1]
  return tokens


@contextlib.contextmanager
def _failing_alone(request: Request) -> Iterator[None]:
  """Fails a request with what its caller's function raises; others go on."""
  try:
    yield
  except Exception as error:
    if not request.future.done():
      request.future.set_exception(error)


def _idle_slots(num_slots: int) -> Slots:
  """Describes slots in which nothing is being sampled, on the host."""
  stops = (num_slots, drawing.MAX_STOP_IDS)
  return Slots(
      token=np.zeros(num_slots, np.int32),
      length=np.zeros(num_slots, np.int32),
      budget=np.zeros(num_slots, np.int32),
      seed=np.zeros((num_slots, 2), np.uint32),
      drawing=drawing.plainly(num_slots),
      stop_ids=np.full(stops, drawing.NO_TOKEN, np.int32),
  )
