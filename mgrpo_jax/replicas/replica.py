"""A sampler of a policy that follows what the policy's job publishes.

It takes the newest weights when it is told to, and looks for them by itself
with every sign of life. Who asks says which weights it wants sampled: asked for
others than it has, it refuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import NoReturn

from starlette.types import ASGIApp

from mgrpo_jax import atomic, publish
from mgrpo_jax.replicas import records, wire
from mgrpo_jax.replicas.records import Entry
from mgrpo_jax.replicas.weights import Weights
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.serving import internal, response
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.store import Store
from mgrpo_jax.types import PolicyVersion

_LATER = 1  # seconds after which to ask again
_WAIT = 2.0  # seconds that somebody waits for newer weights, then asks again
_LAST = 10.0  # seconds for what is under way when it leaves


class Replica:
  """Answers what is asked of a policy's engine, and keeps it up to date."""

  def __init__(
      self,
      store: Store,
      policy: str,
      engine: Engine,
      *,
      weights: Weights,
      address: str,
      slots: int,
      every: float,
      tell: Callable[[str], None],
  ) -> None:
    """Says nothing of itself yet.

    Args:
      store: the bucket.
      policy: its name.
      engine: samples it from the weights to begin with; entered by the caller.
      weights: reads what is published.
      address: http://host:port, as the policy's job reaches it.
      slots: of the engine.
      every: seconds between signs of life, > 0.
      tell: takes a line about new weights, or what is wrong.
    """
    self._store = store
    self._engine = engine
    self._weights = weights
    self._every = every
    self._tell = tell
    self._entry = Entry(
        policy=policy,
        id=uuid.uuid4().hex[:12],
        address=address,
        slots=slots,
        version=0,
        weights="",
        beat=0,
        time=0.0,
    )
    self._seen: PolicyVersion | None = None  # what LATEST pointed at
    self._told = ""  # what was wrong at last
    self._task: asyncio.Task[None] | None = None  # takes newer weights
    self._signing = asyncio.Lock()
    self._writing: asyncio.Future[None] | None = None  # of the record
    self._leaving = False
    self._failure: asyncio.Future[BaseException] | None = None

  def application(self, token: str) -> ASGIApp:
    """Builds the web application: POST /v1/generate, /v1/release, /v1/follow.

    Args:
      token: that who asks must show; empty for none.

    Returns:
      The ASGI application.
    """
    return internal.build(
        {
            "/v1/generate": self._generate,
            "/v1/release": self._release,
            "/v1/follow": self._follow,
        },
        token,
    )

  async def failed(self) -> BaseException:
    """Waits until the engine has failed; returns why."""
    self._failure = asyncio.get_running_loop().create_future()
    return await self._failure

  async def run(self) -> NoReturn:
    """Follows the policy until it is cancelled.

    Raises:
      MismatchError: another policy is published than this one began with.
    """
    try:
      while True:
        began = time.monotonic()
        await self._sign()
        task = self._catching_up()
        await asyncio.wait({task}, timeout=self._every)
        if task.done():
          task.result()
        spent = time.monotonic() - began
        await asyncio.sleep(max(0.0, self._every - spent))
    finally:
      await self._leave()

  async def _leave(self) -> None:
    """Removes the record, after whatever is still being written to it."""
    self._leaving = True
    self._store.hurry(_LAST)
    if self._task is not None:
      self._task.cancel()
    if self._writing is not None:
      await asyncio.wait({self._writing})
    entry = self._entry
    with contextlib.suppress(atomic.StorageError):  # else it falls silent
      await asyncio.to_thread(
          records.remove, self._store, entry.policy, entry.id
      )

  async def _sign(self) -> None:
    """Gives a sign of life: writes the record, one beat on."""
    async with self._signing:
      if self._leaving:
        return
      self._entry = dataclasses.replace(
          self._entry, beat=self._entry.beat + 1, time=time.time()
      )
      self._writing = asyncio.ensure_future(
          asyncio.to_thread(records.write, self._store, self._entry)
      )
      try:
        await asyncio.shield(self._writing)
      except atomic.StorageError as error:  # the bucket may be back in a while
        self._complain(str(error))

  def _catching_up(self) -> asyncio.Task[None]:
    """Has one task take what LATEST points at, whoever waits for it."""
    if self._task is None or self._task.done():
      self._task = asyncio.create_task(self._catch_up())
    return self._task

  async def _catch_up(self) -> None:
    """Samples from what LATEST points at, from the next visit on."""
    try:
      policy, entry = self._entry.policy, self._entry
      newest = await asyncio.to_thread(publish.latest, self._store, policy)
      if newest is None or newest == self._seen:
        return
      if (newest.number, newest.digest) == (entry.version, entry.weights):
        return
      weights = await asyncio.to_thread(self._weights.read, self._store, policy)
    except (atomic.StorageError, publish.NoVersionError) as error:
      self._complain(str(error))
      return
    version = weights.version
    self._seen, self._told = newest, ""
    await asyncio.to_thread(self._engine.update, weights.params, version.number)
    self._entry = dataclasses.replace(
        self._entry, version=version.number, weights=version.digest
    )
    for line in weights.skipped:
      self._tell(f"skipped {line}")
    self._tell(f"samples from version {version.number}")
    await self._sign()

  async def _generate(self, body: bytes) -> bytes:
    """Answers a question."""
    asked = wire.read_question(body)
    self._check(asked.version, asked.digest)
    try:
      completion = await self._engine.generate(
          asked.tokens,
          asked.sampling,
          asked.seed,
          session=asked.session or None,
      )
    except ValueError as error:
      raise RequestError(400, str(error)) from error
    except EngineError as error:
      if self._failure is not None and not self._failure.done():
        self._failure.set_result(error)
      raise RequestError(503, f"the sampler stopped: {error}") from error
    return response.dump(wire.write_answer(completion))

  async def _release(self, body: bytes) -> bytes:
    """Forgets a session."""
    self._engine.release(wire.read_session(body))
    return response.dump({})

  async def _follow(self, body: bytes) -> bytes:
    """Takes the newest weights; refuses where it has not got them yet."""
    version, digest = wire.read_version(body)
    if (version, digest) != (self._entry.version, self._entry.weights):
      await asyncio.wait({self._catching_up()}, timeout=_WAIT)
    self._check(version, digest)
    return response.dump({})

  def _check(self, version: int, digest: str) -> None:
    """Raises `RequestError` where other weights are wanted than there are."""
    entry = self._entry
    if (version, digest) != (entry.version, entry.weights):
      raise RequestError(
          503,
          f"version: {version} is not what is sampled from here, which is"
          f" {entry.version}",
          param="version",
          retry_after=_LATER,
      )

  def _complain(self, problem: str) -> None:
    """Tells what is wrong, once."""
    if problem != self._told:
      self._told = problem
      self._tell(problem)
