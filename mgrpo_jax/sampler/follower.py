"""The other processes' side of an engine whose mesh spans several processes.

Process 0 has the `Engine`: requests, slots, schedule. Every other process has a
`Follower`, which runs what each visit does on its own devices:

    process 0                                  processes 1, 2, …
    crew = links.gather(…)                     link = links.join(…)
    engine = Engine(…, mesh=mesh, crew=crew)   follower = Follower(…, link=link)
    async with engine: …                       follower.follow(weights)

Each `async with` is one `follow`. Within it the devices belong to the engine:
programs of several processes must be started in the same order everywhere, so
other ones, such as a train step, run when both are through.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params
from mgrpo_jax.sampler import lead
from mgrpo_jax.sampler import orders as ordering
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.sampler.links import Kind, Link
from mgrpo_jax.sampler.resident import Resident
from mgrpo_jax.sampler.sizes import Sizes


class Follower:
  """The part of an engine on another process's devices."""

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
      mesh: jax.sharding.Mesh,
      link: Link,
  ) -> None:
    """Allocates its part of the cache, once process 0 has agreed.

    Args:
      config: see `Engine`; like all that follows, what process 0 has.
      params: weights: the same, whole, or their part on this process.
      version: number of these weights.
      num_slots: of the engine.
      context: of the engine.
      block: of the engine.
      prefill_tokens: of the engine.
      prefill_buckets: of the engine.
      decode_steps: of the engine.
      decode_rows: of the engine.
      mesh: with devices of every process.
      link: of `links.join`, to process 0.

    Raises:
      EngineError: process 0 has something else, and what; or is lost.
      ValueError: if a size is out of range, naming it.
    """
    self._link = link
    self._sizes = Sizes(
        num_slots=num_slots,
        context=context,
        block=block,
        prefill_tokens=prefill_tokens,
        prefill_buckets=prefill_buckets,
        decode_steps=decode_steps,
        decode_rows=decode_rows,
    )
    here = lead.terms(config, params, version, sizes=self._sizes, mesh=mesh)
    self._agree(here)
    self._resident = Resident(config, params, sizes=self._sizes, mesh=mesh)

  def follow(self, weights: Callable[[int], Params]) -> int:
    """Does what process 0 does, until its engine is left.

    Args:
      weights: gives this process's weights of a version, which process 0 then
        samples from, too. May take as long as a silent process may be silent.

    Returns:
      Visits that were made.

    Raises:
      EngineError: process 0 is lost, has failed, or has sent what cannot be
        done here. It is told, and can go on no more than this process can.
    """
    visits = 0
    while True:
      kind, body = self._link.receive()
      if kind == Kind.END:
        return visits
      try:
        visits += self._obeyed(kind, body, weights)
      except Exception as error:  # whatever it is, process 0 must not wait
        self._refuse(error)

  def _obeyed(
      self, kind: Kind, body: bytes, weights: Callable[[int], Params]
  ) -> int:
    """Does what a frame says; returns the number of visits that it made."""
    if kind == Kind.WEIGHTS:
      told = json.loads(body)
      params = weights(told["version"])
      _check(told, {**told, "digest": lead.digest(params)})
      self._link.ready()
      self._resident.params = self._resident.placed(params)
      return 0
    if kind != Kind.ORDERS:
      raise ValueError(f"process 0 says {kind.name}, not what to do")
    orders = ordering.unpack(body, sizes=self._sizes)
    self._link.ready()
    self._resident.visit(self._resident.params, orders)
    return 1

  def _agree(self, here: Mapping[str, str]) -> None:
    """Compares what this process has with what process 0 has."""
    kind, body = self._link.receive()
    try:
      if kind != Kind.TERMS:
        raise ValueError(f"process 0 says {kind.name}, not what it has")
      _check(json.loads(body), here)
    except ValueError as error:
      self._refuse(error)
    self._link.ready()

  def _refuse(self, error: Exception) -> None:
    """Tells process 0 why this process cannot go on, and ends."""
    try:
      self._link.send(Kind.FAILED, str(error).encode())
    except EngineError as lost:
      error.add_note(f"and process 0 cannot be told: {lost}")
    raise EngineError(f"cannot follow process 0: {error}") from error


def _check(told: Mapping[str, Any], here: Mapping[str, Any]) -> None:
  """Raises a ValueError where this process has not what process 0 has."""
  differ = sorted(
      name for name in {*told, *here} if told.get(name) != here.get(name)
  )
  if differ:
    raise ValueError(
        ", ".join(
            f"{name} is {here.get(name)}, in process 0 {told.get(name)}"
            for name in differ
        )
    )
