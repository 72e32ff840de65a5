"""Whole runs in miniature whose rollouts run ahead; killed for real."""

import dataclasses
import io
import signal

import pytest
import test_resume
import tiny_run

from mgrpo_jax.report import records
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.tasks.pipeline import TaskQueue
from mgrpo_jax.testing.setup import small_setup

STALENESS = 2  # of which evaluations every third step leave 2, 1, 0 steps


def expected_tasks(*, seed, imitated, total):
  """Step -> ids of the tasks that it is to be trained on."""
  found = {}
  setup = small_setup(
      seed=seed, imitation_steps=imitated, steps=total - imitated
  )
  for first, last, stage in (
      (0, imitated, "imitate"),
      (imitated, total, "reinforce"),
  ):
    queue = TaskQueue(setup.tasks[stage], seed=seed, max_retries=3)
    for step in range(first, last):
      taken = queue.take(setup.tasks_per_step)
      found[step] = [task.id for task in taken]
  return found


def calls_of(directory, step):
  """The calls of a step, as they were recorded."""
  path = records.list_steps(directory / "rollouts")[step]
  for one in records.read_step(path).groups:
    yield from one["trajectories"]


def check_ages(directory, rows, policies):
  """No token is older than allowed, and metrics say how old they are."""
  oldest = []
  for row in rows:
    assert row.get("stale", 0) == 0 and row["abandoned"] == 0
    if row["stage"] == "imitate":
      continue
    step = row["step"]
    versions = [
        step - call["version_min"]
        for call in calls_of(directory, step)
        if call["role"] in policies and call["logprobs"]
    ]
    most = max(versions, default=0)  # nobody may have called the policy
    assert min(versions, default=0) >= 0 and most <= STALENESS
    told = max(row.get(f"staleness/{policy}", 0) for policy in policies)
    assert told <= most
    if "main" in policies:  # of whose calls the alignment drops none
      assert told == most
    shares = [row[name] for name in row if name.startswith("aged/")]
    assert sum(shares) == pytest.approx(1.0) or not shares
    oldest.append(most)
  return oldest


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """A run in this process, three steps of which may be begun at a time."""
  directory = tmp_path_factory.mktemp("ahead") / "run"
  setup = small_setup(seed=0, imitation_steps=1, steps=6)
  setup = dataclasses.replace(setup, max_staleness=STALENESS)
  stream = io.StringIO()
  return directory, tiny_run.train(
      directory, setup, config={"seed": 0}, stream=stream
  )


def test_every_step_is_trained_once_on_its_tasks(local):
  directory, summary = local
  assert summary["steps"] == 7
  expected = expected_tasks(seed=0, imitated=1, total=7)
  assert test_resume.trained_tasks(directory) == expected
  rows = read_metrics(directory / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(7))
  assert [row["rollouts"] for row in rows] == [3, 12, 21, 30, 39, 48, 57]


def test_no_token_is_older_than_allowed(local):
  directory, _ = local
  rows = read_metrics(directory / "metrics.jsonl")
  oldest = check_ages(directory, rows, ("main", "researcher"))
  assert len(oldest) == 6 and max(oldest) > 0
  # Nothing runs ahead of an evaluation, which is after steps 3 and 6.
  assert oldest[2] == oldest[5] == 0
  assert rows[3]["version/main"] == 4


def test_tokens_of_a_step_are_its_own(local):
  directory, summary = local
  rows = read_metrics(directory / "metrics.jsonl")
  before = 0.0
  for row in rows:
    kept = sum(
        len(call["logprobs"])
        for call in calls_of(directory, row["step"])
        if row["stage"] != "imitate"
    )
    assert row["generated_tokens"] - before >= kept
    assert bool(kept) == (row["generated_tokens"] > before)
    before = row["generated_tokens"]
  assert summary["tokens"]["generated"] == before


def test_a_run_that_is_killed_goes_on_with_what_had_been_begun(tmp_path):
  directory = tmp_path / "run"

  def start():
    return test_resume.start(directory, 7, STALENESS)

  process = start()
  test_resume.wait_for_step(process, directory, 5)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  test_resume.finish(start())
  expected = expected_tasks(seed=test_resume.SEED, imitated=2, total=9)
  assert test_resume.trained_tasks(directory) == expected
  rows = read_metrics(directory / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(9))
  check_ages(directory, rows, ("main", "researcher"))
