"""Dynamic sampling: groups that teach nothing are drawn again, within bounds.

DAPO (Yu et al., arXiv 2503.14476, §3.2): a group whose rewards are all equal
has no advantage, and a batch full of them no gradient.

Deviation: what has an advantage is asked of the comparison that training uses,
for rewards alone do not tell: a call may inherit its caller's advantage, or be
compared with fewer than all of its role.
"""

from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from mgrpo_jax.credit import Credits
from mgrpo_jax.rewards import Scores
from mgrpo_jax.types import RolloutGroup

Graded = tuple[list[RolloutGroup], list[Scores]]  # of the same groups


def teaches(credits: Credits) -> np.ndarray:
  """Says which groups have a call that learns, with an advantage.

  Args:
    credits: of B groups, compared.

  Returns:
    [B] bool.
  """
  found = np.zeros(len(credits.advantages), bool)
  for assignment in credits.assignments.values():
    found |= assignment.teaches
  return found


async def resample(
    groups: Sequence[RolloutGroup],
    scores: Sequence[Scores],
    *,
    compare: Callable[[Sequence[RolloutGroup], Sequence[Scores]], Credits],
    rounds: int,
    draw: Callable[[int, int], Awaitable[Graded]],
) -> tuple[Graded, int]:
  """Replaces groups that teach nothing, each by a new one that does.

  Args:
    groups: of a step.
    scores: of the groups.
    compare: as many groups in their places, and their scores -> what they are
      trained with; a group's part must not depend on the others.
    rounds: how often new groups are drawn, at most; 0 for never.
    draw: number of tasks, and of the round from 1 -> as many new groups, or
      fewer.

  Returns:
    As many groups and their scores, in the places of those they replace; and
    how many were replaced. Where rounds do not suffice, the old ones stay.
  """
  kept, replaced = list(zip(groups, scores, strict=True)), 0
  if not rounds:
    return _apart(kept), replaced
  flat = np.flatnonzero(~teaches(compare(groups, scores))).tolist()
  for number in range(1, rounds + 1):
    if not flat:
      break
    tried = list(kept)
    new = zip(*await draw(len(flat), number), strict=True)
    for place, one in zip(flat, new, strict=False):
      tried[place] = one
    taught = teaches(compare(*_apart(tried)))
    better = [place for place in flat if taught[place]]
    for place in better:
      kept[place] = tried[place]
    replaced += len(better)
    flat = [place for place in flat if not taught[place]]
  return _apart(kept), replaced


def _apart(graded: Sequence[tuple[RolloutGroup, Scores]]) -> Graded:
  """The groups, and their scores."""
  return [group for group, _ in graded], [scores for _, scores in graded]
