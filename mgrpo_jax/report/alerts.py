"""What goes wrong in the training of teams, and the metric that shows it.

docs/practice.md says of each what it looks like and what to change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """A sign of trouble: a metric beyond a limit.

  Attributes:
    name: of the trouble, as docs/practice.md calls it.
    metric: family of the metric; each of its keys is looked at.
    above: the largest value that is no trouble; inf where none is too large.
    below: the smallest value that is no trouble; -inf likewise.
  """

  name: str
  metric: str
  above: float = math.inf
  below: float = -math.inf


RULES = (
    Rule(name="no delegation", metric="calls", below=0.05),
    Rule(name="call spam", metric="refused", above=0.1),
    Rule(name="format collapse", metric="format", below=0.5),
    Rule(name="echo", metric="echoed", above=0.5),
    Rule(name="flat groups", metric="flat_groups", above=0.8),
    Rule(name="clipped", metric="clip_fraction", above=0.5),
    Rule(name="stale data", metric="stale", above=0.0),
    Rule(name="late rollouts", metric="late", above=0.05),
    Rule(name="sampler drift", metric="logprob_gap_mean", above=0.05),
    Rule(name="outcome idle", metric="outcome_share", below=0.05),
    Rule(name="grade idle", metric="grade_share", below=0.05),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alert:
  """A rule that a step broke.

  Attributes:
    name: of the trouble.
    key: role or policy, empty where the metric has none.
    value: of the metric.
  """

  name: str
  key: str
  value: float

  @property
  def text(self) -> str:
    """What the progress line says."""
    return f"{self.name} {self.key}".strip() + f" {self.value:.2g}"


def find(values: Mapping[str, float]) -> tuple[Alert, ...]:
  """Looks for trouble in the metrics of a step.

  Args:
    values: metrics by name; rules about others are passed over.

  Returns:
    Alerts, in the order of the rules.
  """
  alerts = []
  for rule in RULES:
    for name, value in values.items():
      family, _, key = name.partition("/")
      if family == rule.metric and not rule.below <= value <= rule.above:
        alerts.append(Alert(name=rule.name, key=key, value=value))
  return tuple(alerts)
