"""Who plays which role in which stage: from a config to a team for each."""

import contextlib
from collections.abc import Iterator, Sequence

import ml_collections

from experiments import checks
from mgrpo_jax.agents.team import Team
from mgrpo_jax.tasks.curriculum import Stage


def build(config: ml_collections.ConfigDict, team: Team) -> dict[str, Team]:
  """Builds the teams of stages that are cast otherwise than the recipe's.

  Args:
    config: the whole recipe.
    team: of the recipe.

  Returns:
    Teams by name of stage, of the curriculum's; those that change nothing are
    not among them.

  Raises:
    ValueError: a role or policy is unknown, or cannot be there or away; names
      the key.
  """
  made = {}
  for name, stage in config.stages.items():
    with checks.inside(f"stages.{name}.without"):
      there = team.without(stage.without)
    _check_roles(config, name, there)
    if name in config.curriculum and (stage.cast or stage.without):
      made[name] = there.cast(stage.cast.to_dict())
  return made


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
  """Says of every ValueError that it is about a stage's team.

  Args:
    name: of the stage.

  Yields:
    Nothing.
  """
  try:
    yield
  except ValueError as error:
    raise ValueError(f"config.stages.{name}, as it is cast: {error}") from error


def check(
    config: ml_collections.ConfigDict, team: Team, stages: Sequence[Stage]
) -> None:
  """Checks that who is cast comes to play, where stages are cast at all.

  Args:
    config: the whole recipe.
    team: of the recipe.
    stages: the curriculum.

  Raises:
    ValueError: a policy or role is in no stage that has steps; names the key.
  """
  casts = build(config, team)
  if not casts:
    return
  teams = [casts.get(one.name, team) for one in stages if one.steps]
  plays = {policy for one in teams for policy in one.policies}
  for role in team.roles:
    key = f"config.team.roles.{role.name}"
    if not any(role.name in [r.name for r in one.roles] for one in teams):
      raise ValueError(f"{key}: the role is in no stage that has steps")
    if role.policy not in plays:
      raise ValueError(
          f"{key}.policy: {role.policy!r} plays in no stage that has steps;"
          " config.stages.NAME.cast gives its roles to others"
      )
  for name in casts:
    for role, policy in config.stages[name].cast.items():
      if policy not in plays:
        raise ValueError(
            f"config.stages.{name}.cast.{role}: {policy!r} plays in no stage"
            " that has steps"
        )


def _check_roles(
    config: ml_collections.ConfigDict, name: str, team: Team
) -> None:
  """Raises where a stage says something of roles that it cannot."""
  stage, there = config.stages[name], [role.name for role in team.roles]
  known = sorted({*config.policies.keys(), *config.symbolic.keys()})
  for role, policy in stage.cast.to_dict().items():
    key = f"config.stages.{name}.cast.{role}"
    if role not in there:
      raise ValueError(
          f"{key}: no role {role!r} in this stage, allowed: {', '.join(there)}"
      )
    if policy not in known:
      raise ValueError(
          f"{key}: {policy!r} is not in config.policies or config.symbolic,"
          f" which have {known}"
      )
  for role in stage.reward:
    if role not in there:
      raise ValueError(
          f"config.stages.{name}.reward.{role}: config.stages.{name}.without"
          f" has {role!r}: nobody plays it"
      )
