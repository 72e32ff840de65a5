"""Process 0's side of an engine whose mesh spans several processes.

The other processes follow, see `follower`: they are told what each visit does,
and run the same programs in the same order, their own weights included. What
was drawn is whole on every device, so nothing needs to be sent back.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import jax

from mgrpo_jax import leaves, sharding
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Drawn
from mgrpo_jax.policy.params import Params
from mgrpo_jax.sampler import orders as ordering
from mgrpo_jax.sampler.links import Crew, Kind
from mgrpo_jax.sampler.orders import Orders
from mgrpo_jax.sampler.resident import Resident
from mgrpo_jax.sampler.sizes import Sizes

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, another elsewhere


@dataclasses.dataclass(eq=False)
class Weights:
  """A version of the weights, placed by the first visit that uses it.

  Attributes:
    source: as they were given; None once they are placed.
    placed: where they are sampled from; None until then.
  """

  source: Params | None
  placed: Any = None


class Lead:
  """The part of an engine on process 0's devices, which the others follow.

  Attributes:
    params: the weights of the visits that are begun from now on.
  """

  def __init__(self, resident: Resident, crew: Crew) -> None:
    """Takes over who follows.

    Args:
      resident: this process's part.
      crew: who follows, agreed to the same `terms`.
    """
    self.params = Weights(source=None, placed=resident.params)
    self._resident, self._crew = resident, crew

  def placed(self, params: Params) -> Weights:
    """Lets weights be placed between two visits, as all processes must.

    Args:
      params: weights of any dtype; see `Resident.placed`. Not to be donated
        until a request was sampled from them.

    Returns:
      The same weights.
    """
    return Weights(source=params)

  def visit(
      self, params: Weights, orders: Orders, begun: Callable[[], None]
  ) -> Drawn:
    """Does what was ordered, on all processes, and waits for it.

    Args:
      params: weights, of `placed`.
      orders: what to do.
      begun: called when this process's devices have it all.

    Returns:
      What was drawn, on the host.

    Raises:
      EngineError: another process is lost, or cannot follow.
    """
    if params.source is not None:
      told = {"version": orders.version, "digest": digest(params.source)}
      self._crew.ask(Kind.WEIGHTS, json.dumps(told).encode())
      params.placed = self._resident.placed(params.source)
      params.source = None
    self._crew.ask(Kind.ORDERS, ordering.pack(orders))
    return self._resident.visit(params.placed, orders, begun)

  def leave(self, failure: Exception | None) -> None:
    """Lets the others go; nothing is visited until somebody follows again.

    Args:
      failure: why the engine cannot go on; None if it was left.
    """
    if failure is None:
      self._crew.tell(Kind.END)
    else:
      self._crew.tell(Kind.FAILED, str(failure).encode())


def home(
    config: TransformerConfig,
    params: Params,
    version: int,
    *,
    sizes: Sizes,
    mesh: jax.sharding.Mesh | None,
    crew: Crew | None,
) -> Resident | Lead:
  """Makes what an engine keeps on its devices, on all processes at once.

  Args:
    config: sizes of the policy.
    params: weights.
    version: their number.
    sizes: of the engine.
    mesh: of `sharding.sampler_mesh`, None for the default device.
    crew: the other processes, if the mesh spans several.

  Returns:
    What the worker visits.

  Raises:
    EngineError: another process has other sizes or weights, or is lost.
    ValueError: there is a crew for one process, or none for several.
  """
  shared = mesh is not None and sharding.spans_processes(mesh)
  if shared is (crew is None):
    raise ValueError(
        "crew: an engine has one if, and only if, its mesh spans processes"
    )
  if mesh is not None and crew is not None:
    told = terms(config, params, version, sizes=sizes, mesh=mesh)
    crew.ask(Kind.TERMS, json.dumps(told).encode())
  resident = Resident(config, params, sizes=sizes, mesh=mesh)
  return resident if crew is None else Lead(resident, crew)


def terms(
    config: TransformerConfig,
    params: Params,
    version: int,
    *,
    sizes: Sizes,
    mesh: jax.sharding.Mesh,
) -> dict[str, str]:
  """Writes down what must be the same on all processes.

  Args:
    config: sizes of the policy.
    params: the first weights.
    version: their number.
    sizes: of the engine.
    mesh: of the engine.

  Returns:
    Name to text.

  Raises:
    ValueError: a process has no device of the mesh.
  """
  there = {device.process_index for device in mesh.devices.flat}
  if there != set(range(jax.process_count())):
    raise ValueError(
        "mesh: an engine over several processes must have devices of all"
        f" {jax.process_count()}, not only of {sorted(there)}"
    )
  described = {
      **dataclasses.asdict(config),
      **dataclasses.asdict(sizes),
      "mesh": [device.id for device in mesh.devices.flat],
      "version": version,
      "weights": digest(params),
  }
  return {
      name: _ADDRESS.sub("", repr(value)) for name, value in described.items()
  }


def digest(params: Params) -> str:
  """The sha256 of weights that every process has as a whole.

  Args:
    params: weights.

  Returns:
    In hexadecimal; empty for weights that are spread over processes, of which
    there is only one copy.
  """
  spread = [
      isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
      for leaf in jax.tree.leaves(params)
  ]
  if any(spread):
    return ""
  return leaves.digest(leaves.describe_all(leaves.to_host(params)))
