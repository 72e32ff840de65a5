"""From a start to ready: programs are compiled before requests come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mgrpo_jax.sampler import warming
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.serving.limits import Gate


async def warm_up(
    gate: Gate,
    engines: Mapping[str, Engine],
    *,
    deadline: float,
    tell: Callable[[str], None],
) -> None:
  """Compiles what requests can need, then lets them in.

  Args:
    gate: to the models; warming until all is there.
    engines: by policy, running.
    deadline: seconds that it may take; a program under way is finished.
    tell: told of every program, and at the end, in one line.

  Raises:
    EngineError: the device failed.
    TimeoutError: it took longer.
  """
  gate.warming = True
  await warming.warm_up(engines, deadline=deadline, tell=tell)
  gate.warming = False
