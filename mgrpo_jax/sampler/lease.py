"""The weights that a server was given, and whether it has them still.

Hand-overs have a thread and connections of their own, one after another: who
waits for one may be cancelled or hang, and it is finished all the same.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import pathlib
import uuid
from collections.abc import Coroutine
from typing import Any, Self

from mgrpo_jax import atomic
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.sampler import handover
from mgrpo_jax.sampler.connection import Address, Connection
from mgrpo_jax.sampler.dialects import Dialect, Weights
from mgrpo_jax.sampler.interface import EngineError

_LOCK = ".lock"
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
  """A server that samples one policy.

  Attributes:
    address: where it is, and how patiently it is asked.
    model: name of the policy there.
    folder: where versions are written; the server reads them under the same
      path, and nobody else writes there.
    dialect: how it is told of them.
  """

  address: Address
  model: str
  folder: pathlib.Path
  dialect: Dialect


class Lease:
  """Gives one server weights, within `async with`.

  Attributes:
    losses: times that it was found without the weights it was given; what it
      answered before is not to be believed.
    handovers: times that it was given weights.
  """

  def __init__(self, server: Server) -> None:
    """Connects to nothing yet.

    Args:
      server: that samples.
    """
    self.losses = 0
    self.handovers = 0
    self._server = server
    self._owner = uuid.uuid4().hex[:12]  # begins every label that we give
    self._label: str | None = None  # None while nobody knows what it has
    self._worker: concurrent.futures.ThreadPoolExecutor | None = None
    self._under_way: concurrent.futures.Future[None] | None = None
    self._stack = contextlib.AsyncExitStack()

  @property
  def is_sure(self) -> bool:
    """Whether the last hand-over went well, and none is under way."""
    return self._label is not None

  async def __aenter__(self) -> Self:
    """Keeps others from writing to the folder; raises StorageError if one does.

    Nothing is handed over yet.
    """
    async with contextlib.AsyncExitStack() as stack:
      stack.enter_context(atomic.exclusive(self._server.folder / _LOCK))
      worker = concurrent.futures.ThreadPoolExecutor(1, "handover")
      stack.push_async_callback(asyncio.to_thread, worker.shutdown)
      self._label, self._worker = None, worker
      self._stack = stack.pop_all()
    return self

  async def __aexit__(self, *exception: object) -> None:
    """Waits for the hand-over that is under way, if one is."""
    self._worker = self._under_way = None
    await self._stack.aclose()

  async def take(self, policy: Policy, version: int) -> None:
    """Gives the server weights, whoever else gave it some.

    Args:
      policy: with the weights.
      version: their number.

    Raises:
      EngineError: the server refuses.
      StorageError: they cannot be written.
      UnreachableError: it does not answer.
    """
    await _finished(self._start(self._take(policy, version)))

  async def blank(self, policy: Policy) -> pathlib.Path:
    """Gives the server weights with which every token is as likely.

    Args:
      policy: of their sizes.

    Returns:
      Where they lie.

    Raises:
      EngineError: the server refuses.
      StorageError: they cannot be written.
      UnreachableError: it does not answer.
    """
    folder = self._server.folder / "blank"
    await _finished(self._start(self._blank(policy, folder)))
    return handover.directory(folder, 0)

  async def ensure(self, policy: Policy, version: int) -> None:
    """Gives the server weights again if it has lost them; counts the loss.

    Args:
      policy: with the weights.
      version: their number.

    Raises:
      EngineError: another run gave it weights, or it refuses.
      StorageError: they cannot be written.
      UnreachableError: it does not answer.
    """
    await _finished(self._start(self._ensure(policy, version)))

  def replace(self, policy: Policy, version: int) -> None:
    """Gives the server other weights; keeps the event loop waiting.

    Args:
      policy: with the weights.
      version: their number.

    Raises:
      EngineError: another run gave it weights, or it refuses.
      StorageError: they cannot be written.
      UnreachableError: it does not answer.
    """
    self._start(self._replace(policy, version)).result()

  async def settled(self) -> None:
    """Waits while a hand-over is under way, whatever becomes of it."""
    while self._under_way is not None and not self._under_way.done():
      await asyncio.wait({_wrapped(self._under_way)})

  def _start(
      self, work: Coroutine[Any, Any, None]
  ) -> concurrent.futures.Future[None]:
    """Has the thread do something, after what it is at."""
    if self._worker is None:
      work.close()
      raise EngineError("the engine is not running; use `async with engine:`")
    self._under_way = self._worker.submit(asyncio.run, work)
    return self._under_way

  async def _take(self, policy: Policy, version: int) -> None:
    async with Connection(self._server.address) as connection:
      await self._hand_over(connection, policy, version)

  async def _blank(self, policy: Policy, folder: pathlib.Path) -> None:
    async with Connection(self._server.address) as connection:
      policy = handover.untied(policy, blank=True)
      await self._load(connection, policy, 0, folder)

  async def _ensure(self, policy: Policy, version: int) -> None:
    async with Connection(self._server.address) as connection:
      if not await self._has_ours(connection):
        await self._hand_over(connection, policy, version)

  async def _replace(self, policy: Policy, version: int) -> None:
    async with Connection(self._server.address) as connection:
      await self._has_ours(connection)
      await self._hand_over(connection, policy, version)

  async def _has_ours(self, connection: Connection) -> bool:
    """Whether a server has our weights; counts it if not.

    Raises EngineError if they are another run's. Weights of ours that are not
    the last are of a hand-over that did not end well.
    """
    dialect, model = self._server.dialect, self._server.model
    found = await dialect.label(connection, model)
    if found == self._label:
      return True
    self.losses += 1
    if found != dialect.unlabelled and not found.startswith(self._owner):
      raise EngineError(
          f"{self._server.address.url}: samples {model!r} from {found[:80]!r},"
          f" not from {self._label!r} which it was given; another run uses it"
      )
    return False

  async def _hand_over(
      self, connection: Connection, policy: Policy, version: int
  ) -> None:
    """Gives a server weights, and removes those given before."""
    folder = self._server.folder
    if self._server.dialect.untied:
      policy = handover.untied(policy)
    await self._load(connection, policy, version, folder)
    self.handovers += 1
    try:
      handover.prune(folder, version)
    except OSError as error:
      _LOG.warning("weights handed over before stay: %s", error)

  async def _load(
      self,
      connection: Connection,
      policy: Policy,
      version: int,
      folder: pathlib.Path,
  ) -> None:
    """Writes weights and has the server load them, under a label of its own."""
    label = f"{self._owner}-{uuid.uuid4().hex[:12]}-v{version}"
    path = handover.write(folder, version, policy)
    self._label = None
    await self._server.dialect.load(
        connection,
        Weights(
            model=self._server.model, version=version, path=path, label=label
        ),
    )
    self._label = label


def _wrapped(
    future: concurrent.futures.Future[None],
) -> asyncio.Future[None]:
  """What to await of the thread's work; nobody need ask for its error."""
  made = asyncio.wrap_future(future)
  made.add_done_callback(lambda done: done.cancelled() or done.exception())
  return made


async def _finished(future: concurrent.futures.Future[None]) -> None:
  """Waits for the thread's work, which goes on if the caller is cancelled."""
  await asyncio.shield(_wrapped(future))
