"""Jobs out of step, as real processes; killed, nothing lost or doubled."""

import pytest
import test_async_run
import test_decoupled

from mgrpo_jax.report.writer import read_metrics


@pytest.fixture(scope="module")
def team(tmp_path_factory):
  """Two jobs out of step, each killed in the middle."""
  team = test_decoupled.Team(tmp_path_factory.mktemp("jobs"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STALENESS", str(test_async_run.STALENESS))
    facts = go_through(team)
  return team, facts, team.finish()


def go_through(team):
  """Starts and kills jobs; returns the facts that stood before a kill."""
  team.start(*test_decoupled.JOBS)
  # While the leader is ahead of what has been trained on.
  team.wait_for("researcher/calls/step_000004.jsonl")
  team.kill("main")
  team.start("main")
  # Facts that the follower has yet to train on, or to keep.
  team.wait_for("bucket/steps/7.json")
  facts = {}
  for step in range(2, 8):
    path = team.bucket / "steps" / f"{step}.json"
    facts[step] = path.read_bytes()
  team.kill("researcher")
  team.start("researcher")
  return facts


@pytest.mark.parametrize("job", test_decoupled.JOBS)
def test_jobs_out_of_step_train_every_step_once(team, job):
  made, _, summaries = team
  total = test_decoupled.TOTAL
  expected = test_async_run.expected_tasks(
      seed=test_decoupled.SEED, imitated=2, total=total
  )
  assert made.trained_tasks(job) == expected
  rows = read_metrics(made.root / job / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(total))
  assert max(test_async_run.check_ages(made.root / job, rows, (job,))) > 0
  assert summaries[job]["steps"] == total
  assert summaries[job]["eval"] == summaries["main"]["eval"]


def test_what_was_a_fact_stays_one(team):
  made, facts, _ = team
  for step, record in facts.items():
    assert (made.bucket / "steps" / f"{step}.json").read_bytes() == record
