import pathlib

import pytest

from mgrpo_jax import metrics
from mgrpo_jax.report import alerts
from mgrpo_jax.report.progress import progress_fields

HEALTHY = {
    "calls/main": 1.0,
    "calls/researcher": 1.7,
    "refused": 0.01,
    "format/main": 0.9,
    "format/researcher": 0.95,
    "echoed/researcher": 0.1,
    "flat_groups/main": 0.3,
    "outcome_share/main": 0.9,
    "outcome_share/researcher": 0.4,
    "grade_share/researcher": 0.5,
    "clip_fraction/main": 0.02,
    "stale": 0.0,
    "late": 0.01,
    "logprob_gap_mean/main": 1e-6,
    "reward/main": 0.5,
}


def test_a_healthy_step_has_no_alert():
  assert alerts.find(HEALTHY) == ()


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("calls/researcher", 0.0, "no delegation researcher 0"),
        ("refused", 0.4, "call spam 0.4"),
        ("format/main", 0.31, "format collapse main 0.31"),
        ("echoed/researcher", 0.75, "echo researcher 0.75"),
        ("flat_groups/main", 1.0, "flat groups main 1"),
        ("outcome_share/main", 0.0, "outcome idle main 0"),
        ("grade_share/researcher", 0.01, "grade idle researcher 0.01"),
        ("clip_fraction/main", 0.7, "clipped main 0.7"),
        ("stale", 3.0, "stale data 3"),
        ("late", 0.125, "late rollouts 0.12"),
        ("logprob_gap_mean/main", 0.2, "sampler drift main 0.2"),
        ("format/main", float("nan"), "format collapse main nan"),
    ],
)
def test_trouble_is_named_with_its_metric(metric, value, text):
  (alert,) = alerts.find(HEALTHY | {metric: value})
  assert alert.text == text
  fields = progress_fields(
      step=3,
      total_steps=9,
      stage="hard",
      values=HEALTHY | {metric: value, "refused": 0.4},
      split="dev",
      seconds_left=float("nan"),
  )
  (shown,) = [words for _, words in fields if words[0].startswith("!")]
  assert ("+1" in shown[0]) == (metric != "refused")


def test_every_rule_is_about_a_metric_and_explained():
  root = pathlib.Path(__file__).parent.parent
  page = (root / "docs" / "practice.md").read_text("utf-8")
  for rule in alerts.RULES:
    assert rule.metric in metrics.METRICS
    assert f"**{rule.name}** (`{rule.metric}" in page
