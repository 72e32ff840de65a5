"""Stages of a run: imitation first, then easy tasks, then hard ones."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """One stretch of a run.

  Attributes:
    name: shown in the progress line and in metrics.
    objective: `imitate` the scripted expert, or `reinforce`.
    steps: how many steps it lasts, >= 0.
    families: of the questions it draws from, `Task.meta['family']`; empty
      for all.
    trained: names of the policies that learn; the others are frozen.
    learning_rate: peak, > 0.
    final_fraction: what is left of the rate at the end of the stage, in
      [0, 1]; it falls along a cosine. 1 keeps the peak.

  Raises:
    ValueError: naming the field that is out of range.
  """

  name: str
  objective: Literal["imitate", "reinforce"]
  steps: int
  families: tuple[str, ...]
  trained: frozenset[str]
  learning_rate: float
  final_fraction: float

  def __post_init__(self) -> None:
    """Checks every field."""
    if self.objective not in ("imitate", "reinforce"):
      raise ValueError(
          f"stage {self.name!r}: objective must be 'imitate' or 'reinforce',"
          f" got {self.objective!r}"
      )
    if self.steps < 0:
      raise ValueError(
          f"stage {self.name!r}: steps must be >= 0, got {self.steps}"
      )
    if not self.learning_rate > 0:
      raise ValueError(
          f"stage {self.name!r}: learning_rate must be > 0, got"
          f" {self.learning_rate}"
      )
    if not 0 <= self.final_fraction <= 1:
      raise ValueError(
          f"stage {self.name!r}: final_fraction must be in [0, 1], got"
          f" {self.final_fraction}"
      )


def num_steps(stages: Sequence[Stage]) -> int:
  """Returns how many steps the whole curriculum lasts."""
  return sum(stage.steps for stage in stages)


def stage_at(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
  """Finds the stage that a step belongs to.

  Args:
    stages: in order.
    step: 0 .. num_steps(stages) - 1.

  Returns:
    The stage, and the step's number within it, from 0.

  Raises:
    ValueError: where no stage has such a step.
  """
  begin = 0
  for stage in stages:
    if begin <= step < begin + stage.steps:
      return stage, step - begin
    begin += stage.steps
  raise ValueError(f"step must be in [0, {begin}), got {step}")


def spans(
    stages: Sequence[Stage], wanted: Callable[[Stage], bool]
) -> tuple[range, ...]:
  """Finds the steps of some stages.

  Args:
    stages: in order.
    wanted: whether a stage is one of them.

  Returns:
    Their steps in order, those of stages that follow each other in one range;
    none is empty.
  """
  found: list[range] = []
  begin = 0
  for stage in stages:
    end = begin + stage.steps
    if stage.steps and wanted(stage):
      if found and found[-1].stop == begin:
        begin = found.pop().start
      found.append(range(begin, end))
    begin = end
  return tuple(found)
