"""What the bench of rollouts ahead reads from a run's metrics."""

import pytest

from experiments.bench import overlap


def row(step, *, seconds, wait, **more):
  return {
      "step": step,
      "seconds/step": seconds,
      "seconds/wait": wait,
      "seconds/rollout": 3.0,
      "staleness/main": 1.0,
      "staleness/researcher": 0.0,
      "staleness_mean/main": 0.5,
      **more,
  }


def test_evaluations_and_compiling_do_not_count_but_what_waits_for_them_does():
  rows = [
      row(0, seconds=99.0, wait=50.0),
      row(1, seconds=9.0, wait=5.0),
      row(2, seconds=4.0, wait=0.5),
      row(3, seconds=24.0, wait=0.5, **{"seconds/evaluate": 20.0}),
      row(4, seconds=7.0, wait=3.5),  # nothing ran ahead of the evaluation
  ]
  found = overlap.figures(rows)
  assert found["steps_an_hour"] == pytest.approx(3600 * 3 / 15)
  assert found["step"] == 4.0 and found["rest"] == 3.5
  assert found["rollout"] == 3.0
  assert (found["oldest"], found["age"]) == (1.0, 0.5)
  with pytest.raises(ValueError, match="2 steps, allowed: over 2"):
    overlap.figures(rows[:2])
