"""How many held-out questions a team answers correctly."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from mgrpo_jax import rollout
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.metrics import Accuracy
from mgrpo_jax.rewards import Rules
from mgrpo_jax.types import RolloutGroup, Status, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """What an evaluation found.

  Attributes:
    overall: over all questions that no machine failed on.
    by_family: the same by family of questions.
    failed: questions left out because a machine or judge failed.
    groups: the rollouts, one a question.
  """

  overall: Accuracy
  by_family: Mapping[str, Accuracy]
  failed: int
  groups: tuple[RolloutGroup, ...]

  def summary(self) -> dict[str, object]:
    """What `summary.json` says: accuracy, n and the 95% Wilson interval."""
    return self.overall.summary() | {"failed": self.failed}


async def evaluate(
    tasks: Sequence[Task],
    *,
    environment: Environment,
    rules: Rules,
    seed: int,
    max_concurrent: int,
) -> Evaluation:
  """Asks the team every question once.

  Args:
    tasks: the questions.
    environment: team, actors, tools and the temperature.
    rules: what counts as correct.
    seed: of sampling; without effect where the temperature is 0.
    max_concurrent: questions in progress at the same time.

  Returns:
    The evaluation.
  """
  groups = await rollout.run_groups(
      tasks,
      environment=environment,
      num_rollouts=1,
      seed=seed,
      max_concurrent=max_concurrent,
  )
  right: collections.Counter[str] = collections.Counter()
  asked: collections.Counter[str] = collections.Counter()
  failed = 0
  for group in groups:
    correct = _correct(group, rules)
    if correct is None:
      failed += 1
      continue
    family = str(group.task.meta.get("family", ""))
    asked[family] += 1
    right[family] += correct
  return Evaluation(
      overall=Accuracy(correct=right.total(), n=asked.total()),
      by_family={
          family: Accuracy(correct=right[family], n=n)
          for family, n in sorted(asked.items())
      },
      failed=failed,
      groups=tuple(groups),
  )


def _correct(group: RolloutGroup, rules: Rules) -> bool | None:
  """Whether the root's answer is right; None if that could not be told."""
  if any(t.status == Status.FAILED for t in group.trajectories):
    return None
  root = group.trajectories[0]
  if root.status != Status.COMPLETED:
    return False
  return rules.correct(root.result_text, group.task.answers)
