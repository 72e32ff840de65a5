"""Functions that grade one agent call: its format, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mgrpo_jax import answers
from mgrpo_jax.types import Evidence, Status, Task, Trajectory

Matches = Callable[[str, Sequence[str]], bool]


def answered(trajectory: Trajectory) -> bool:
  """Accepts a call that ended with an answer, whatever came before.

  Args:
    trajectory: the call.

  Returns:
    Whether its format is valid.
  """
  return trajectory.status == Status.COMPLETED and bool(
      trajectory.result_text.strip()
  )


def well_formed(trajectory: Trajectory) -> bool:
  """Accepts a call that answered without a malformed turn.

  Args:
    trajectory: the call.

  Returns:
    Whether its format is valid.
  """
  return answered(trajectory) and all(
      turn.kind != "malformed" for turn in trajectory.turns
  )


def evidence_grade(
    task: Task,
    trajectory: Trajectory,
    *,
    matches: Matches,
    opened_share: float,
) -> float:
  """Grades a call by the evidence it was sent for.

      o · opened the passage + (1 - o) · its report is the passage's answer

  The evidence is the task's look-up whose question is nearest the request, by
  F1 of words; the best grade among equally near ones.

  Args:
    task: with its evidence; without any the grade is 0.
    trajectory: the call.
    matches: text, accepted answers -> whether a report is right, such as
      `answers.matches`, or `answers.mentions` where reports are sentences.
    opened_share: o, what opening alone is worth, in [0, 1].

  Returns:
    0, o, 1 - o or 1.
  """
  grades = [
      opened_share * _opened(trajectory, evidence)
      + (1 - opened_share) * _reports(trajectory, evidence, matches)
      for evidence in nearest_evidence(task, trajectory.request)
  ]
  return max(grades, default=0.0)


def nearest_evidence(task: Task, request: str) -> tuple[Evidence, ...]:
  """Finds what a request asks for among a task's look-ups.

  Args:
    task: with its evidence.
    request: what a caller asked.

  Returns:
    The evidence whose question shares most words with the request (F1), all
    of it where several share equally many.
  """
  nearness = [answers.overlap(request, e.question) for e in task.evidence]
  best = max(nearness, default=0.0)
  return tuple(
      evidence
      for evidence, near in zip(task.evidence, nearness, strict=True)
      if near == best
  )


def overlong(
    trajectory: Trajectory, *, longest: Mapping[str, int], buffer: int
) -> float:
  """Says how deep a call went into the end of its context.

      clip((n - (L - buffer)) / buffer, 0, 1),   n tokens of at most L

  The soft overlong punishment of DAPO (Yu et al., arXiv 2503.14476, Eq. 13),
  of opposite sign.

  Args:
    trajectory: the call.
    longest: L, tokens, by role.
    buffer: tokens at the end of the context that cost, >= 1.

  Returns:
    0 where none of them was used, 1 where all were.
  """
  free = longest[trajectory.role] - buffer
  return min(max((len(trajectory.tokens) - free) / buffer, 0.0), 1.0)


def _reports(
    trajectory: Trajectory, evidence: Evidence, matches: Matches
) -> bool:
  """Says whether a call came back with the answer to a look-up."""
  return trajectory.status == Status.COMPLETED and matches(
      trajectory.result_text, evidence.answers
  )


def _opened(trajectory: Trajectory, evidence: Evidence) -> bool:
  """Says whether the passage was opened, alone or on a page that shows it."""
  return any(
      turn.page == evidence.page
      or evidence.page.startswith(f"{turn.page}#")
      and answers.shows(turn.result, evidence.answers)
      for turn in trajectory.turns
  )
