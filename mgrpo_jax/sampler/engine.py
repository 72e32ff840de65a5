"""Continuous batching: many requests at once on one policy's fixed slots.

The engine alternates between the event loop, where requests come, go and are
cancelled, and one worker thread, where the device works. A round trip is a
*visit*: new requests are given slots, their new tokens are prefilled, and up to
`decode_steps` tokens are sampled for every busy slot. Tools run on meanwhile.
What a visit does is decided in `schedule`.

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
import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mgrpo_jax import sharding
from mgrpo_jax.policy import products
from mgrpo_jax.policy import sampling as drawing
from mgrpo_jax.policy.cache import KVCache
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Drawn
from mgrpo_jax.policy.params import Params, param_specs
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import device
from mgrpo_jax.sampler.interface import EngineError, OnTokens, Until
from mgrpo_jax.sampler.schedule import Schedule, Visit, completion
from mgrpo_jax.sampler.slots import Request
from mgrpo_jax.sampler.stream import checked
from mgrpo_jax.types import Completion

_COPIES = 8  # slots copied by one call
_YIELDS = 5  # turns of the event loop in which finished callers may ask again


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

    Raises:
      ValueError: if a size is out of range, naming it, if the mesh does not
        divide the parameters, naming one, or if kernels were to be turned on
        it.
    """
    _check(
        num_slots=num_slots,
        context=context,
        block=block,
        prefill_tokens=prefill_tokens,
        prefill_buckets=min(prefill_buckets, default=0),
        decode_steps=decode_steps,
    )
    if mesh is not None and config.execution.outputs_first:
      raise ValueError("execution.outputs_first is for samplers without a mesh")
    self._config = config
    self._context = context
    self._decode_steps = decode_steps
    self._decode_rows = _rows(decode_rows, num_slots)
    self._heads: jax.sharding.NamedSharding | None = None
    self._place: Any = jax.local_devices()[0]
    if mesh is not None:
      self._heads = device.split_heads(mesh)
      self._place = sharding.params_shardings(param_specs(config), mesh)
    self._params = self._placed(params)
    self._cache: KVCache = jax.device_put(
        device.init_cache(
            config=config, num_slots=num_slots, length=context, block=block
        ),
        self._heads or self._place,
    )
    self._schedule = Schedule(
        version,
        num_slots=num_slots,
        context=context,
        prefill_tokens=prefill_tokens,
        prefill_buckets=prefill_buckets,
        decode_steps=decode_steps,
    )
    self._sessions: set[str] = set()  # with a request queued or being sampled
    self._wake = asyncio.Event()
    self._seconds = {"busy": 0.0, "idle": 0.0}
    self._ready = 0.0  # when there was something to do, the device being free
    self._closing = False
    self._worker: concurrent.futures.ThreadPoolExecutor | None = None
    self._task: asyncio.Task[None] | None = None
    self._failure: Exception | None = None

  async def __aenter__(self) -> Self:
    """Starts serving on the running event loop."""
    if self._task is not None:
      raise RuntimeError("the engine is already running")
    self._wake = asyncio.Event()
    self._closing = False
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "sampler")
    self._task = asyncio.create_task(self._serve(self._worker))
    return self

  async def __aexit__(self, *exception: object) -> None:
    """Ends after the visit under way; requests still waiting get an error."""
    self._closing = True
    self._wake.set()
    task, self._task = self._task, None
    if task is not None:
      await task

  async def warm_up(self, tell: Callable[[int, int], None]) -> None:
    """Compiles every program that requests can need; they find nothing changed.

    Cancelling the call leaves the program under way to be finished.

    Args:
      tell: called with the number of programs that are there, and of all.

    Raises:
      EngineError: if the device failed, or the engine is not running.
    """
    self._check_running()
    loop, visits = asyncio.get_running_loop(), self._schedule.rehearsals()
    for done, visit in enumerate(visits, 1):
      try:
        await loop.run_in_executor(
            self._worker, self._visit, self._params, visit
        )
      except Exception as error:  # the cache may be gone
        self._failure = error
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
      return completion(request, self._context)
    self._schedule.add(request)
    if not self._wake.is_set():
      self._ready = time.perf_counter()
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
    self._schedule.release(session)

  def update(self, params: Params, version: int) -> None:
    """Swaps the weights before the next visit.

    Requests under way go on with the new weights on the cache they have; their
    completions tell. All other caches are dropped.

    Args:
      params: weights; see `__init__`.
      version: their number.
    """
    self._params = self._placed(params)
    self._schedule.renew(version)

  def _placed(self, params: Params) -> Params:
    """Weights where they are sampled from, in the dtype they are used in."""
    used = jax.tree.map(lambda w: jnp.asarray(w, self._config.dtype), params)
    if self._config.execution.outputs_first:
      used = products.turn(used, config=self._config)
    return jax.device_put(used, self._place)

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
    return {
        **self._schedule.stats(),
        "seconds": dict(self._seconds),
        "compilations": device.compilations(),
    }

  def _check_running(self) -> None:
    """Raises `EngineError` unless requests can be served."""
    if self._failure is not None:
      raise EngineError(f"the engine has failed: {self._failure}")
    if self._task is None or self._closing:
      raise EngineError("the engine is not running; use `async with engine:`")

  async def _serve(self, worker: concurrent.futures.Executor) -> None:
    """Visits the device while there is work; tells everyone when it ends."""
    loop = asyncio.get_running_loop()
    failure: Exception = EngineError("the engine was closed")
    with worker:
      try:
        while not self._closing:
          visit = self._schedule.plan()
          if visit is None:
            self._wake.clear()
            await self._wake.wait()
            continue
          began, ended, drawn = await loop.run_in_executor(
              worker, self._visit, self._params, visit
          )
          self._seconds["idle"] += began - self._ready
          self._seconds["busy"] += ended - began
          self._ready = ended
          self._schedule.absorb(visit, drawn)
          for _ in range(_YIELDS):
            await asyncio.sleep(0)
      except Exception as error:  # whatever it is, nobody may wait for ever
        self._failure = failure = error
      finally:
        self._abandon(failure)

  def _abandon(self, failure: Exception) -> None:
    """Fails every request and empties the slots."""
    for request in self._schedule.clear():
      if not request.future.done():
        error = EngineError(f"the engine stopped: {failure}")
        error.__cause__ = failure
        request.future.set_exception(error)

  def _visit(self, params: Params, visit: Visit) -> tuple[float, float, Drawn]:
    """Works on the device; the only code that runs in the worker thread.

    One visit at a time, so each finds the cache that the last one left.

    Returns:
      When it began and ended; what was drawn.
    """
    began = time.perf_counter()
    cache = self._cache
    for call in visit.prefills:
      cache = device.prefill(
          params,
          cache,
          call.tokens,
          call.lengths,
          call.slots,
          call.starts,
          config=self._config,
          heads=self._heads,
      )
    for first in range(0, len(visit.copies), _COPIES):
      pairs = visit.copies[first : first + _COPIES]
      pairs = pairs + pairs[-1:] * (_COPIES - len(pairs))
      sources, targets = np.asarray(pairs, np.int32).T
      cache = device.copy_slots(cache, sources, targets, heads=self._heads)
    self._cache, drawn = device.decode(
        params,
        cache,
        visit.slots,
        config=self._config,
        num_steps=self._decode_steps,
        num_rows=self._decode_rows,
        heads=self._heads,
    )
    told = jax.tree.map(np.asarray, drawn)
    return began, time.perf_counter(), told


def _check(**sizes: int) -> None:
  """Raises for the first size that is not positive."""
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"{name} must be >= 1, got {size!r}")


def _rows(decode_rows: int, num_slots: int) -> int:
  """Slots computed together; raises where they are more than there are."""
  if not 0 <= decode_rows <= num_slots:
    raise ValueError(
        f"decode_rows must be in 0..{num_slots} (num_slots), got"
        f" {decode_rows!r}"
    )
  return decode_rows or num_slots
