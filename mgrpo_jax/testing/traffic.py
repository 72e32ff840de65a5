"""Rollouts by the thousand, among machines that break and tools that dawdle."""

import asyncio
import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax import rollout
from mgrpo_jax.agents.actor import Actor, Moment
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.agents.errors import InfrastructureError
from mgrpo_jax.agents.tools import Memory, Observation, Tool
from mgrpo_jax.types import Completion, Task

_FOR_EVER = 1e6  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trouble:
  """What happens to rollouts; shares are probabilities.

  Attributes:
    tool_seconds: mean of the time that a tool takes more, exponential.
    tool_breaks: share of tool runs that end in an `InfrastructureError`.
    tool_hangs: share that never ends by itself.
    turn_breaks: share of turns that end in an `OSError`, sampled or not.
    leaves: share of rollouts that are cancelled.
    leave_seconds: mean of the time after which they are, exponential.
  """

  tool_seconds: float
  tool_breaks: float
  tool_hangs: float
  turn_breaks: float
  leaves: float
  leave_seconds: float


class Traffic:
  """An environment in trouble, and what became of what was begun in it.

  Attributes:
    environment: the one to use; its counters begin at 0.
    rollouts: how many ended, by the root's status, or `cancelled`.
    requests: how many turns were `asked` for, and ended as `answered`,
      `broken` or `cancelled`.
    tools: how many tools were run.
    released: agent calls that let go of their session, as all do at the end.
  """

  def __init__(
      self, environment: Environment, trouble: Trouble, *, seed: int
  ) -> None:
    """Begins nothing yet.

    Args:
      environment: team, actors and tools that work.
      trouble: what is to go wrong.
      seed: of when it does.
    """
    self.rollouts: collections.Counter[str] = collections.Counter()
    self.requests: collections.Counter[str] = collections.Counter()
    self.tools = 0
    self.released = 0
    self._trouble = trouble
    self._rng = np.random.default_rng(seed)
    self.environment = dataclasses.replace(
        environment,
        actors={n: self._actor(a) for n, a in environment.actors.items()},
        tools={n: self._tool(t) for n, t in environment.tools.items()},
        counters=collections.Counter(),
    )

  @property
  def events(self) -> int:
    """Turns, tool runs and agent calls that were begun."""
    calls = self.environment.counters["calls"]
    return self.requests["asked"] + self.tools + calls

  async def send(self, tasks: Sequence[Task], *, seed: int) -> None:
    """Executes the team once on every task, all at the same time.

    Args:
      tasks: may repeat.
      seed: of the first rollout; the others count on from it.
    """
    rollouts = (self._rollout(t, seed + n) for n, t in enumerate(tasks))
    await asyncio.gather(*rollouts)

  def losses(self) -> list[str]:
    """Says what was begun and has not ended; empty where nothing is open."""
    asked = self.requests["asked"]
    ended = self.requests.total() - asked
    calls = self.environment.counters["calls"]
    found = {
        f"{asked} turns asked for, {ended} ended": asked != ended,
        f"{calls} calls begun, {self.released} ended": calls != self.released,
        f"{len(self.environment.activity)} calls wait": bool(
            len(self.environment.activity)
        ),
    }
    return [text for text, wrong in found.items() if wrong]

  async def _rollout(self, task: Task, seed: int) -> None:
    """One execution of the team; some are cancelled."""
    group = rollout.run_group(
        task, environment=self.environment, num_rollouts=1, seed=seed
    )
    work = asyncio.ensure_future(group)
    seconds = None
    if self._rng.random() < self._trouble.leaves:
      seconds = self._rng.exponential(self._trouble.leave_seconds)
    await asyncio.wait({work}, timeout=seconds)
    if work.cancel():
      await asyncio.wait({work})
    if work.cancelled():
      self.rollouts["cancelled"] += 1
    else:
      self.rollouts[work.result().trajectories[0].status.name] += 1

  def _actor(self, actor: Actor) -> Actor:
    """Breaks now and then, and counts."""

    async def speak(moment: Moment) -> Completion:
      self.requests["asked"] += 1
      end = "broken"
      try:
        completion = await actor.speak(moment)
        if self._rng.random() < self._trouble.turn_breaks:
          raise OSError("the machine broke")
        end = "answered"
        return completion
      except asyncio.CancelledError:
        end = "cancelled"
        raise
      finally:
        self.requests[end] += 1

    def release(session: str) -> None:
      self.released += 1
      actor.release(session)

    return dataclasses.replace(actor, speak=speak, release=release)

  def _tool(self, tool: Tool) -> Tool:
    """Takes longer, breaks and hangs now and then."""

    async def run(arguments: Mapping[str, Any], memory: Memory) -> Observation:
      self.tools += 1
      breaks, hangs = self._rng.random(2)
      await asyncio.sleep(self._rng.exponential(self._trouble.tool_seconds))
      if breaks < self._trouble.tool_breaks:
        raise InfrastructureError("the tool broke")
      if hangs < self._trouble.tool_hangs:
        await asyncio.sleep(_FOR_EVER)
      return await tool.run(arguments, memory)

    return dataclasses.replace(tool, run=run)
