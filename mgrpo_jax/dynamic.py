"""Dynamic sampling: groups that teach nothing are drawn again, within bounds.

DAPO (Yu et al., arXiv 2503.14476, §3.2): a group whose rewards are all equal
has no advantage, and a batch full of them no gradient.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence

import numpy as np

from mgrpo_jax.rewards import Scores
from mgrpo_jax.types import RolloutGroup

Graded = tuple[RolloutGroup, Scores]


def teaches(
    group: RolloutGroup, scores: Scores, roles: Collection[str]
) -> bool:
  """Says whether rewards of a role that learns differ within a group.

  Args:
    group: the K rollouts of a task.
    scores: of the group.
    roles: names of those that learn.

  Returns:
    Whether two calls of one of them that count earned different totals.
  """
  for role in roles:
    earned = scores.total[
        [
            m
            for m, trajectory in enumerate(group.trajectories)
            if trajectory.role == role and scores.weight[m] > 0
        ]
    ]
    if earned.size and np.ptp(earned) > 0:
      return True
  return False


async def resample(
    graded: Sequence[Graded],
    *,
    roles: Collection[str],
    rounds: int,
    draw: Callable[[int], Awaitable[Sequence[Graded]]],
) -> tuple[list[Graded], int]:
  """Replaces groups that teach nothing, each by a new one that does.

  Args:
    graded: groups of a step with their scores.
    roles: names of those that learn.
    rounds: how often new groups are drawn, at most; 0 for never.
    draw: number of tasks -> as many new groups with their scores, or fewer.

  Returns:
    As many groups, in the places of those they replace; and how many were
    replaced. Where rounds do not suffice, the old ones stay.
  """
  kept, replaced = list(graded), 0
  for _ in range(rounds):
    flat = [i for i, one in enumerate(kept) if not teaches(*one, roles)]
    if not flat:
      break
    better = [one for one in await draw(len(flat)) if teaches(*one, roles)]
    for place, one in zip(flat, better, strict=False):
      kept[place] = one
    replaced += len(better)
  return kept, replaced
