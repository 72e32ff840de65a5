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
    groups: the rollouts, one a question.
  """

  overall: Accuracy
  by_family: Mapping[str, Accuracy]
  groups: tuple[RolloutGroup, ...]

  def metrics(self, split: str) -> dict[str, float]:
    """The accuracy on a split and its interval, by metric."""
    low, high = self.overall.interval
    return {
        f"accuracy/{split}": self.overall.share,
        f"accuracy_low/{split}": low,
        f"accuracy_high/{split}": high,
        f"questions/{split}": float(self.overall.n),
    }


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
  found: dict[str, list[bool | None]] = collections.defaultdict(list)
  for group in groups:
    family = str(group.task.meta.get("family", ""))
    found[family].append(_correct(group, rules))
  return Evaluation(
      overall=_accuracy([one for part in found.values() for one in part]),
      by_family={name: _accuracy(found[name]) for name in sorted(found)},
      groups=tuple(groups),
  )


def _accuracy(found: Sequence[bool | None]) -> Accuracy:
  """Counts what was right, and what could not be told."""
  failed = sum(one is None for one in found)
  return Accuracy(
      correct=sum(one is True for one in found),
      n=len(found) - failed,
      failed=failed,
  )


def _correct(group: RolloutGroup, rules: Rules) -> bool | None:
  """Whether the root's answer is right; None if that could not be told."""
  if any(t.status == Status.FAILED for t in group.trajectories):
    return None
  root = group.trajectories[0]
  if root.status != Status.COMPLETED:
    return False
  return rules.correct(root.result_text, group.task.answers)
