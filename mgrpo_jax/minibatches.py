"""Which of a step's credits make each of its updates."""

from collections.abc import Sequence

from mgrpo_jax import objectives
from mgrpo_jax.packing import Credit
from mgrpo_jax.types import RolloutGroup


def split(
    credits: Sequence[Credit], groups: Sequence[RolloutGroup], parts: int
) -> list[list[Credit]]:
  """Deals the tasks of a step out to its updates.

  Args:
    credits: of one policy.
    groups: of the step, in the order of their tasks.
    parts: updates, >= 1.

  Returns:
    The credits of every update; all of a task's are in one.
  """
  part_of = {group.task.id: b % parts for b, group in enumerate(groups)}
  found: list[list[Credit]] = [[] for _ in range(parts)]
  for one in credits:
    found[part_of[one.trajectory.task_id]].append(one)
  return found


def with_gradient(
    credits: Sequence[Credit], objective: objectives.Objective
) -> list[Credit]:
  """Leaves out what cannot move the policy; denominators still count it.

  Args:
    credits: of one update.
    objective: what is minimised.

  Returns:
    Those that are packed.
  """
  if isinstance(objective, objectives.PolicyLoss) and objective.only_advantage:
    return [one for one in credits if one.advantage != 0]
  return list(credits)
