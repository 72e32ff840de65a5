"""How kinds of servers are told of weights, and what they say of them.

What a server has loaded carries a label of ours, by which it is told from a
server that was started anew, or was given another run's weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from mgrpo_jax.sampler.connection import Connection
from mgrpo_jax.sampler.interface import EngineError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """A version that is handed over.

  Attributes:
    model: name of the policy at the server.
    version: number of the weights.
    path: their directory, absolute.
    label: what the server is to say of them.
  """

  model: str
  version: int
  path: pathlib.Path
  label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
  """What is particular to a kind of server.

  Attributes:
    load: makes it sample from weights; returns when it does.
    label: asks for the label of what it samples a model from.
    unlabelled: the label of a server that was given nothing since it started.
    untied: whether it must be given, and started with, a head that shares
      nothing with the embedding. On CPUs vLLM 0.32 reloads the embedding only
      and goes on with the head that it packed when it started.
    tempered: whether its log-probabilities are always of the distribution that
      was sampled from; if not, that depends on how it was started.
  """

  load: Callable[[Connection, Weights], Coroutine[Any, Any, None]]
  label: Callable[[Connection, str], Coroutine[Any, Any, str]]
  unlabelled: str
  untied: bool
  tempered: bool


async def _load_vllm(connection: Connection, weights: Weights) -> None:
  """Has vLLM load weights in place, and forget what it cached of older ones.

  Requests under way are finished first. Needs VLLM_SERVER_DEV_MODE=1.
  """
  root = connection.address.root
  async with _paused(connection):
    await connection.ask(
        "POST",
        f"{root}/collective_rpc",
        {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(weights.path)},
        },
    )
    told = await connection.ask("POST", f"{root}/reset_prefix_cache")
    if not isinstance(told, dict) or told.get("success") is not True:
      raise EngineError(f"{root}/reset_prefix_cache: {told!r}, not a success")
    await connection.ask(
        "POST",
        f"{root}/update_weight_version",
        {"new_version": weights.label},
    )


@contextlib.asynccontextmanager
async def _paused(connection: Connection) -> AsyncIterator[None]:
  """Pauses vLLM; resumes it in any case, for who gives up may have paused it.

  What went wrong first is what is told.
  """
  root = connection.address.root
  try:
    with _hint("vLLM must be started with VLLM_SERVER_DEV_MODE=1"):
      await connection.ask("POST", f"{root}/pause?mode=wait")
    yield
  except BaseException:
    with contextlib.suppress(EngineError, OSError):
      await _resume(connection)
    raise
  await _resume(connection)


async def _resume(connection: Connection) -> None:
  """Has vLLM sample again, even if the caller is cancelled meanwhile."""
  url = f"{connection.address.root}/resume"
  asked = asyncio.ensure_future(connection.ask("POST", url))
  try:
    await asyncio.shield(asked)
  except asyncio.CancelledError:
    await asyncio.wait({asked})
    raise


async def _label_vllm(connection: Connection, model: str) -> str:
  """Asks vLLM, which has one model."""
  del model
  told = await connection.ask("GET", f"{connection.address.root}/weight_info")
  return _field(told, "weight_version")


async def _load_mgrpo(connection: Connection, weights: Weights) -> None:
  """Has `experiments.serve --weights_from=…` load weights."""
  with _hint("experiments.serve must be given --weights_from"):
    told = await connection.post(
        f"weights/{weights.model}",
        {"version": weights.version, "label": weights.label},
    )
  if _field(told, "label") != weights.label:
    raise EngineError(f"{connection.address.url}/weights: {told!r}")


async def _label_mgrpo(connection: Connection, model: str) -> str:
  """Asks `experiments.serve`."""
  return _field(await connection.get(f"weights/{model}"), "label")


@contextlib.contextmanager
def _hint(text: str) -> Iterator[None]:
  """Adds what to do about it to a refusal."""
  try:
    yield
  except EngineError as error:
    raise EngineError(f"{error}; {text}") from error


def _field(told: Any, name: str) -> str:
  """A text of an answer; empty where it has none."""
  found = told.get(name) if isinstance(told, dict) else None
  return found if isinstance(found, str) else ""


# Servers of vLLM (0.32 was tried), and of `experiments.serve`.
VLLM = Dialect(
    load=_load_vllm,
    label=_label_vllm,
    unlabelled="default",
    untied=True,
    tempered=False,
)
MGRPO = Dialect(
    load=_load_mgrpo,
    label=_label_mgrpo,
    unlabelled="",
    untied=False,
    tempered=True,
)
