"""An engine and its replicas in other processes, which come and go.

A request goes to whoever is least busy of those that have the weights of this
moment, to the very digest; its session's next ones go there, too, for the
cache. On equal machines the seed determines what is sampled, not who samples:
a request whose replica is gone is sampled elsewhere, and only time is lost.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Self

from mgrpo_jax import atomic
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.sampling import Sampling, split_seed
from mgrpo_jax.replicas import records, wire
from mgrpo_jax.replicas.records import Entry
from mgrpo_jax.sampler.connection import Address, Connection, UnreachableError
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sampler.interface import EngineError, OnTokens
from mgrpo_jax.sampler.stream import checked
from mgrpo_jax.store import Store
from mgrpo_jax.types import Completion, PolicyVersion

_SILENT = 3  # looks in a row without a sign of life
_DEAD = 120  # such looks, after which its record is removed
_PROBE = 10.0  # seconds in which a replica answers whether it has the weights
_LOOK = 0.5  # seconds between looks at whether a replica that is asked lives
_LAST = 10.0  # seconds for a look that is under way when the pool is left
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True, eq=False)
class _Member:
  """A replica, as it is seen from here."""

  entry: Entry
  connection: Connection
  has: tuple[int, str] = (0, "")  # version and digest that it answered to have
  busy: int = 0  # requests of ours
  misses: int = 0  # looks since its last sign of life
  lost: bool = True  # until it answers
  refuses: bool = False  # or answers nonsense; lost for good
  asked: asyncio.Task[None] | None = None  # whether it has the weights


class Pool:
  """Samples from one policy, here and wherever there are replicas.

  A `RolloutEngine`; use it within `async with`.
  """

  def __init__(
      self,
      engine: Engine,
      store: Store,
      policy: str,
      *,
      slots: int,
      context: int,
      vocab_size: int,
      address: Address,
      every: float,
  ) -> None:
    """Knows of no replicas yet.

    Args:
      engine: of this process; entered and left with the pool.
      store: the bucket, where replicas say that they are there.
      policy: its name.
      slots: of the engine.
      context: tokens that a stream can have.
      vocab_size: of the policy.
      address: how replicas are asked; its url and number of requests at a time
        are each replica's own.
      every: seconds between looks for replicas, > 0: those between their signs
        of life.
    """
    self.engine = engine
    self._store, self._policy = store, policy
    self._slots, self._context, self._vocab_size = slots, context, vocab_size
    self._every, self._address = every, address
    self._here = 0  # requests
    self._elsewhere = 0  # tokens
    self._version = 0
    self._published = (0, "")  # number and digest of what is in the store
    self._members: dict[str, _Member] = {}
    self._held: dict[str, _Member | None] = {}  # by session; None: is here
    self._helpers: set[str] = set()  # who has sampled lately
    self._strange: set[str] = set()  # ids of useless records, errors told
    self._aside: set[asyncio.Task[Any]] = set()
    self._loop: asyncio.AbstractEventLoop | None = None

  async def __aenter__(self) -> Self:
    """Starts the engine, and to look for replicas."""
    await self.engine.__aenter__()
    self._loop = asyncio.get_running_loop()
    self._do_aside(self._look_always())
    return self

  async def __aexit__(self, *exception: object) -> None:
    """Leaves the replicas to themselves, and ends the engine."""
    self._loop = None
    self._store.hurry(_LAST)  # a look may be under way
    members, self._members = self._members, {}
    try:
      for task in self._aside:
        task.cancel()
      await asyncio.gather(*self._aside, return_exceptions=True)
      for member in members.values():
        await member.connection.__aexit__(None, None, None)
    finally:
      await self.engine.__aexit__(*exception)

  async def generate(
      self,
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      *,
      session: str | None = None,
      on_tokens: OnTokens | None = None,
  ) -> Completion:
    """Samples what follows a stream of tokens; see `Engine.generate`.

    Args:
      tokens: the whole stream.
      sampling: temperature, filters, budget, stop tokens.
      seed: 0 to 2^64 - 1.
      session: names the stream that later calls extend.
      on_tokens: called with what was drawn; once, where a replica drew it.

    Returns:
      The completion.

    Raises:
      ValueError: if an argument is out of range; nothing has been done.
      EngineError: if the engine of this process failed or was closed.
    """
    checked(tokens, context=self._context, vocab_size=self._vocab_size)
    split_seed(seed)  # raises for those out of range
    while (member := self._choose(session)) is not None:
      asked = wire.Question(
          version=member.has[0],
          digest=member.has[1],
          tokens=tuple(tokens),
          seed=seed,
          session=session or "",
          sampling=sampling,
      )
      try:
        completion = await self._ask(member, asked)
      except (EngineError, UnreachableError, wire.AnswerError) as error:
        member.refuses |= not isinstance(error, UnreachableError)
        self._lose(member, error)
        continue
      self._elsewhere += len(completion.tokens)
      self._helpers.add(member.entry.id)
      if on_tokens is not None and len(completion.tokens):
        on_tokens(completion.tokens.tolist(), completion.logprobs.tolist())
      return completion
    self._here += 1
    try:
      return await self.engine.generate(
          tokens, sampling, seed, session=session, on_tokens=on_tokens
      )
    finally:
      self._here -= 1

  def release(self, session: str) -> None:
    """Ends a session; unknown ones are ignored."""
    self._forget(session, self._held.pop(session, None))

  def update(self, params: Params, version: int) -> None:
    """Samples from other weights from now on.

    Replicas do once they have them: `published` tells them where.

    Args:
      params: weights.
      version: their number.
    """
    self.engine.update(params, version)
    self._version = version

  def published(self, version: PolicyVersion) -> None:
    """Has replicas take a version that is in the store; from any thread.

    Args:
      version: the one that was written last.
    """
    loop = self._loop  # which leaving takes away
    if loop is not None and not loop.is_closed():
      loop.call_soon_threadsafe(self._spread, version)

  def helpers(self) -> int:
    """Counts the replicas that have sampled something since it was asked."""
    helpers, self._helpers = self._helpers, set()
    return len(helpers)

  def stats(self) -> dict[str, Any]:
    """Counts what was done so far.

    Returns:
      What `Engine.stats` has; `generated` counts everybody's tokens,
      `elsewhere` those of replicas, and `replicas` those that have the weights
      of this moment.
    """
    found = self.engine.stats()
    return found | {
        "generated": found["generated"] + self._elsewhere,
        "elsewhere": self._elsewhere,
        "replicas": len(self._usable()),
    }

  def _usable(self) -> list[_Member]:
    """The replicas that live and have the weights of this moment."""
    if self._published[0] != self._version or not self._published[1]:
      return []
    return [
        one
        for one in self._members.values()
        if one.has == self._published and not one.lost
    ]

  def _choose(self, session: str | None) -> _Member | None:
    """Who samples a request; None for the engine of this process."""
    usable = self._usable()
    if session in self._held:
      held = self._held[session]
      if held is None or held in usable:
        return held
      self._forget(session, held)
    chosen, least = None, self._here / self._slots
    for one in usable:
      if one.busy / one.entry.slots < least:
        chosen, least = one, one.busy / one.entry.slots
    if session is not None:
      self._held[session] = chosen
    return chosen

  async def _ask(self, member: _Member, asked: wire.Question) -> Completion:
    """Asks a replica, as long as it gives signs of life."""
    body = wire.write_question(asked)
    request = asyncio.create_task(member.connection.post("generate", body))
    member.busy += 1
    try:
      while not (await asyncio.wait({request}, timeout=_LOOK))[0]:
        if member.lost:
          raise UnreachableError(f"{member.entry.address}: is silent")
      answer = request.result()
    finally:
      member.busy -= 1
      request.cancel()
      await asyncio.gather(request, return_exceptions=True)
    return wire.read_answer(
        answer, asked, newest=self._version, vocab_size=self._vocab_size
    )

  def _lose(self, member: _Member, error: Exception) -> None:
    """Gives a replica nothing to do until it answers again, if ever."""
    if not member.lost:
      member.lost = True
      self._warn(error)

  def _spread(self, version: PolicyVersion) -> None:
    """Tells all replicas of a version."""
    self._published = (version.number, version.digest)
    for member in self._members.values():
      self._bring(member)

  def _bring(self, member: _Member) -> None:
    """Sees that a replica is being asked for what was published last."""
    if member.asked is None or member.asked.done():
      if member.lost or member.has != self._published:
        member.asked = self._do_aside(self._follow(member))

  async def _follow(self, member: _Member) -> None:
    """Has a replica take what was published last, and answer that it has."""
    while self._published[1] and self._may_help(member):
      version, digest = wanted = self._published
      body = {"version": version, "digest": digest}
      has = await self._tell(member, "follow", body)
      if has and self._may_help(member):
        member.has, member.lost = wanted, False
      if has and wanted == self._published:
        return
      await asyncio.sleep(min(self._every, 1.0))

  async def _tell(
      self, member: _Member, path: str, body: dict[str, Any]
  ) -> bool:
    """Asks for something that a replica may also do later; says if it did."""
    try:
      async with asyncio.timeout(_PROBE):
        await member.connection.post(path, body)
    except (UnreachableError, TimeoutError) as error:
      _LOG.debug("%s/%s: %s", member.entry.address, path, error)
      return False
    except EngineError as error:
      member.refuses = True
      self._warn(error)
      return False
    return True

  def _may_help(self, member: _Member) -> bool:
    """Whether a replica is there, alive, and has never refused."""
    is_there = self._members.get(member.entry.id) is member
    return is_there and member.misses < _SILENT and not member.refuses

  def _warn(self, error: Exception) -> None:
    """Says what is wrong with a replica."""
    _LOG.warning("a replica of %s was lost: %s", self._policy, error)

  def _forget(self, session: str, member: _Member | None) -> None:
    """Ends a session where it was."""
    if member is None:
      self.engine.release(session)
    elif self._may_help(member):
      self._do_aside(self._tell(member, "release", {"session": session}))

  async def _look_always(self) -> None:
    """Keeps track of who is there."""
    while True:
      try:
        found = await asyncio.to_thread(records.read, self._store, self._policy)
        await self._see(found)
      except atomic.StorageError as error:  # who is there is asked all the same
        _LOG.debug("replicas of %s: %s", self._policy, error)
      except Exception as error:  # without them the run is slower, no more
        self._complain(error)
      await asyncio.sleep(self._every)

  async def _see(self, found: dict[str, Entry]) -> None:
    """Takes in what replicas say of themselves."""
    for name, entry in found.items():
      member = self._members.get(name)
      if member is None:
        await self._meet(entry)
        continue
      is_alive = entry.beat != member.entry.beat
      member.entry = entry
      member.misses = 0 if is_alive else member.misses + 1
      if is_alive:
        self._bring(member)
    for name, member in list(self._members.items()):
      if name not in found:  # it has left
        member.lost = True
        if not member.busy:
          await self._members.pop(name).connection.__aexit__(None, None, None)
      elif member.misses >= _SILENT:
        self._lose(member, UnreachableError(f"{member.entry.address}: silent"))
        if member.misses >= _DEAD:
          await self._bury(name)

  async def _bury(self, name: str) -> None:
    """Removes the record of a replica that is gone; later if not now."""
    try:
      await asyncio.to_thread(records.remove, self._store, self._policy, name)
    except atomic.StorageError as error:
      _LOG.debug("replicas of %s: %s", self._policy, error)

  async def _meet(self, entry: Entry) -> None:
    """Makes a new replica's acquaintance; its next sign of life counts."""
    try:
      address = dataclasses.replace(
          self._address,
          url=f"{entry.address}/v1",
          max_concurrent=4 * entry.slots,
      )
    except ValueError as error:
      if entry.id not in self._strange:
        self._strange.add(entry.id)
        self._warn(error)
      return
    connection = await Connection(address).__aenter__()
    self._members[entry.id] = _Member(entry=entry, connection=connection)

  def _do_aside(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Does something beside what requests wait for."""
    task = asyncio.create_task(work)
    self._aside.add(task)
    task.add_done_callback(self._end_aside)
    return task

  def _end_aside(self, task: asyncio.Task[Any]) -> None:
    """Tells of what went wrong in what nobody waits for."""
    self._aside.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
      self._complain(error)

  def _complain(self, error: BaseException) -> None:
    """Says what is wrong here, once, and that the run goes on."""
    if (reason := repr(error)) not in self._strange:
      self._strange.add(reason)
      _LOG.error("replicas of %s: %s", self._policy, reason, exc_info=error)
