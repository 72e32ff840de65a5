"""How much a run has done so far, earlier processes included."""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class Work:
  """Counts that only grow; kept in checkpoints, written as metrics.

  Attributes:
    generated_tokens: sampled in training rollouts.
    evaluation_tokens: sampled in evaluations.
    trained_tokens: sampled tokens that were trained on.
    rollouts: finished, demonstrations included.
    retried: tasks put back because a machine failed on them.
    abandoned: tasks that failed too often to be put back.
    lost: tasks that the expert could not demonstrate.
  """

  generated_tokens: int = 0
  evaluation_tokens: int = 0
  trained_tokens: int = 0
  rollouts: int = 0
  retried: int = 0
  abandoned: int = 0
  lost: int = 0
