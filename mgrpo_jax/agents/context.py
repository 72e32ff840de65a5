"""What agent calls share, and where in a rollout a call stands."""

import collections
import dataclasses
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from mgrpo_jax.agents.activity import Activity
from mgrpo_jax.agents.actor import Actor
from mgrpo_jax.agents.protocol import Function, Pieces, delegation
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.agents.tools import Tool
from mgrpo_jax.types import Trajectory

# Makes a call in another job: role, request, context.
Elsewhere = Callable[
    [Role, str, "CallContext"], Coroutine[Any, Any, Trajectory]
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
  """Everything that agent calls share; checked when built.

  Attributes:
    team: the roles.
    actors: by policy.
    tools: by name.
    temperature: of sampling; 0 is greedy.
    turn_deadline: seconds that one turn may take to be sampled, waiting for
      a free slot included; beyond it the call is FAILED.
    max_attempts: how often a FAILED call is made in all.
    counters: events since the start (`calls`, `turns`, `retries`, `failed`,
      `malformed_turns`, `cut_turns`, `refused_calls`, `tool_errors`,
      `tool_timeouts`, `cut_results`, `long_requests`, `late_turns`); kept up
      to date in place.
    activity: what the calls under way wait for; likewise.
    elsewhere: by policy that another job samples, makes the call there; it has
      no actor here.
  """

  team: Team
  actors: Mapping[str, Actor]
  tools: Mapping[str, Tool]
  temperature: float
  turn_deadline: float
  max_attempts: int
  counters: collections.Counter[str] = dataclasses.field(
      default_factory=collections.Counter
  )
  activity: Activity = dataclasses.field(default_factory=Activity)
  elsewhere: Mapping[str, Elsewhere] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    """Checks that all names are known and every prompt fits."""
    lost = sorted({*self.team.policies} - {*self.actors, *self.elsewhere})
    if lost:
      raise ValueError(f"actors: none for the policies {lost}")
    for role in self.team.roles:
      unknown = sorted(set(role.tools) - set(self.tools))
      if unknown:
        raise ValueError(
            f"role {role.name!r}: tools names unknown tools {unknown}; there "
            f"are {sorted(self.tools)}"
        )
      if role.policy not in self.elsewhere:
        self._check_prompt(role)
    if self.turn_deadline <= 0:
      raise ValueError(f"turn_deadline: is {self.turn_deadline}, must be > 0")
    if self.max_attempts < 1:
      raise ValueError(f"max_attempts: is {self.max_attempts}, must be >= 1")
    if self.temperature < 0:
      raise ValueError(f"temperature: is {self.temperature}, must be >= 0")

  def _check_prompt(self, role: Role) -> None:
    """Raises where a role's own prompt leaves no room to say anything."""
    chat = self.actors[role.policy].chat
    length = len(chat.open(self.system(role), ""))
    if length >= role.max_context:
      raise ValueError(
          f"role {role.name!r}: max_context is {role.max_context}, its prompt "
          f"alone takes {length} tokens"
      )

  def functions(self, role: Role) -> dict[str, Function]:
    """What a role may address, by name: its tools, then its child roles."""
    tools = {name: self.tools[name].function for name in role.tools}
    return tools | {name: delegation(name) for name in role.calls}

  def system(self, role: Role) -> Pieces:
    """A role's system message."""
    protocol = self.actors[role.policy].protocol
    return protocol.system(role.prompt, tuple(self.functions(role).values()))


class Ledger:
  """The trajectories of one rollout, in the order of the calls.

  A call takes its place when it begins and fills it when it returns. Calls
  of a rollout happen one after the other, so places and ordinals do not
  depend on what else is running.
  """

  def __init__(self, earlier: Mapping[str, int] | None = None) -> None:
    """Starts empty.

    Args:
      earlier: calls of the rollout that stand in another job's ledger, by
        role; ordinals count on from there.
    """
    self._earlier = dict(earlier or {})
    self._roles: list[str] = []
    self._done: dict[int, Trajectory] = {}
    self.exhausted = False  # a call failed as often as it may

  def begin(self, role: str) -> int:
    """Takes the next place and returns it."""
    self._roles.append(role)
    return len(self._roles) - 1

  def ordinal(self, position: int) -> int:
    """How many earlier calls of the rollout went to the same role."""
    role = self._roles[position]
    before = self._roles[:position].count(role)
    return self._earlier.get(role, 0) + before

  def counts(self) -> dict[str, int]:
    """How many calls of the rollout were begun so far, by role."""
    begun = collections.Counter(self._earlier)
    begun.update(self._roles)
    return dict(begun)

  def finish(self, position: int, trajectory: Trajectory) -> None:
    """Fills a place."""
    self._done[position] = trajectory

  def __len__(self) -> int:
    """Number of calls begun."""
    return len(self._roles)

  def roll_back(self, length: int) -> None:
    """Forgets the calls from a place on: they are about to be repeated."""
    for position in range(length, len(self._roles)):
      self._done.pop(position, None)
    del self._roles[length:]

  def trajectories(self) -> tuple[Trajectory, ...]:
    """All of them, callers before those they called."""
    return tuple(self._done[i] for i in range(len(self._roles)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallContext:
  """Where in the rollout a call happens.

  Attributes:
    environment: what all calls share.
    task_id: the task.
    rollout: index within the task's group.
    seed: of the run, or of this pass over the tasks.
    ledger: of this rollout.
    parent: the caller's place in the ledger; NO_PARENT for the root.
    attempt: which of several attempts at the same sub-task, from 0.
    callers: the calls above and their turns, the root's first.
  """

  environment: Environment
  task_id: str
  rollout: int
  seed: int
  ledger: Ledger
  parent: int
  attempt: int = 0
  callers: tuple[str, ...] = ()
