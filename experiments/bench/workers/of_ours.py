"""This project's engine and learner, as a worker like the others.

    python -m experiments.bench.workers.of_ours SOURCE ENGINE [STEP]

SOURCE is what `policy.load` takes, ENGINE the sizes of `Engine` as JSON, with
`kernels` and `decode_attention` of its policy's execution, by the names that
recipes have, and the `dtype` it computes in, STEP the settings of a GRPO step,
see `step.Steps`. Compiled before it says that it is ready, and how long that
took.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.bench.workers import pipe, traffic
from experiments.bench.workers.step import Steps
from experiments.placing import DECODE_ATTENTIONS
from mgrpo_jax import policy
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.types import Completion


class Worker:
  """An engine that is entered anew for every request."""

  def __init__(self, engine: Engine) -> None:
    """Keeps the engine.

    Args:
      engine: not running.
    """
    self._engine = engine
    self._seeds = itertools.count()

  def generate(
      self, prompts: Sequence[Sequence[int]], new: int
  ) -> dict[str, Any]:
    """Samples for all prompts at once.

    Args:
      prompts: ids.
      new: tokens for each.

    Returns:
      Seconds and tokens.
    """
    start = time.perf_counter()
    told = asyncio.run(self.sample(prompts, new))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(len(one.tokens) for one in told)}

  async def sample(
      self, prompts: Sequence[Sequence[int]], new: int
  ) -> list[Completion]:
    """Samples for all prompts at once; see `generate`."""
    async with self._engine:
      asked = [self._ask(prompt, new, None) for prompt in prompts]
      return list(await asyncio.gather(*asked))

  def converse(self, calls: Sequence[traffic.Call]) -> dict[str, Any]:
    """Plays agents' calls side by side.

    Args:
      calls: recorded.

    Returns:
      Seconds and tokens sampled; tokens prefilled and slots copied.
    """
    before, start = self._engine.stats(), time.perf_counter()
    tokens = asyncio.run(self._converse(calls))
    seconds, after = time.perf_counter() - start, self._engine.stats()
    told = {"seconds": seconds, "tokens": tokens}
    names = ("prefilled", "copied", "visits", "evictions", "mismatches")
    return told | {name: after[name] - before[name] for name in names}

  async def _converse(self, calls: Sequence[traffic.Call]) -> int:
    """Plays; returns how many tokens were sampled."""
    async with self._engine:
      playing = (self._play(call, str(i)) for i, call in enumerate(calls))
      return sum(await asyncio.gather(*playing))

  async def _play(self, call: traffic.Call, name: str) -> int:
    """Plays one call and those that it makes; each is a session."""
    play = traffic.play(call, name)
    turn, tokens = next(play), 0
    while True:
      told = await self._ask(turn.tokens, turn.count, turn.call)
      if turn.last:
        self._engine.release(turn.call)
      tokens += len(told.tokens)
      try:
        turn = play.send(told.tokens.tolist())
      except StopIteration:
        return tokens

  async def _ask(
      self, tokens: Sequence[int], new: int, session: str | None
  ) -> Completion:
    """Asks for exactly so many tokens."""
    sampling = Sampling(temperature=1.0, max_new_tokens=new, stop_ids=())
    return await self._engine.generate(
        tokens, sampling, next(self._seeds), session=session
    )


async def _warm(engine: Engine) -> None:
  """Compiles what the engine has."""
  async with engine:
    await engine.warm_up(lambda done, total: None)


def main() -> None:
  """Loads the policy and answers."""
  wire = pipe.Pipe()
  loaded = policy.load(sys.argv[1])
  start = time.perf_counter()
  sizes = json.loads(sys.argv[2])
  loaded = dataclasses.replace(
      loaded,
      config=dataclasses.replace(loaded.config, dtype=sizes.pop("dtype")),
  )
  config = dataclasses.replace(
      loaded.config,
      execution=Execution(
          kernels=sizes.pop("kernels"),
          decode_attention=DECODE_ATTENTIONS[sizes.pop("decode_attention")],
      ),
  )
  engine = Engine(config, loaded.params, 0, **sizes)
  asyncio.run(_warm(engine))
  worker = Worker(engine)
  commands: dict[str, pipe.Command] = {
      "generate": worker.generate,
      "converse": worker.converse,
  }
  if len(sys.argv) > 3:
    steps = Steps(loaded, engine, worker.sample, json.loads(sys.argv[3]))
    steps.step()
    commands["step"] = steps.step
  wire.serve(commands, compiled=time.perf_counter() - start)


if __name__ == "__main__":
  main()
