"""Jobs whose bucket is on an object server, as real processes."""

import numpy as np
import pytest
import test_decoupled

from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.testing import object_servers

STEPS = 2  # after two of imitation


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The run in one process, its bucket a directory."""
  team = test_decoupled.Team(tmp_path_factory.mktemp("whole"), steps=STEPS)
  team.start("all")
  team.finish()
  return team


@pytest.fixture(params=["s3", "gs"])
def url(request, s3_endpoint):
  """An emulator's bucket."""
  if request.param == "s3":
    yield f"s3://{object_servers.BUCKET}/jobs?endpoint={s3_endpoint}"
    return
  pytest.importorskip(
      "gcp_storage_emulator",
      reason="gcp-storage-emulator is missing: pip install -e .[test]",
  )
  with object_servers.gcs() as endpoint:
    yield f"gs://{object_servers.BUCKET}/jobs?endpoint={endpoint}"


def test_jobs_end_with_the_parameters_of_one_process(whole, url, tmp_path):
  team = test_decoupled.Team(tmp_path, url=url, steps=STEPS)
  team.start("researcher")
  team.start("main")
  summaries = team.finish()
  assert not team.bucket.exists()  # all that they share is with the server
  for policy in test_decoupled.JOBS:
    assert summaries[policy]["steps"] == STEPS + 2
    expected = whole.weights("all", policy)
    actual = team.weights(policy, policy)
    assert all(map(np.array_equal, expected, actual))
    assert team.trained_tasks(policy) == whole.trained_tasks("all")
  rows = read_metrics(tmp_path / "main" / "metrics.jsonl")
  assert max(r.get("crossed_besides", 0.0) for r in rows) <= 1024
