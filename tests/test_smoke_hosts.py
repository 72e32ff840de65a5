"""The smoke in two jobs of two processes, whose bucket is a server's."""

import json

import pytest
from commands import assert_ended_alike, ended, train_spread

from mgrpo_jax import publish, store
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.testing import object_servers


@pytest.fixture(params=["s3", "gs"])
def url(request, s3_endpoint):
  """An emulator's bucket."""
  if request.param == "s3":
    yield f"s3://{object_servers.BUCKET}/smoke?endpoint={s3_endpoint}"
    return
  pytest.importorskip(
      "gcp_storage_emulator",
      reason="gcp-storage-emulator is missing: pip install -e .[test]",
  )
  with object_servers.gcs() as endpoint:
    yield f"gs://{object_servers.BUCKET}/smoke?endpoint={endpoint}"


def arrays(bucket, policy):
  """What each version of a policy holds, by the digests of its chunks."""
  return {
      number: json.loads(
          bucket.get(f"policies/{policy}/v{number}/manifest.json")
      )["arrays"]
      for number in publish.versions(bucket, policy)
  }


def test_it_ends_as_with_a_directory(steady, url, tmp_path):
  training = train_spread(
      f"--workdir={tmp_path}", "--launch=local", f"--bucket={url}"
  )
  assert ended(training) == 0
  assert not (tmp_path / "bucket").exists()  # all is with the server
  assert_ended_alike(tmp_path, steady)
  rows = read_metrics(tmp_path / "metrics.jsonl")
  assert 0 < max(row.get("crossed_besides", 0.0) for row in rows) <= 1024
  if url.startswith("s3"):  # GCS has one endpoint a process; others want it
    kept = store.open_folder(steady / "bucket")
    for policy in ("main", "researcher"):
      found = arrays(store.open(url), policy)
      assert found and found == arrays(kept, policy)
