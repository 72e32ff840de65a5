r"""How thousands of agent calls at once bear trouble, and what they cost.

    python -m experiments.bench.concurrency [--calls=2000] [--minutes=0] \
        [--config=configs/quickstart.py] [--json=concurrency.json]

Rollouts of the recipe's team are begun all at once, on its real engines, and
again in waves until the minutes are over (one wave at least). Tools take 0.2 s
longer on average, break (2%) and hang until their deadline (1%), turns break
(1%), and a tenth of the rollouts is cancelled after 10 s on average.

The command fails, with code 1, where something that was begun has not ended, or
a slot is not free when all is over. It prints how the rollouts ended; of each
engine, how long it idled while work waited; of the event loop, events (turns,
tool runs, calls) a second and how late timers come; and how memory grows from
wave to wave. At the end the same number of rollouts is played by scripts in
place of engines, which shows what the event loop can do at most.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import logging
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np
import psutil

from experiments import recipe
from mgrpo_jax import store
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.agents.protocol import Action, answer
from mgrpo_jax.resources import Resources, open_resources
from mgrpo_jax.sampler import warming
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.generate import drawing
from mgrpo_jax.testing.team import chat_of, environment, small_team
from mgrpo_jax.testing.traffic import Traffic, Trouble

TROUBLE = Trouble(
    tool_seconds=0.2,
    tool_breaks=0.02,
    tool_hangs=0.01,
    turn_breaks=0.01,
    leaves=0.1,
    leave_seconds=10.0,
)
NO_TROUBLE = Trouble(
    tool_seconds=0.0,
    tool_breaks=0.0,
    tool_hangs=0.0,
    turn_breaks=0.0,
    leaves=0.0,
    leave_seconds=1.0,
)
_TURN_DEADLINE = 3600.0  # seconds; the queue for slots is long by intent
_WARM_UP = 600.0  # seconds
_TICK = 0.05  # seconds between looks at the loop's own delay


class Lateness:
  """How late the event loop wakes who sleeps; use within `async with`."""

  def __init__(self) -> None:
    """Measures nothing yet."""
    self.seconds: list[float] = []

  async def __aenter__(self) -> Lateness:
    """Begins to sleep and wake."""
    self._task = asyncio.create_task(self._tick())
    return self

  async def __aexit__(self, *exception: object) -> None:
    """Ends it."""
    self._task.cancel()
    await asyncio.wait({self._task})

  async def _tick(self) -> None:
    """Sleeps and wakes."""
    while True:
      due = time.perf_counter() + _TICK
      await asyncio.sleep(_TICK)
      self.seconds.append(time.perf_counter() - due)


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
  """Sends waves of rollouts to the engines of a recipe.

  Args:
    arguments: of the command.

  Returns:
    What was found.
  """
  path = pathlib.Path(arguments.config)
  name = ".".join(path.with_suffix("").parts)
  setup = recipe.build(importlib.import_module(name).get_config())
  with tempfile.TemporaryDirectory() as folder:
    async with open_resources(setup, store.open_folder(folder)) as resources:
      tasks = setup.tasks[setup.stages[-1].name]
      await warming.warm_up(
          resources.own_engines(), deadline=_WARM_UP, tell=lambda _: None
      )
      warm = Traffic(resources.training, NO_TROUBLE, seed=0)
      await warm.send(tasks[: setup.tasks_per_step], seed=0)
      return await _waves(resources, tasks, arguments)


async def _waves(
    resources: Resources, tasks: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
  """Waves of traffic until the time is over."""
  patient = dataclasses.replace(
      resources.training, turn_deadline=_TURN_DEADLINE
  )
  traffic = Traffic(patient, TROUBLE, seed=1)
  memory = [(0.0, _rss())]
  before = {n: e.stats()["seconds"] for n, e in resources.engines.items()}
  began, sent = time.perf_counter(), 0
  async with Lateness() as lateness:
    while True:
      number = arguments.calls
      chosen = [tasks[(sent + i) % len(tasks)] for i in range(number)]
      await traffic.send(chosen, seed=sent)
      sent += number
      spent = time.perf_counter() - began
      memory.append((spent, _rss()))
      if spent >= 60 * arguments.minutes:
        break
  problems = traffic.losses() + await _leaks(resources)
  counters = traffic.environment.counters
  return {
      "rollouts": sent,
      "at_once": arguments.calls,
      "seconds": round(spent, 1),
      "ended": dict(sorted(traffic.rollouts.items())),
      "agent_calls": counters["calls"],
      "requests": dict(sorted(traffic.requests.items())),
      "tools": traffic.tools,
      "counters": dict(sorted(counters.items())),
      "events_per_second": round(traffic.events / spent, 1),
      "timers_late_ms": _quantiles(lateness.seconds),
      "engines": {
          name: _engine(engine.stats(), before[name])
          for name, engine in resources.engines.items()
      },
      "memory": _growth(memory),
      "problems": problems,
  }


async def _leaks(resources: Resources) -> list[str]:
  """Engines in which something is left; cancelled requests leave by a visit."""
  for _ in range(100):
    left = {
        name: stats["slots"] | {"requests": stats["requests"]}
        for name, stats in (
            (name, engine.stats()) for name, engine in resources.engines.items()
        )
        if stats["slots"]["busy"] + stats["slots"]["idle"] + stats["requests"]
    }
    if not left:
      break
    await asyncio.sleep(0.05)
  return [
      f"engine {name} has not let go: {what}" for name, what in left.items()
  ]


def _engine(stats: dict[str, Any], before: dict[str, float]) -> dict[str, Any]:
  """How an engine spent the time, and on what."""
  spent = {k: v - before[k] for k, v in stats["seconds"].items()}
  share = spent["idle"] / max(sum(spent.values()), 1e-9)
  names = ("visits", "generated", "prefilled", "evictions", "cancelled")
  return {
      "busy_seconds": round(spent["busy"], 2),
      "idle_seconds_while_work_waits": round(spent["idle"], 2),
      "idle_share": round(share, 4),
  } | {name: stats[name] for name in names}


def _growth(memory: list[tuple[float, int]]) -> dict[str, float]:
  """Resident memory by wave, and its slope over the later two thirds."""
  late = memory[len(memory) // 3 :]
  seconds, size = np.asarray(late, float).T
  slope = np.polyfit(seconds, size, 1)[0] * 60 if len(late) > 2 else np.nan
  return {
      "mib_at_start": round(memory[0][1] / 2**20, 1),
      "mib_after_first_wave": round(memory[1][1] / 2**20, 1),
      "mib_at_end": round(memory[-1][1] / 2**20, 1),
      "waves": len(memory) - 1,
      "mib_per_minute_later": round(float(slope) / 2**20, 3),
  }


def _rss() -> int:
  """Resident memory of this process, bytes."""
  return psutil.Process().memory_info().rss


def _quantiles(seconds: list[float]) -> dict[str, float]:
  """How late, in milliseconds."""
  p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1e3
  return {
      "p50": round(float(p50), 2),
      "p99": round(float(p99), 2),
      "max": round(max(seconds) * 1e3, 2),
  }


def scripted() -> Environment:
  """A team that asks, searches and answers at once, without any engine."""
  team = small_team(max_turns=6)
  chat = chat_of(COMPACT, team)
  turns = [
      chat.write(COMPACT.render(action))
      for action in (
          Action(kind="call", name="researcher", arguments={"request": "Peru"}),
          Action(kind="tool", name="search", arguments={"query": "Peru"}),
          Action(kind="tool", name="visit", arguments={"page": "1"}),
          answer("Lima"),
      )
  ]
  generate = drawing(lambda rng: turns[rng.integers(len(turns))])
  return environment(
      {"main": generate, "researcher": generate}, team=team, protocol=COMPACT
  )


async def ceiling(calls: int) -> dict[str, float]:
  """What the event loop does where nothing else takes time.

  Args:
    calls: rollouts at once.

  Returns:
    Events and rollouts a second.
  """
  traffic = Traffic(scripted(), NO_TROUBLE, seed=0)
  began = time.perf_counter()
  await traffic.send([corpus.task()] * calls, seed=0)
  spent = time.perf_counter() - began
  return {
      "rollouts_per_second": round(calls / spent, 1),
      "events_per_second": round(traffic.events / spent, 1),
  }


def main() -> None:
  """Measures and prints; see the module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--calls", type=int, default=2000)
  parser.add_argument("--minutes", type=float, default=0.0)
  parser.add_argument("--json", type=pathlib.Path)
  arguments = parser.parse_args()
  # Thousands of calls fail by intent.
  logging.getLogger("mgrpo_jax.agents.call").setLevel(logging.ERROR)
  result = asyncio.run(measure(arguments))
  result["event_loop_alone"] = asyncio.run(ceiling(arguments.calls))
  text = json.dumps(result, indent=2)
  print(text)
  if arguments.json:
    arguments.json.write_text(text)
  if result["problems"]:
    sys.exit(1)


if __name__ == "__main__":
  main()
