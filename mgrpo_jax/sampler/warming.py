"""Programs are compiled before there is work, so that work's deadlines hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from mgrpo_jax import garbage
from mgrpo_jax.sampler import device
from mgrpo_jax.sampler.engine import Engine


async def warm_up(
    engines: Mapping[str, Engine],
    *,
    deadline: float,
    tell: Callable[[str], None],
) -> None:
  """Compiles what requests can need.

  One policy after the other: those of the same sizes share their programs.
  Collections of garbage pass over what there is then, see `garbage.pass_over`.

  Args:
    engines: by policy, running.
    deadline: seconds that it may take; a program under way is finished.
    tell: told of every program, and at the end, in one line.

  Raises:
    EngineError: the device failed.
    TimeoutError: it took longer.
  """
  began, before = time.monotonic(), sum(device.compilations().values())
  reached = "nothing"
  try:
    async with asyncio.timeout(deadline):
      for name, engine in engines.items():

        def progress(done: int, total: int, name: str = name) -> None:
          nonlocal reached
          reached = f"{name}, {done} of {total} programs"
          seconds = time.monotonic() - began
          tell(f"warm-up: {reached}, {seconds:.1f} s")

        await engine.warm_up(progress)
  except TimeoutError as error:
    raise TimeoutError(
        f"the warm-up took longer than {deadline:g} s and got to: {reached}"
    ) from error
  garbage.pass_over()
  compiled = sum(device.compilations().values()) - before
  seconds = time.monotonic() - began
  tell(f"warm-up: {compiled} programs compiled in {seconds:.1f} s")
