"""Jobs that come and go between stages while the others go on."""

import signal

import jax
import numpy as np
import pytest
from delegating import cast_setup
from test_decoupled import DEADLINE, SEED, Team

from mgrpo_jax.report.writer import read_metrics

STEPS = {"main": range(5), "researcher": range(3), "scout": range(3, 5)}


@pytest.fixture(scope="module")
def teams(tmp_path_factory):
  """A run in one process, and one whose jobs come late and leave early."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CAST", "1")
    whole = Team(tmp_path_factory.mktemp("whole"))
    whole.start("all")
    outcome = whole.finish()["all"]
    apart = Team(tmp_path_factory.mktemp("apart"))
    return whole, apart, outcome, come_and_go(apart)


def come_and_go(team):
  """One job leaves, killed in its last step; then another one is started."""
  team.start("main", "researcher")
  leader = team.running["main"]
  team.wait_for("bucket/steps/2.json")
  team.kill("researcher")
  team.start("researcher")
  summaries = {}
  leaver = team.running["researcher"]
  assert leaver.wait(DEADLINE) == 0, team.log("researcher")
  assert leader.poll() is None  # which has nobody to call now
  assert not (team.bucket / "steps/3.json").exists()
  team.start("scout")
  # In the middle of its first step.
  team.wait_for("scout/calls/step_000003.jsonl")
  team.kill("scout")
  team.start("scout")
  summaries |= team.finish()
  assert team.running["main"] is leader
  return summaries


@pytest.mark.parametrize("policy", STEPS)
def test_parameters_are_those_of_one_process_bit_for_bit(teams, policy):
  whole, apart, _, _ = teams
  expected = whole.weights("all", policy)
  actual = apart.weights(policy, policy)
  assert all(map(np.array_equal, expected, actual))
  begun = jax.tree.leaves(cast_setup(seed=SEED).policies[policy].params)
  assert not all(map(np.array_equal, begun, actual))
