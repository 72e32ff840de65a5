"""Teams as data: which roles there are, what each may use and spend."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
RESERVED = frozenset({"answer", "task", "result", "end"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
  """One place in the team.

  Attributes:
    name: lower-case identifier; also how parents address it.
    policy: name of the policy whose weights it uses.
    prompt: what its system message says first; may be empty.
    tools: names of the tools it may use.
    calls: names of the roles it may call.
    max_turns: turns of one call, the final answer included.
    max_new_tokens: tokens of one turn.
    max_context: tokens of the whole stream, prompt and results included.
    max_calls: child calls of one call; 0 exactly where `calls` is empty.
    trainable: whether its trajectories train its policy.
    attempts: how often each sub-task it is given is tried; the caller sees the
      first attempt, and the others are there to be compared with it.
  """

  name: str
  policy: str
  prompt: str
  tools: tuple[str, ...]
  calls: tuple[str, ...]
  max_turns: int
  max_new_tokens: int
  max_context: int
  max_calls: int
  trainable: bool
  attempts: int

  def __post_init__(self) -> None:
    """Checks names and budgets."""
    _check_identifier("name", self.name)
    if not self.policy:
      raise ValueError(f"role {self.name!r}: policy must not be empty")
    names = [*self.tools, *self.calls]
    for name in names:
      _check_identifier(f"role {self.name!r}: tools and calls", name)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
      raise ValueError(f"role {self.name!r}: tools and calls repeat {twice}")
    self._check_budgets()

  def _check_budgets(self) -> None:
    """Raises for a budget under which no call could answer."""
    for field in ("max_turns", "max_new_tokens", "max_context", "attempts"):
      _check_at_least(self, field, 1)
    _check_at_least(self, "max_calls", 1 if self.calls else 0)
    if self.max_calls and not self.calls:
      raise ValueError(
          f"role {self.name!r}: max_calls is {self.max_calls} but calls is "
          "empty; it must be 0"
      )
    if self.max_new_tokens >= self.max_context:
      raise ValueError(
          f"role {self.name!r}: max_new_tokens is {self.max_new_tokens}, must "
          f"be less than max_context, {self.max_context}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Team:
  """The static tree of roles.

  Attributes:
    roles: every role; kept with the root first, otherwise as given.
    root: name of the role that is asked the task's question.
  """

  roles: tuple[Role, ...]
  root: str

  def __post_init__(self) -> None:
    """Checks references, and that calls form a tree below the root."""
    by_name = {role.name: role for role in self.roles}
    if len(by_name) != len(self.roles):
      names = [role.name for role in self.roles]
      raise ValueError(f"roles: names must differ, got {names}")
    if self.root not in by_name:
      raise ValueError(
          f"root: unknown role {self.root!r}; roles are {sorted(by_name)}"
      )
    for role in self.roles:
      unknown = sorted(set(role.calls) - set(by_name))
      if unknown:
        raise ValueError(
            f"role {role.name!r}: calls names unknown roles {unknown}; roles "
            f"are {sorted(by_name)}"
        )
    reached = _walk(by_name, self.root, ())
    unreachable = sorted(set(by_name) - reached)
    if unreachable:
      raise ValueError(f"roles: {unreachable} cannot be reached from the root")
    if by_name[self.root].attempts > 1:
      raise ValueError(
          f"role {self.root!r}: attempts is {by_name[self.root].attempts}, must"
          " be 1 for the root, of which there are K rollouts"
      )
    rest = (role for role in self.roles if role.name != self.root)
    object.__setattr__(self, "roles", (by_name[self.root], *rest))

  def __getitem__(self, name: str) -> Role:
    """The role of that name."""
    for role in self.roles:
      if role.name == name:
        return role
    raise KeyError(name)

  def index(self, name: str) -> int:
    """Position of a role in `roles`; the root's is 0."""
    return [role.name for role in self.roles].index(name)

  def most_calls(self, name: str) -> int:
    """The most calls a role can have in one rollout; 1 for the root.

    Args:
      name: the role.

    Returns:
      The sum over its callers of their own most calls times `max_calls`, each
      tried as often as the role's `attempts` say.
    """
    if name == self.root:
      return 1
    return self[name].attempts * sum(
        self.most_calls(role.name) * role.max_calls
        for role in self.roles
        if name in role.calls
    )

  def without_attempts(self) -> Team:
    """The same team, in which every sub-task is tried once."""
    roles = (dataclasses.replace(role, attempts=1) for role in self.roles)
    return Team(roles=tuple(roles), root=self.root)

  def cast(self, played: Mapping[str, str]) -> Team:
    """The same team, in which other policies play some roles.

    Args:
      played: by role, the policy that plays it in place of its own.

    Returns:
      The team.

    Raises:
      ValueError: there is no such role.
    """
    self._check_known(played)
    roles = (
        dataclasses.replace(role, policy=played.get(role.name, role.policy))
        for role in self.roles
    )
    return Team(roles=tuple(roles), root=self.root)

  def without(self, absent: Collection[str]) -> Team:
    """The same team, in which some roles are not there: nobody may call them.

    Args:
      absent: their names.

    Returns:
      The team; who has nobody left to call may make no calls.

    Raises:
      ValueError: there is no such role, one is the root, or another one could
        not be reached without them.
    """
    self._check_known(absent)
    if self.root in absent:
      raise ValueError(f"role {self.root!r}: is the root, and must be there")
    roles = []
    for role in self.roles:
      calls = tuple(name for name in role.calls if name not in absent)
      most = role.max_calls if calls else 0
      if role.name not in absent:
        roles.append(dataclasses.replace(role, calls=calls, max_calls=most))
    return Team(roles=tuple(roles), root=self.root)

  def _check_known(self, names: Collection[str]) -> None:
    """Raises where there is no role of a name."""
    known = [role.name for role in self.roles]
    if unknown := sorted(set(names) - set(known)):
      raise ValueError(f"unknown roles {unknown}; there are {known}")

  def most_open(self, policy: str) -> int:
    """The most calls of a policy that are open at once in one rollout.

    A caller waits, its stream kept, while the one call that it made runs.

    Args:
      policy: its name.

    Returns:
      How often it occurs on the way from the root down where that is most.
    """

    def below(role: Role) -> int:
      deepest = max((below(self[name]) for name in role.calls), default=0)
      return deepest + (role.policy == policy)

    return below(self[self.root])

  @property
  def policies(self) -> tuple[str, ...]:
    """The names of the policies used, each once, in order of the roles."""
    return tuple(dict.fromkeys(role.policy for role in self.roles))


def _check_identifier(field: str, name: str) -> None:
  """Raises unless the name is an identifier no protocol reserves."""
  if not NAME.fullmatch(name) or name in RESERVED:
    raise ValueError(
        f"{field}: {name!r} must match {NAME.pattern} and not be one of "
        f"{sorted(RESERVED)}"
    )


def _check_at_least(role: Role, field: str, least: int) -> None:
  """Raises unless the budget is a whole number of at least `least`."""
  value = getattr(role, field)
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(
        f"role {role.name!r}: {field} is {value!r}, must be a whole number "
        f"of at least {least}"
    )


def _walk(
    roles: Mapping[str, Role], name: str, above: Sequence[str]
) -> set[str]:
  """The roles at and below one, raising where a role calls itself."""
  if name in above:
    cycle = " -> ".join([*above[list(above).index(name) :], name])
    raise ValueError(f"role {name!r}: calls form a cycle, {cycle}")
  below = (_walk(roles, c, [*above, name]) for c in roles[name].calls)
  return {name}.union(*below)
