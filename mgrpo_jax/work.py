"""How much a run has done so far, and after how much it is to end."""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class Work:
  """Counts that only grow; kept in checkpoints, written as metrics.

  They include what earlier processes of the run did.

  Attributes:
    generated_tokens: sampled in training rollouts.
    evaluation_tokens: sampled in evaluations.
    trained_tokens: sampled tokens that were trained on.
    rollouts: finished, demonstrations included.
    retried: tasks put back because a machine failed on them, or because their
      rollouts were too old.
    abandoned: tasks that this happened to too often.
    lost: tasks that the expert could not demonstrate.
  """

  generated_tokens: int = 0
  evaluation_tokens: int = 0
  trained_tokens: int = 0
  rollouts: int = 0
  retried: int = 0
  abandoned: int = 0
  lost: int = 0

  def tokens(self) -> dict[str, int]:
    """The tokens, as `summary.json` says them."""
    return {
        "generated": self.generated_tokens,
        "trained": self.trained_tokens,
        "evaluated": self.evaluation_tokens,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """Tokens after which no further step begins, so that runs can be compared.

  A step is never cut: a run spends its budget and up to a step more. The
  curriculum keeps its schedule, so that a stage whose rate falls is left at
  the rate that it has reached.

  Attributes:
    trained_tokens: sampled tokens to train on, all policies together, >= 0; 0
      for as many as the curriculum takes.
    generated_tokens: tokens to sample in training rollouts, likewise.

  Raises:
    ValueError: naming the number that is out of range.
  """

  trained_tokens: int
  generated_tokens: int

  def __post_init__(self) -> None:
    """Checks both numbers."""
    for name, tokens in dataclasses.asdict(self).items():
      if tokens < 0:
        raise ValueError(f"{name} must be >= 0, got {tokens}")

  def limits(self) -> dict[str, float]:
    """Lists the numbers that are not 0, by name of the metric and the count."""
    return {
        name: float(tokens)
        for name, tokens in dataclasses.asdict(self).items()
        if tokens
    }

  def spent(self, work: Work) -> bool:
    """Whether a run has done enough.

    Args:
      work: what it has done.

    Returns:
      Whether it has reached a number that is not 0.
    """
    return any(
        tokens <= getattr(work, name) for name, tokens in self.limits().items()
    )
