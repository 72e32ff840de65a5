"""What the device does on each visit, and whose request ends with it.

Decisions on the host: which request gets which slot, which tokens are prefilled
or copied, how many are sampled, who is done. Nothing here waits, touches the
device or calls anybody; `worker` visits the device, `delivery` tells callers.
What a plan costs grows with the slots and with what came and went since the
last one, not with how many requests wait.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mgrpo_jax.policy import sampling as drawing
from mgrpo_jax.policy.decode import Drawn
from mgrpo_jax.sampler import batching
from mgrpo_jax.sampler.batching import Call, Piece
from mgrpo_jax.sampler.orders import Orders, idle_slots
from mgrpo_jax.sampler.slots import Request, Slot, SlotTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
  """One visit of the device.

  Attributes:
    orders: what the device does.
    busy: slots that are sampled, and their requests.
  """

  orders: Orders
  busy: list[tuple[Slot, Request]]


@dataclasses.dataclass(kw_only=True, slots=True)  # frozen, it takes thrice
class News:
  """What a visit brought to one request.

  Attributes:
    request: whose it is.
    slot: where it was sampled.
    end: tokens that the request has sampled with it.
    count: how many of them are new.
    visits: of the request, this one included.
    last: whether the device samples nothing more for it.
    stopped: whether that is because of a stop token.
  """

  request: Request
  slot: Slot
  end: int
  count: int
  visits: int
  last: bool
  stopped: bool


@dataclasses.dataclass(kw_only=True, slots=True)
class Taken:
  """What a visit brought, and to whom.

  Attributes:
    arrays: what was drawn, on the host.
    counts: tokens drawn in each slot.
    version: of the weights.
    requests: slots, whose they were, and whether a stop token ended them.
  """

  arrays: Drawn
  counts: list[int]
  version: int
  requests: list[tuple[Slot, Request, bool]] = dataclasses.field(
      default_factory=list
  )


class Schedule:
  """The requests of an engine, waiting and in slots; not for two threads."""

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
    self._inputs = idle_slots(num_slots)
    self._new: dict[Request, None] = {}  # since the last plan
    # those that wait for a slot, in order; a set that forgets in O(1)
    self._queue: collections.OrderedDict[Request, None] = (
        collections.OrderedDict()
    )
    self._counts: collections.Counter[str] = collections.Counter()

  def add(self, request: Request) -> None:
    """Lets a request wait for a slot."""
    self._new[request] = None

  def drop(self, request: Request) -> None:
    """Lets a request wait no more; one in a slot leaves with the next plan.

    Args:
      request: whose future is done.
    """
    for waiting in (self._new, self._queue):
      if request in waiting:
        del waiting[request]
        self._counts["cancelled"] += 1

  def release(self, session: str) -> None:
    """Ends a session: frees its slot now, or once its request has finished.

    Args:
      session: unknown ones are ignored.
    """
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
    waiting = [*self._queue, *self._new]
    self._queue.clear()
    self._new.clear()
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
        "requests": len(self._queue) + len(self._new),
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
            orders=Orders(
                version=self.version,
                prefills=prefills,
                copies=copies,
                slots=idle_slots(len(self._inputs.token)),
            ),
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
    busy = [pair for pair in self._table.busy() if not pair[1].drawn]
    if not busy:
      return None
    for slot, request in busy:
      self._inputs.budget[slot.index] = min(
          request.limit - slot.cached - 1, self._decode_steps
      )
    orders = Orders(
        version=self.version,
        prefills=prefills,
        copies=copies,
        slots=jax.tree.map(np.copy, self._inputs),
    )
    return Visit(orders=orders, busy=busy)

  def absorb(self, visit: Visit, drawn: Drawn) -> Taken:
    """Takes in of a visit's tokens what the next plan needs.

    Frees the slots of requests that are done. A request whose caller names the
    last token keeps its slot until that was asked, see `end`; one that was
    cancelled until the next plan.

    Args:
      visit: what was planned.
      drawn: by `decode_steps` steps in `num_slots` slots, on the host.

    Returns:
      What to `report`, before the next visit is absorbed.

    Raises:
      FloatingPointError: a log-probability is not finite.
    """
    version = visit.orders.version
    for scores in (drawn.logprobs, drawn.raw_logprobs):
      if not np.isfinite(scores).all():
        raise FloatingPointError(
            f"log-probabilities under version {version} are not finite"
        )
    counts = np.sum(drawn.tokens != drawing.NO_TOKEN, axis=0)
    newest = drawn.tokens[counts - 1, np.arange(len(counts))].tolist()
    taken = Taken(arrays=drawn, counts=counts.tolist(), version=version)
    self._counts["visits"] += 1
    self._counts["generated"] += sum(taken.counts)
    for slot, request in visit.busy:
      if slot.request is not request or request.future.done():
        continue  # it ended while the device went on
      index, count = slot.index, taken.counts[slot.index]
      slot.cached += count
      self._inputs.length[index] = slot.cached
      self._inputs.token[index] = newest[index]
      stopped = newest[index] in request.sampling.stop_ids
      request.drawn = stopped or slot.cached + 1 == request.limit
      taken.requests.append((slot, request, stopped))
      if request.drawn:
        self._inputs.budget[index] = 0
        if request.until is None:
          self._finish(slot, request, drawn.tokens[:count, index])
    return taken

  def report(self, taken: Taken) -> list[News]:
    """Hands a visit's tokens to their requests.

    Args:
      taken: by `absorb`.

    Returns:
      What callers are to be told, in the order of slots.
    """
    tokens, logprobs, raw_logprobs = (
        one.T.tolist()
        for one in (
            taken.arrays.tokens,
            taken.arrays.logprobs,
            taken.arrays.raw_logprobs,
        )
    )
    news = []
    for slot, request, stopped in taken.requests:
      ended = request.until and slot.request is not request  # by its caller
      if ended or request.future.done():
        continue
      index, count = slot.index, taken.counts[slot.index]
      request.sampled += tokens[index][:count]
      request.logprobs += logprobs[index][:count]
      request.raw_logprobs += raw_logprobs[index][:count]
      request.versions.append(taken.version)
      if request.drawn or request.until or request.on_tokens:
        news.append(
            News(
                request=request,
                slot=slot,
                end=len(request.sampled),
                count=count,
                visits=len(request.versions),
                last=request.drawn,
                stopped=stopped,
            )
        )
    return news

  def end(self, news: News, kept: int) -> None:
    """Ends a request that waited for its caller to name the last token.

    Args:
      news: in which the last token is; whatever was drawn later is dropped.
      kept: tokens of the request in all, 1 to `news.end`.
    """
    slot, request = news.slot, news.request
    if slot.request is not request:
      return  # the engine was cleared
    for record in (request.sampled, request.logprobs, request.raw_logprobs):
      del record[kept:]
    del request.versions[news.visits :]
    slot.cached = len(request.tokens) + kept - 1
    self._inputs.budget[slot.index] = 0
    self._finish(slot, request, np.zeros(0, np.int32))

  def _finish(self, slot: Slot, request: Request, more: np.ndarray) -> None:
    """Leaves a slot to the request's session, or to others.

    Args:
      slot: busy.
      request: with all tokens but some.
      more: [n] int32, those.
    """
    sampled = np.asarray(request.sampled, np.int32)
    slot.stream = np.concatenate([request.tokens, sampled, more])
    self._table.finish(slot)

  def _admit(self) -> list[tuple[Slot, Request]]:
    """Gives slots to waiting requests: sessions' own first, then in order."""
    placed: list[tuple[Slot, Request]] = []
    for request in self._new:
      if request.future.done():
        self._counts["cancelled"] += 1
      elif slot := self._table.resume(request):
        placed.append((slot, request))
      else:  # what its session does not have now, it will not have later
        self._queue[request] = None
    self._new.clear()
    while self._queue:
      request = next(iter(self._queue))
      if request.future.done():
        self._counts["cancelled"] += 1
      elif slot := self._table.place(request):
        placed.append((slot, request))
      else:
        break
      self._queue.popitem(last=False)
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
