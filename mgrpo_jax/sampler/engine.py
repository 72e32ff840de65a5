"""Continuous batching: many requests at once on one policy's fixed slots.

The engine alternates between the event loop, where requests come, go and are
cancelled, and one worker thread, where the device works. A round trip is a
*visit*: new requests are given slots, their new tokens are prefilled, and up to
`decode_steps` tokens are sampled for every busy slot. Tools run on meanwhile.

What a request yields depends on the weights, its tokens, its seed and, if it
belongs to a session, the session's earlier requests; on the CPU bit for bit.
Other traffic changes nothing (see `policy.decode` for why). The one exception
is a session that lost its cache, because slots ran out (`evictions`) or the
weights changed: its stream is then prefilled at once instead of turn by turn,
which rounds differently in the last place. Enough slots for all sessions that
live at a time avoid it.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, Self

import jax
import numpy as np

from mgrpo_jax.policy import sampling as drawing
from mgrpo_jax.policy.cache import KVCache
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Slots
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import batching, device
from mgrpo_jax.sampler.batching import Call, Piece
from mgrpo_jax.sampler.slots import Request, Slot, SlotTable
from mgrpo_jax.types import Completion

_COPIES = 8  # slots copied by one call
_YIELDS = 5  # turns of the event loop in which finished callers may ask again


class EngineError(RuntimeError):
  """The engine cannot go on; every waiting request gets one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
  """One visit of the device."""

  params: Params
  version: int
  prefills: list[Call]
  copies: list[tuple[int, int]]  # (source, target)
  slots: Slots
  busy: list[tuple[Slot, Request]]


class Engine:
  """Samples completions from one policy.

  Use it within `async with`; calls must come from that event loop. It can be
  entered again, on another loop too; caches do not outlive the block.
  """

  def __init__(
      self,
      config: TransformerConfig,
      params: Params,
      version: int,
      *,
      num_slots: int,
      context: int,
      block: int,
      prefill_tokens: int,
      prefill_buckets: Sequence[int],
      decode_steps: int,
  ) -> None:
    """Allocates the cache; compiles nothing else yet.

    Args:
      config: sizes of the policy.
      params: weights; as long as requests are sampled from them, nobody may
        donate them.
      version: number of these weights.
      num_slots: requests and idle sessions that can stand in the cache.
      context: tokens that a stream can have.
      block: tokens of cache that are attended or skipped together.
      prefill_tokens: tokens, padding included, of one prefill call; more fill
        the cores better, fewer waste less on the last rows.
      prefill_buckets: lengths that new tokens are padded to; one compilation
        each. Longer inputs are cut into pieces of the largest.
      decode_steps: tokens sampled for each slot between two looks at the queue.

    Raises:
      ValueError: if a size is not positive, naming it.
    """
    sizes = {
        "num_slots": num_slots,
        "context": context,
        "block": block,
        "prefill_tokens": prefill_tokens,
        "prefill_buckets": min(prefill_buckets, default=0),
        "decode_steps": decode_steps,
    }
    for name, size in sizes.items():
      if size < 1:
        raise ValueError(f"{name} must be >= 1, got {size!r}")
    self._config = config
    self._context = context
    self._buckets = sorted(set(prefill_buckets))
    self._prefill_tokens = prefill_tokens
    self._decode_steps = decode_steps
    self._device = jax.local_devices()[0]
    self._params = jax.device_put(params, self._device)
    self._version = version
    self._cache: KVCache = jax.device_put(
        device.init_cache(
            config=config, num_slots=num_slots, length=context, block=block
        ),
        self._device,
    )
    self._table = SlotTable(num_slots)
    self._inputs = _idle_slots(num_slots)
    self._queue: collections.deque[Request] = collections.deque()
    self._sessions: set[str] = set()  # with a request queued or being sampled
    self._counts: collections.Counter[str] = collections.Counter()
    self._wake = asyncio.Event()
    self._closing = False
    self._task: asyncio.Task[None] | None = None
    self._failure: Exception | None = None

  async def __aenter__(self) -> Self:
    """Starts serving on the running event loop."""
    if self._task is not None:
      raise RuntimeError("the engine is already running")
    self._wake = asyncio.Event()
    self._closing = False
    self._task = asyncio.create_task(self._serve())
    return self

  async def __aexit__(self, *exception: object) -> None:
    """Ends after the visit under way; requests still waiting get an error."""
    self._closing = True
    self._wake.set()
    task, self._task = self._task, None
    if task is not None:
      await task

  async def generate(
      self,
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      *,
      session: str | None = None,
  ) -> Completion:
    """Samples what follows a stream of tokens.

    Cancelling the call frees its slot, and its session's cache.

    Args:
      tokens: the whole stream, 1 to `context` ids.
      sampling: temperature, budget, stop tokens.
      seed: 0 to 2^64 - 1; with the position it determines each draw.
      session: keeps the cache for the next call, whose tokens should extend
        these and the completion's; if they do not, all are prefilled. One
        request of a session at a time. End it with `release`.

    Returns:
      The completion. It finishes with `context` when the stream has reached
      `context` tokens (at once, with no tokens, if it was that long already).

    Raises:
      ValueError: if an argument is out of range; nothing has been done.
      EngineError: if the device failed or the engine was closed.
    """
    stream = self._checked(tokens)
    words = drawing.split_seed(seed)
    if self._failure is not None:
      raise EngineError(f"the engine has failed: {self._failure}")
    if self._task is None or self._closing:
      raise EngineError("the engine is not running; use `async with engine:`")
    if session is not None and session in self._sessions:
      raise ValueError(f"session {session!r} has a request under way")
    limit = min(len(stream) + sampling.max_new_tokens, self._context)
    request = Request(
        tokens=stream,
        sampling=sampling,
        seed=words,
        session=session,
        limit=limit,
        future=asyncio.get_running_loop().create_future(),
    )
    if limit == len(stream):
      request.versions.append(self._version)
      return _completion(request, self._context)
    self._queue.append(request)
    self._wake.set()
    if session is None:
      return await request.future
    self._sessions.add(session)
    try:
      return await request.future
    finally:
      self._sessions.discard(session)

  def release(self, session: str) -> None:
    """Ends a session and frees its slot.

    Args:
      session: unknown ones are ignored.
    """
    for request in self._queue:
      if request.session == session:
        request.session = None
    self._table.release(session)

  def update(self, params: Params, version: int) -> None:
    """Swaps the weights before the next visit.

    Requests under way go on with the new weights on the cache they have; their
    completions tell. All other caches are dropped.

    Args:
      params: weights; see `__init__`.
      version: their number.
    """
    self._params = jax.device_put(params, self._device)
    self._version = version
    self._table.forget()

  def stats(self) -> dict[str, Any]:
    """Counts what was done so far.

    Returns:
      `compilations` by kind, of this process; `slots` by state; `requests`
      waiting; tokens `prefilled`, tokens `generated`; `visits`; slots `copied`
      instead of prefilled; `cancelled` requests; `evictions` of idle sessions,
      and `mismatches`, sessions whose tokens did not extend their cache.
    """
    names = ("prefilled", "generated", "visits", "copied", "cancelled")
    return {name: self._counts[name] for name in names} | {
        "compilations": device.compilations(),
        "slots": self._table.counts(),
        "requests": len(self._queue),
        "evictions": self._table.evictions,
        "mismatches": self._table.mismatches,
    }

  def _checked(self, tokens: Sequence[int]) -> np.ndarray:
    """Turns a stream into an array, or says what is wrong with it."""
    stream = np.array(tokens, np.int64)  # a copy: the caller's may grow
    if stream.ndim != 1 or not 1 <= len(stream) <= self._context:
      raise ValueError(
          f"tokens must be a sequence of 1 to {self._context} ids (context),"
          f" got shape {stream.shape}"
      )
    if stream.min() < 0 or stream.max() >= self._config.vocab_size:
      raise ValueError(
          f"tokens must be ids in 0..{self._config.vocab_size - 1}, got"
          f" {stream.min()}..{stream.max()}"
      )
    return stream.astype(np.int32)

  async def _serve(self) -> None:
    """Visits the device while there is work; tells everyone when it ends."""
    loop = asyncio.get_running_loop()
    failure: Exception = EngineError("the engine was closed")
    with concurrent.futures.ThreadPoolExecutor(1, "sampler") as worker:
      try:
        while not self._closing:
          work = self._plan()
          if work is None:
            self._wake.clear()
            await self._wake.wait()
            continue
          results = await loop.run_in_executor(worker, self._visit, work)
          self._absorb(work, *results)
          for _ in range(_YIELDS):
            await asyncio.sleep(0)
      except Exception as error:  # whatever it is, nobody may wait for ever
        self._failure = failure = error
      finally:
        self._abandon(failure)

  def _abandon(self, failure: Exception) -> None:
    """Fails every request and empties the table."""
    waiting = list(self._queue)
    self._queue.clear()
    for slot, request in self._table.busy():
      waiting.append(request)
      self._table.free(slot)
    self._table.forget()
    self._inputs.budget[:] = 0
    for request in waiting:
      if not request.future.done():
        error = EngineError(f"the engine stopped: {failure}")
        error.__cause__ = failure
        request.future.set_exception(error)

  def _plan(self) -> _Work | None:
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
    return _Work(
        params=self._params,
        version=self._version,
        prefills=prefills,
        copies=copies,
        slots=jax.tree.map(np.copy, self._inputs),
        busy=busy,
    )

  def _admit(self) -> list[tuple[Slot, Request]]:
    """Gives slots to waiting requests: sessions' own first, then in order."""
    placed = []
    fresh = functools.partial(self._table.place, version=self._version)
    for place in (self._table.resume, fresh):
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
      donor = self._table.donor(slot) if slot.cached == 0 else None
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
    inputs = self._inputs
    stops = request.sampling.stop_ids
    inputs.token[index] = request.tokens[-1]
    inputs.seed[index] = request.seed
    inputs.temperature[index] = request.sampling.temperature
    inputs.stop_ids[index] = drawing.NO_TOKEN
    inputs.stop_ids[index, : len(stops)] = stops

  def _visit(self, work: _Work) -> tuple[np.ndarray, np.ndarray]:
    """Works on the device; the only code that runs in the worker thread."""
    cache = self._cache
    for call in work.prefills:
      cache = device.prefill(
          work.params,
          cache,
          call.tokens,
          call.lengths,
          call.slots,
          call.starts,
          config=self._config,
      )
    for first in range(0, len(work.copies), _COPIES):
      pairs = work.copies[first : first + _COPIES]
      pairs = pairs + pairs[-1:] * (_COPIES - len(pairs))
      sources, targets = np.asarray(pairs, np.int32).T
      cache = device.copy_slots(cache, sources, targets)
    self._cache, tokens, logprobs = device.decode(
        work.params,
        cache,
        work.slots,
        config=self._config,
        num_steps=self._decode_steps,
    )
    return np.asarray(tokens), np.asarray(logprobs)

  def _absorb(
      self, work: _Work, tokens: np.ndarray, logprobs: np.ndarray
  ) -> None:
    """Takes a visit's tokens in and answers the requests that are done."""
    if not np.isfinite(logprobs).all():
      raise FloatingPointError(
          f"log-probabilities under version {work.version} are not finite"
      )
    counts = np.sum(tokens != drawing.NO_TOKEN, axis=0)
    self._inputs.length[:] += counts.astype(np.int32)
    self._counts["visits"] += 1
    self._counts["generated"] += int(counts.sum())
    for slot, request in work.busy:
      count, index = int(counts[slot.index]), slot.index
      request.sampled += tokens[:count, index].tolist()
      request.logprobs += logprobs[:count, index].tolist()
      request.versions.append(work.version)
      slot.cached += count
      self._inputs.token[index] = request.sampled[-1]
      stopped = request.sampled[-1] in request.sampling.stop_ids
      if request.future.done() or not (
          stopped or slot.cached + 1 == request.limit
      ):
        continue
      slot.stream = np.append(
          request.tokens, np.asarray(request.sampled, np.int32)
      )
      self._inputs.budget[index] = 0
      self._table.finish(slot, self._version)
      request.future.set_result(_completion(request, self._context))


def _idle_slots(num_slots: int) -> Slots:
  """Describes slots in which nothing is being sampled, on the host."""
  stops = (num_slots, drawing.MAX_STOP_IDS)
  return Slots(
      token=np.zeros(num_slots, np.int32),
      length=np.zeros(num_slots, np.int32),
      budget=np.zeros(num_slots, np.int32),
      seed=np.zeros((num_slots, 2), np.uint32),
      temperature=np.ones(num_slots, np.float32),
      stop_ids=np.full(stops, drawing.NO_TOKEN, np.int32),
  )


def _completion(request: Request, context: int) -> Completion:
  """Says what a finished request yielded, and why it ended."""
  tokens = request.sampled
  finish: Literal["stop", "length", "context"]
  if tokens and tokens[-1] in request.sampling.stop_ids:
    finish = "stop"
  elif len(request.tokens) + len(tokens) == context:
    finish = "context"
  else:
    finish = "length"
  return Completion(
      tokens=np.asarray(tokens, np.int32),
      logprobs=np.asarray(request.logprobs, np.float32),
      finish=finish,
      version_min=request.versions[0],
      version_max=request.versions[-1],
  )
