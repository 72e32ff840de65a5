"""A leader whose follower is not there, or whose bucket knows more than it."""

import io

import pytest
import tiny_job
from delegating import delegating_setup

from mgrpo_jax import store
from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.decoupled.board import Board
from mgrpo_jax.decoupled.errors import AbsentError
from mgrpo_jax.evaluate import Evaluation
from mgrpo_jax.metrics import Accuracy
from mgrpo_jax.types import RolloutGroup


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path / "bucket")


def lead(tmp_path, bucket):
  return tiny_job.train(
      tmp_path / "run",
      bucket.url,
      "main",
      delegating_setup(seed=3, imitation_steps=0, steps=1),
      stream=io.StringIO(),
      patience=1.0,
  )


def test_a_leader_without_its_follower_ends_saying_whom_it_misses(
    tmp_path, bucket
):
  with pytest.raises(
      AbsentError, match="job of policy 'researcher'.*to be ready"
  ):
    lead(tmp_path, bucket)
  assert bucket.list("members") == ["members/main/0.json"]
  assert not bucket.list("steps") and not bucket.list("evaluations")


def test_a_leader_with_a_new_directory_does_not_go_on_from_anothers_steps(
    tmp_path, bucket
):
  board = Board(
      bucket,
      rollouts_per_task=3,
      told=tmp_path / "told",
      sure=lambda: None,
  )
  nothing = Accuracy(correct=0, n=3, failed=0)
  found = Evaluation(overall=nothing, by_family={"x": nothing}, groups=())
  board.write_evaluation("test", 0, found, {"main": 0, "researcher": 0})
  groups: list[RolloutGroup] = []
  board.announce(0, groups, [])
  with pytest.raises(MismatchError, match="step 0 stands in the bucket"):
    lead(tmp_path, bucket)
