"""Jobs that come and go between stages while the others go on."""

import jax
import numpy as np
import pytest
import test_async_run
from delegating import cast_setup
from test_decoupled import DEADLINE, SEED, Team

from mgrpo_jax.report.writer import read_metrics

STEPS = {"main": range(5), "researcher": range(3), "scout": range(3, 5)}


@pytest.fixture(scope="module")
def teams(tmp_path_factory):
  """A run in one process, one whose jobs come and go, and one that breaks."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CAST", "3")  # who leaves answers a last look at dev
    made = {
        name: Team(tmp_path_factory.mktemp(name))
        for name in ("whole", "apart", "broken")
    }
    made["whole"].start("all")
    summaries = {"whole": made["whole"].finish()}
    summaries["apart"] = come_and_go(made["apart"])
    patch.setenv("CAST", "4")  # nothing is asked between the stages
    summaries["broken"] = break_down(made["broken"])
  return made, summaries


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
  """A run whose rollouts are a step ahead of training where they may."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CAST", "4")
    patch.setenv("STALENESS", "1")
    team = Team(tmp_path_factory.mktemp("stale"))
    return team, break_down(team)


def come_and_go(team):
  """One job leaves, killed in its last step; then another one is started."""
  team.start("main", "researcher")
  leader = team.running["main"]
  team.wait_for("bucket/steps/2.json")
  team.kill("researcher")
  team.start("researcher")
  team.running["researcher"].wait(DEADLINE)  # `finish` sees that all was well
  assert leader.poll() is None  # it waits for who is to come
  assert not (team.bucket / "steps/3.json").exists()
  team.start("scout")
  # In the middle of its first step.
  team.wait_for("scout/calls/step_000003.jsonl")
  team.kill("scout")
  team.start("scout")
  found = team.finish()
  assert team.running["main"] is leader  # the process that it was
  return found


def break_down(team):
  """All begin at once; the leader is killed before and behind the change."""
  team.start("main", "researcher", "scout")
  team.wait_for("bucket/steps/2.json")
  team.kill("main", "researcher")
  team.start("main")
  team.wait_for("bucket/steps/3.json")  # nobody waits for who has left
  team.start("researcher")  # it finds the steps that it has yet to take
  team.kill("main", "scout")
  team.start("main", "scout")
  return team.finish()


@pytest.mark.parametrize("name", ["apart", "broken"])
@pytest.mark.parametrize("policy", STEPS)
def test_parameters_are_those_of_one_process_bit_for_bit(teams, name, policy):
  made, _ = teams
  expected = made["whole"].weights("all", policy)
  actual = made[name].weights(policy, policy)
  assert all(map(np.array_equal, expected, actual))
  begun = jax.tree.leaves(cast_setup(seed=SEED).policies[policy].params)
  assert not all(map(np.array_equal, begun, actual))


@pytest.mark.parametrize("name", ["apart", "broken"])
@pytest.mark.parametrize("policy", STEPS)
def test_a_job_makes_the_steps_of_its_stages(teams, name, policy):
  made, summaries = teams
  rows = read_metrics(made[name].root / policy / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(STEPS[policy])
  assert summaries[name][policy]["steps"] == STEPS[policy].stop
  trained = made[name].trained_tasks(policy)
  expected = made["whole"].trained_tasks("all")
  assert trained == {step: expected[step] for step in STEPS[policy]}


@pytest.mark.parametrize("name", ["apart", "broken"])
def test_all_know_how_the_team_began_and_who_stays_how_it_ended(teams, name):
  _, summaries = teams
  expected, found = summaries["whole"]["all"], summaries[name]
  assert found["main"]["eval"] == found["scout"]["eval"] == expected["eval"]
  before = expected["eval"]["before"]
  assert found["researcher"]["eval"] == {"before": before}


def test_the_leader_counts_what_all_have_spent(teams):
  """What of who left, too."""
  _, summaries = teams
  expected = summaries["whole"]["all"]["tokens"]["trained"]
  for name in ("apart", "broken"):
    assert summaries[name]["main"]["tokens"]["trained"] == expected


def test_who_is_to_come_is_waited_for_by_name(teams):
  made, _ = teams
  log = made["apart"].log("main")
  assert "job of policy 'scout' was started again" in log
  assert "AbsentError" not in log


@pytest.mark.parametrize("policy", STEPS)
def test_jobs_out_of_step_change_the_cast_and_train_all_once(
    teams, stale, policy
):
  made, summaries = stale
  rows = read_metrics(made.root / policy / "metrics.jsonl")
  ages = test_async_run.check_ages(made.root / policy, rows, (policy,))
  assert max(ages) == 1 or policy == "scout"  # of whom nothing was ahead
  assert [row["step"] for row in rows] == list(STEPS[policy])
  assert summaries[policy]["steps"] == STEPS[policy].stop
  expected = teams[0]["whole"].trained_tasks("all")
  trained = made.trained_tasks(policy)
  assert trained == {step: expected[step] for step in STEPS[policy]}
