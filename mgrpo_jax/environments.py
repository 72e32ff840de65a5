"""What agent calls share, for every team that a run has."""

import collections
import dataclasses
from collections.abc import Mapping

from mgrpo_jax.agents.activity import Activity
from mgrpo_jax.agents.actor import Actor
from mgrpo_jax.agents.context import Elsewhere, Environment
from mgrpo_jax.agents.team import Team
from mgrpo_jax.plan import Setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
  """How this job makes calls of other jobs' policies, by policy.

  Attributes:
    training: in rollouts.
    testing: in evaluations.
  """

  training: Mapping[str, Elsewhere]
  testing: Mapping[str, Elsewhere]


def build(
    setup: Setup,
    actors: Mapping[str, Actor],
    reach: Reach | None,
    activity: Activity,
) -> dict[Team, tuple[Environment, Environment]]:
  """Builds what agent calls share; events are counted over all teams.

  Args:
    setup: the recipe.
    actors: by policy of this job.
    reach: makes calls of `setup.elsewhere`; None where that is empty.
    activity: what calls wait for, kept up to date.

  Returns:
    By team, what they share in rollouts and in evaluations, in which every
    sub-task is tried once.

  Raises:
    ValueError: a team uses what there is not, or a prompt does not fit.
  """
  sampler = setup.sampler
  reach = reach or Reach(training={}, testing={})
  training = Environment(
      team=setup.team,
      actors=actors,
      tools=setup.tools,
      temperature=sampler.temperature,
      turn_deadline=sampler.turn_deadline,
      max_attempts=sampler.max_attempts,
      activity=activity,
      elsewhere=reach.training,
  )
  testing = dataclasses.replace(
      training,
      temperature=sampler.evaluation_temperature,
      counters=collections.Counter(),
      elsewhere=reach.testing,
  )
  return {
      team: (
          dataclasses.replace(training, team=team),
          dataclasses.replace(testing, team=team.without_attempts()),
      )
      for team in setup.teams
  }
