"""Which of a step's credits make each of its updates, and in which shape."""

import dataclasses
from collections.abc import Sequence

from mgrpo_jax import objectives
from mgrpo_jax.packing import BatchShape, Credit
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


def shape_for(shape: BatchShape, objective: objectives.Objective) -> BatchShape:
  """Says in which shape an objective's credits are packed.

  Args:
    shape: of every micro-batch, as configured.
    objective: what is minimised.

  Returns:
    The same, but sharing nothing where the objective reads context: of tokens
    that trajectories share, each predicts its own.
  """
  if not objective.reads_context:
    return shape
  return dataclasses.replace(shape, least_shared=0)
