"""What a bucket must not hold when a run would begin in it."""

import dataclasses
import json
import socket

import killed
import pytest

from configs import default
from experiments import joining, recipe
from mgrpo_jax import atomic, leaves, ownership, publish, store, workdir
from mgrpo_jax.decoupled.errors import ClaimedError

VALUES = {"seed": 0, "policies": {"main": {}, "sub": {}}}
ALONE = joining.Place(policy="", where=None, address="", token="")


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path / "bucket")


@pytest.fixture
def job():
  with socket.socket() as where:
    yield joining.Place(policy="main", where=where, address="", token="")


def trained(bucket, policy):
  for number in range(3):
    publish.publish(
        bucket, policy, number, killed.tree(number), keep=2, meta={}
    )


def named(bucket, path, place):
  """Begins a run, or goes on, as the command does; the id it has."""
  directory = workdir.Workdir(path)
  naming = joining.naming(bucket, directory, VALUES, place)
  with workdir.hold(path, VALUES, name=naming):
    ownership.claim(
        bucket, directory.read_id(), VALUES, jobs=place.where is not None
    )
  return directory.read_id()


@pytest.mark.parametrize("first", ["one process", "jobs"])
def test_a_run_of_the_other_kind_is_refused_and_leaves_nothing(
    bucket, tmp_path, job, first
):
  places = (ALONE, job) if first == "one process" else (job, ALONE)
  named(bucket, tmp_path / "first", places[0])
  trained(bucket, "main")
  for path in (tmp_path / "first", tmp_path / "second"):
    with pytest.raises(ownership.TakenError):
      named(bucket, path, places[1])
  assert not (tmp_path / "second").exists()
  assert named(bucket, tmp_path / "first", places[0])
  assert publish.versions(bucket, "main") == [1, 2]


@pytest.mark.parametrize("pointed", [True, False])
@pytest.mark.parametrize("jobs", [True, False])
def test_no_new_directory_begins_where_weights_were_trained(
    bucket, tmp_path, job, jobs, pointed
):
  """Whatever is left of who trained them: not even a pointer need be."""
  place = job if jobs else ALONE
  trained(bucket, "main")
  if not pointed:
    bucket.delete("policies/main/LATEST")
  with pytest.raises(ClaimedError, match="'main' was trained to version 2 in"):
    named(bucket, tmp_path / "new", place)
  assert not (tmp_path / "new").exists() and bucket.get("run.json") is None


def test_a_job_may_come_when_others_have_trained(bucket, tmp_path, job):
  name = named(bucket, tmp_path / "main", job)
  trained(bucket, "main")
  late = dataclasses.replace(job, policy="sub")
  assert named(bucket, tmp_path / "sub", late) == name


def test_a_directory_of_before_runs_had_ids_goes_on(bucket, tmp_path):
  atomic.write_json(tmp_path / "old" / workdir.CONFIG_FILE, VALUES)
  trained(bucket, "main")
  assert named(bucket, tmp_path / "old", ALONE)


def test_a_run_without_a_record_of_its_kind_is_not_replaced(
    bucket, tmp_path, job
):
  """As runs in one process left it that ended before there was one."""
  with workdir.hold(tmp_path / "one", VALUES) as one:
    ownership.claim(bucket, one.read_id(), VALUES, jobs=False)
  record = leaves.check_seal(json.loads(bucket.get("run.json")))
  del record["jobs"]
  sealed = leaves.seal(record)
  bucket.put("run.json", json.dumps(sealed).encode())
  trained(bucket, "main")
  with pytest.raises(ClaimedError, match="version 2 in .*, which this run dir"):
    named(bucket, tmp_path / "jobs", job)
  assert publish.versions(bucket, "main") == [1, 2]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("file:///a/b//", "file:///a/b"),
        ("s3://b/?endpoint=http://h/", "s3://b?endpoint=http://h/"),
        ("gs://b/run/", "gs://b/run"),
        ("file:///", "file:///"),  # which is refused as it was given
        ("", ""),
    ],
)
def test_a_bucket_has_one_name_with_and_without_a_slash(given, named):
  """For it stands in the config, whose digest all jobs compare."""
  for config, url in (
      (default.get_config(), given),
      (default.get_config(), ""),
  ):
    config.publish.bucket = "" if url else given
    recipe.name_bucket(config, url)
    assert config.publish.bucket == named
