import dataclasses

import numpy as np

from mgrpo_jax import advantages, statistics
from mgrpo_jax.comparison import alike
from mgrpo_jax.credit import Assignment, Credits
from mgrpo_jax.packing import Credit
from mgrpo_jax.report import alerts
from mgrpo_jax.rewards import Scores
from mgrpo_jax.types import (
    Alignment,
    RolloutGroup,
    Status,
    Task,
    Trajectory,
    Turn,
)

PER_TASK = alike(advantages.per_task)


def trajectory(role, status=Status.COMPLETED, turns=1, sampled=2, version=3):
  turn = Turn(kind="answer", name="", argument="", result="", page="")
  return Trajectory(
      task_id="t",
      rollout=0,
      role=role,
      call=0,
      parent=-1,
      request="",
      tokens=np.zeros(4, np.int32),
      loss_mask=np.array([0] * (4 - sampled) + [1] * sampled, np.float32),
      sampler_logprobs=np.zeros(4, np.float32),
      version_min=version,
      version_max=version,
      status=status,
      turns=(turn,) * turns,
      result_text="",
      seconds=0.0,
  )


def group(*trajectories, num_rollouts=2):
  zeros = np.zeros(len(trajectories), np.int32)
  task = Task(
      id="t",
      question="?",
      answers=("!",),
      stage="easy",
      hops=1,
      evidence=(),
      meta={},
  )
  return RolloutGroup(
      task=task,
      num_rollouts=num_rollouts,
      trajectories=trajectories,
      rollout=zeros,
      parent=zeros,
      role=zeros,
      call=zeros,
  )


def scores(total, weight):
  total = np.array(total, np.float32)
  return Scores(
      format=np.ones_like(total),
      correct=total,
      expert=total / 2,
      overlong=np.zeros_like(total),
      total=total,
      weight=np.array(weight, np.float32),
  )


def test_a_worked_case():
  one = group(
      trajectory("main", turns=2),
      trajectory("main", status=Status.TRUNCATED, turns=4, sampled=4),
      trajectory("helper", status=Status.FAILED),
  )
  found = statistics.of_role(
      [one], [scores([1.0, 0.0, 9.0], [1, 1, 0])], "main"
  )
  assert found == {
      "calls/main": 1.0,
      "failed/main": 0.0,
      "turns/main": 3.0,
      "sampled/main": 3.0,
      "echoed/main": 0.0,
      "completed/main": 0.5,
      "truncated/main": 0.5,
      "malformed/main": 0.0,
      "counted/main": 2.0,
      "reward/main": 0.5,
      "format/main": 1.0,
      "correct/main": 0.5,
      "expert/main": 0.25,
      "overlong/main": 0.0,
  }


def test_reports_that_say_the_request_again_are_counted():
  calls = [
      dataclasses.replace(
          trajectory("main"), request="Capital of Peru?", result_text=report
      )
      for report in ("the capital of Peru", "Lima", "")
  ]
  found = statistics.of_role(
      [group(*calls)], [scores([0] * 3, [1] * 3)], "main"
  )
  assert found["echoed/main"] == 1 / 3


def test_failed_calls_are_counted_and_nothing_else_is_said_of_them():
  one = group(trajectory("helper", status=Status.FAILED))
  found = statistics.of_role([one], [scores([0.0], [0])], "helper")
  assert found == {"calls/helper": 0.5, "failed/helper": 1.0}


def test_alignment_counts_what_it_drops_and_flat_groups():
  alignment = Alignment(
      index=np.zeros((3, 2, 2), np.int32),
      weight=np.array([[[1, 1], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]),
      num_calls=np.array([[4, 1], [2, 3], [0, 0]]),
  )
  rewards = np.array(
      [[[0.0, 1.0], [0.5, 99.0]], [[0.7, 0.7], [0.7, 0.7]], [[1, 2], [3, 4]]]
  )
  assignment = Assignment(
      credits=(),
      alignment=alignment,
      rewards=rewards,
      # What a slot of weight 0 holds says nothing.
      advantages=np.array(
          [[[-1, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]]
      ),
  )
  found = statistics.of_assignment("r", assignment, PER_TASK)
  assert found["dropped/r"] == (4 - 2) + (3 - 2)
  assert found["flat_groups/r"] == 0.5  # of two groups with calls
  np.testing.assert_allclose(
      found["spread/r"], np.std([0.0, 1.0, 0.5]) / 2, rtol=1e-12
  )


def test_what_is_compared_with_nothing_has_no_flat_groups():
  # A critic's step in which every call earned 0: rewards are the advantages.
  nothing = np.zeros((2, 2, 1), np.float32)
  assignment = Assignment(
      credits=(),
      alignment=Alignment(
          index=nothing.astype(np.int32),
          weight=nothing + 1,
          num_calls=np.ones((2, 2), np.int32),
      ),
      rewards=nothing,
      advantages=nothing,
  )
  credits = Credits(by_policy={}, advantages=(), assignments={"r": assignment})
  plain = statistics.of_credits(credits, alike(advantages.plain), {})
  assert plain == {"dropped/r": 0.0, "spread/r": 0.0}
  assert alerts.find(plain) == ()
  compared = statistics.of_credits(credits, PER_TASK, {})
  assert compared == plain | {"flat_groups/r": 1.0}
  assert [alert.text for alert in alerts.find(compared)] == ["flat groups r 1"]


def test_staleness_is_the_age_of_the_oldest_token():
  credits = [
      Credit(
          trajectory=trajectory("main", version=v), advantage=1.0, weight=1.0
      )
      for v in (5, 3)
  ]
  versions = {"main": [1, 4, 5]}  # none was published after step 2 and 3
  assert statistics.staleness({"main": credits}, versions) == {
      "staleness/main": 2.0,
      "staleness_mean/main": 1.0,
      "aged/0": 0.5,
      "aged/2": 0.5,
  }
  silent = dataclasses.replace(
      trajectory("main", version=-1), loss_mask=np.zeros(3, np.float32)
  )
  unsampled = Credit(trajectory=silent, advantage=1.0, weight=1.0)
  found = statistics.staleness({"main": [*credits, unsampled]}, versions)
  assert found["staleness/main"] == 2.0 and found["aged/2"] == 0.5
  assert statistics.staleness({"main": []}, versions) == {
      "staleness/main": 0.0,
      "staleness_mean/main": 0.0,
  }


def test_a_role_that_nobody_called_has_no_spread_to_speak_of():
  nothing = np.zeros((2, 2, 2), np.float32)
  assignment = Assignment(
      credits=(),
      alignment=Alignment(
          index=nothing.astype(np.int32),
          weight=nothing,
          num_calls=np.zeros((2, 2), np.int32),
      ),
      rewards=nothing,
      advantages=nothing,
  )
  found = statistics.of_assignment("r", assignment, PER_TASK)
  assert found == {"dropped/r": 0.0}
