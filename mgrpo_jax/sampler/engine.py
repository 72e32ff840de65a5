"""Continuous batching: many requests at once on one policy's fixed slots.

Requests come, go and are cancelled in the event loop; one thread, `worker`,
*visits* the device: new requests are given slots, their new tokens are
prefilled, and up to `decode_steps` tokens are sampled for every busy slot. What
a visit does is decided in `schedule`, what it brought is told by `delivery`.
Tools run on meanwhile, and the device does not wait for their callers.

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
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax

from mgrpo_jax.policy import arranging
from mgrpo_jax.policy import sampling as drawing
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import delivery, device, lead
from mgrpo_jax.sampler.interface import EngineError, OnTokens, Until
from mgrpo_jax.sampler.lead import Lead
from mgrpo_jax.sampler.links import Crew
from mgrpo_jax.sampler.schedule import News, Schedule
from mgrpo_jax.sampler.sizes import Sizes
from mgrpo_jax.sampler.slots import Request
from mgrpo_jax.sampler.stream import checked
from mgrpo_jax.sampler.worker import Worker
from mgrpo_jax.types import Completion

_CLOSING = 600.0  # seconds; the visit under way may have to be compiled first


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
      decode_rows: int,
      mesh: jax.sharding.Mesh | None = None,
      crew: Crew | None = None,
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
      decode_rows: busy slots that are computed together, see `decode.decode`;
        0 for all slots, busy or not, at once.
      mesh: of `sharding.sampler_mesh`, None for the default device.
      crew: of `links.gather`, if the mesh spans several processes; all others
        make a `Follower` with the same arguments.

    Raises:
      EngineError: another process has other sizes or weights, or is lost.
      ValueError: if a size is out of range, naming it, if the mesh does not
        divide the parameters, naming one, if kernels cannot be kept as
        the config says, or if there is a crew for one process, or none for
        several.
    """
    sizes = Sizes(
        num_slots=num_slots,
        context=context,
        block=block,
        prefill_tokens=prefill_tokens,
        prefill_buckets=prefill_buckets,
        decode_steps=decode_steps,
        decode_rows=decode_rows,
    )
    arranging.check(config, mesh)
    self._config = config
    self._context = context
    self._resident = lead.home(
        config, params, version, sizes=sizes, mesh=mesh, crew=crew
    )
    self._schedule = Schedule(
        version,
        num_slots=num_slots,
        context=context,
        prefill_tokens=prefill_tokens,
        prefill_buckets=prefill_buckets,
        decode_steps=decode_steps,
    )
    self._worker = Worker(self._schedule, self._resident)
    # by session: its request that is queued or being sampled
    self._sessions: dict[str, Request] = {}
    self._ended: asyncio.Future[None] | None = None  # None: is not running
    self._closing = False
    self._failure: Exception | None = None

  async def __aenter__(self) -> Self:
    """Starts serving on the running event loop.

    Raises:
      EngineError: it failed before; its device may still be at work.
    """
    if self._failure is not None:
      raise EngineError(f"the engine has failed: {self._failure}")
    if self._ended is not None:
      raise RuntimeError("the engine is already running")
    loop = asyncio.get_running_loop()
    self._ended = ended = loop.create_future()
    self._closing = False

    def tell(news: Sequence[News]) -> None:
      loop.call_soon_threadsafe(self._deliver, news)

    def end(failure: Exception | None) -> None:
      if isinstance(self._resident, Lead):
        self._resident.leave(failure)
      if not loop.is_closed():  # as it may be once a hung device comes back
        loop.call_soon_threadsafe(self._end, ended, failure)

    self._worker.start(tell, end)
    return self

  async def __aexit__(self, *exception: object) -> None:
    """Ends after the visit under way; requests still waiting get an error.

    Raises:
      EngineError: the device does not come back from that visit.
    """
    self._closing = True
    self._worker.close()
    ended, self._ended = self._ended, None
    if ended is None:
      return
    try:
      await asyncio.wait({ended}, timeout=_CLOSING)
    finally:
      if not ended.done():  # late, or whoever waits was cancelled
        self._failure = EngineError(
            "the device had not come back from a visit when the engine was left"
        )
        try:
          self._deliver(self._worker.untold())
        finally:
          self._abandon(self._failure)
    if self._failure is not None and not ended.done():
      raise self._failure

  async def warm_up(self, tell: Callable[[int, int], None]) -> None:
    """Compiles every program that requests can need; they find nothing changed.

    Cancelling the call leaves the program under way to be finished.

    Args:
      tell: called with the number of programs that are there, and of all.

    Raises:
      EngineError: if the device failed, or the engine is not running.
    """
    self._check_running()
    visits = self._schedule.rehearsals()
    for done, visit in enumerate(visits, 1):
      try:
        await asyncio.wrap_future(self._worker.rehearse(visit))
      except Exception as error:
        raise EngineError(f"the warm-up failed: {error}") from error
      tell(done, len(visits))

  async def generate(
      self,
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      *,
      session: str | None = None,
      until: Until | None = None,
      tenant: str = "",
      on_tokens: OnTokens | None = None,
  ) -> Completion:
    """Samples what follows a stream of tokens.

    Cancelling the call frees its slot, and its session's cache.

    Args:
      tokens: the whole stream, 1 to `context` ids.
      sampling: temperature, filters, budget, stop tokens.
      seed: 0 to 2^64 - 1; with the position it determines each draw.
      session: keeps the cache for the next call, whose tokens should extend
        these and the completion's; from where they do not, they are prefilled.
        One request of a session at a time. End it with `release`.
      until: called in the event loop with each token drawn, in order, until it
        says True: that token is then the completion's last, whatever the
        device has drawn beyond it, and the session goes on from there; see
        `spelling.until_text`. What it raises, the call raises.
      tenant: among whose requests the prefill of equal prompts is shared.
      on_tokens: called in the event loop after each visit with the tokens that
        it drew, at least one, and their log-probabilities; together they are
        the completion's. May cancel the call. How many come at a time says
        nothing; what it raises, the call raises.

    Returns:
      The completion. It finishes with `context` when the stream has reached
      `context` tokens (at once, with no tokens, if it was that long already).

    Raises:
      ValueError: if an argument is out of range; nothing has been done.
      EngineError: if the device failed or the engine was closed.
    """
    stream = checked(
        tokens, context=self._context, vocab_size=self._config.vocab_size
    )
    words = drawing.split_seed(seed)
    self._check_running()
    if session is not None and session in self._sessions:
      raise ValueError(f"session {session!r} has a request under way")
    limit = min(len(stream) + sampling.max_new_tokens, self._context)
    request = Request(
        tokens=stream,
        sampling=sampling,
        seed=words,
        session=session,
        tenant=tenant,
        limit=limit,
        future=asyncio.get_running_loop().create_future(),
        until=until,
        on_tokens=on_tokens,
    )
    if limit == len(stream):
      request.versions.append(self._schedule.version)
      return delivery.completion(request, False, self._context)
    with self._worker.guard:
      self._schedule.add(request)
      self._worker.wake()
    if session is not None:
      self._sessions[session] = request
    try:
      return await request.future
    finally:
      if session is not None:
        del self._sessions[session]
      if request.future.cancelled():
        with self._worker.guard:
          self._schedule.drop(request)
          self._worker.wake()

  def release(self, session: str) -> None:
    """Ends a session and frees its slot.

    Args:
      session: unknown ones are ignored.
    """
    with self._worker.guard:
      if session in self._sessions:
        self._sessions[session].session = None
      self._schedule.release(session)

  def update(self, params: Params, version: int) -> None:
    """Swaps the weights before the next visit.

    Requests under way go on with the new weights on the cache they have; their
    completions tell. All other caches are dropped.

    Args:
      params: weights; see `__init__`. Where several processes sample, not to
        be donated until a request was sampled from them.
      version: their number; the others are asked for their weights by it.
    """
    placed: Any = self._resident.placed(params)
    with self._worker.guard:
      self._resident.params = placed
      self._schedule.renew(version)

  def stats(self) -> dict[str, Any]:
    """Counts what was done so far.

    Returns:
      `seconds` that the worker was `busy` with visits, and `idle` though
      there was something to do, which the host's work between visits is;
      `compilations` by kind, of this process; `slots` by state; `requests`
      waiting; tokens `prefilled`, tokens `generated`; `visits`; slots `copied`
      instead of prefilled; `cancelled` requests; `evictions` of idle sessions,
      and `mismatches`, sessions whose tokens did not extend their cache.
    """
    with self._worker.guard:
      return {
          **self._schedule.stats(),
          "seconds": dict(self._worker.seconds),
          "compilations": device.compilations(),
      }

  def _check_running(self) -> None:
    """Raises `EngineError` unless requests can be served."""
    if self._failure is not None:
      raise EngineError(f"the engine has failed: {self._failure}")
    if self._ended is None or self._closing:
      raise EngineError("the engine is not running; use `async with engine:`")

  def _deliver(self, news: Sequence[News]) -> None:
    """Tells callers of a visit; slots whose last token they name are free."""
    guard = self._worker.guard
    delivery.deliver(news, self._schedule, guard, context=self._context)
    with guard:
      self._worker.wake()

  def _end(
      self, ended: asyncio.Future[None], failure: Exception | None
  ) -> None:
    """Learns that the worker has ended; None if it was to."""
    if failure is not None:
      self._failure = failure
    self._abandon(failure or EngineError("the engine was closed"))
    if not ended.done():
      ended.set_result(None)

  def _abandon(self, failure: Exception) -> None:
    """Fails every request and empties the slots."""
    with self._worker.guard:
      requests = self._schedule.clear()
    for request in requests:
      if not request.future.done():
        error = EngineError(f"the engine stopped: {failure}")
        error.__cause__ = failure
        request.future.set_exception(error)
