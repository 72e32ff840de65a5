"""Records of a run in its bucket: read back whole, or not at all."""

import dataclasses
import json

import numpy as np
import pytest
from trajectories import group, task, trajectory

from mgrpo_jax import leaves, rewards, store
from mgrpo_jax.atomic import CorruptError, MismatchError
from mgrpo_jax.decoupled.board import Board
from mgrpo_jax.decoupled.errors import ClaimedError
from mgrpo_jax.decoupled.spool import Spool, read_scores, write_scores
from mgrpo_jax.decoupled.wire import dump
from mgrpo_jax.evaluate import Evaluation
from mgrpo_jax.metrics import Accuracy
from mgrpo_jax.testing.team import environment, small_team
from mgrpo_jax.types import Account, Status

TEAM = small_team()


def played(seed):
  """Two rollouts, in one of which the researcher was called."""
  rng = np.random.default_rng(seed)
  calls = [
      trajectory(rollout=0),
      trajectory(rollout=0, role="researcher", parent=0, version_min=3),
      trajectory(rollout=1, status=Status.TRUNCATED),
  ]
  made = group(task(), calls, num_rollouts=2)
  columns = [field.name for field in dataclasses.fields(rewards.Scores)]
  scores = rewards.Scores(
      **{name: rng.random(3).astype(np.float32) for name in columns}
  )
  return made, scores


def same(one, other):
  return all(
      getattr(one, f.name).tobytes() == getattr(other, f.name).tobytes()
      for f in dataclasses.fields(rewards.Scores)
  )


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path / "bucket")


@pytest.fixture
def board(bucket, tmp_path):
  return Board(
      bucket,
      rollouts_per_task=2,
      told=tmp_path / "spool",
      sure=lambda: None,
  )


def test_a_step_comes_back_bit_for_bit(board):
  one, two = played(0), played(1)  # of the same task
  assert board.step(5) is None and not board.has_step(5)
  board.announce(5, [one[0], two[0]], [one[1], two[1]])
  told = board.step(5)
  assert board.has_step(5)
  assert [(t.task, t.repetition) for t in told] == [("t", 0), ("t", 1)]
  for (made, scores), found in zip((one, two), told, strict=True):
    assert same(found.scores, scores)
    calls = [call for calls in found.rollouts for call in calls]
    for before, after in zip(made.trajectories, calls, strict=True):
      for name in ("role", "call", "rollout", "status", "version_min"):
        assert getattr(before, name) == getattr(after, name)
      assert not after.tokens.size and not after.result_text
  assert told[0].rollouts[0][1].parent == 0


def test_a_later_step_of_the_same_tasks_changes_no_earlier_one(board):
  """So that a job may be behind."""
  one, two = played(0), played(1)
  board.announce(5, [one[0]], [one[1]])
  board.announce(6, [two[0]], [two[1]])
  for step, (_, scores) in ((5, one), (6, two)):
    (told,) = board.step(step)
    assert same(told.scores, scores)


def test_a_step_is_one_record(board, bucket):
  groups, scores = zip(*map(played, range(8)), strict=True)
  board.announce(5, groups, scores)
  assert bucket.list() == ["steps/5.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"rollouts": []},
        {"tasks": ["t", "t"]},
        {"tasks": None},
        {"tasks": ["../x"]},
        {"rollouts": None},
        {"rollouts": [[], []]},
        {"rollouts": [None, None]},
        {"step": 4},
        {"rollouts": [[["main", 0, -1, 0, 0, 0, 0] + [10**400] * 6]] * 2},
        {"rollouts": [[["main", 0, -1]], [["main", 0, -1]]]},
        {"rollouts": [[["main", 0, -1, 0, 99, 0, 0] + [0.0] * 6]] * 2},
    ],
)
def test_a_step_that_is_none_is_damaged(board, bucket, change):
  made, scores = played(0)
  board.announce(5, [made], [scores])
  rewritten(bucket, "steps/5.json", change)
  with pytest.raises(CorruptError, match="steps/5.json is damaged"):
    board.step(5)


@pytest.mark.parametrize(
    "change",
    [
        {"families": None},
        {"families": {"place": {"correct": 1}}},
        {"families": {"place": {"correct": "1", "n": 2, "failed": 0}}},
        {"tokens": None},
        {"tokens": {"main": "many"}},
    ],
)
def test_an_evaluation_that_is_none_is_damaged(board, bucket, change):
  parts = {"place": Accuracy(correct=2, n=5, failed=1)}
  found = Evaluation(overall=parts["place"], by_family=parts, groups=())
  board.write_evaluation("dev", 3, found, {"main": 7})
  rewritten(bucket, "evaluations/dev/3.json", change)
  with pytest.raises(CorruptError, match="evaluations/dev/3.json is damaged"):
    board.evaluation("dev", 3)


def test_a_step_of_an_older_version_is_told(board, bucket):
  bucket.put("steps/5.json", dump(leaves.seal({"step": 5, "tasks": ["t"]})))
  with pytest.raises(
      MismatchError, match="steps/5.json is of a run that an old"
  ):
    board.step(5)


def rewritten(bucket, key, change):
  """Has a record say something else, and still be sealed."""
  body = json.loads(bucket.get(key))
  del body["digest"]
  bucket.put(key, dump(leaves.seal(body | change)))


def test_a_record_that_arrives_late_undoes_no_later_one(
    board, bucket, monkeypatch
):
  made, scores = played(0)
  late = []

  def keep(record, value):  # this write is given up, and is under way
    late.append((record, value))
    return straight(record, value)

  straight = bucket.replace
  monkeypatch.setattr(bucket, "replace", keep)
  board.announce(5, [made], [scores])
  monkeypatch.undo()
  other, later = played(1)
  board.announce(5, [other], [later])
  assert [record.key for record, _ in late] == ["steps/5.json"]
  for record, value in late:  # now it comes
    assert not bucket.replace(record, value)
  (told,) = board.step(5)
  assert same(told.scores, later)


def test_what_a_bucket_lost_is_told_again(board, bucket, tmp_path):
  made, scores = played(0)
  parts = {"place": Accuracy(correct=2, n=5, failed=1)}
  found = Evaluation(overall=parts["place"], by_family=parts, groups=())
  board.announce(5, [made], [scores])
  board.write_evaluation("dev", 6, found, {"main": 7})
  board.announce(6, [made], [scores])
  kept = {key: bucket.get(key) for key in bucket.list()}
  for key in kept:
    bucket.delete(key)
  again = Board(
      bucket, rollouts_per_task=2, told=tmp_path / "spool", sure=lambda: None
  )
  again.repeat()
  assert {key: bucket.get(key) for key in bucket.list()} == kept
  again.trim(6)
  bucket.delete("steps/5.json")
  bucket.delete("steps/6.json")
  again.repeat()
  assert not again.has_step(5) and again.step(6) is not None


def test_who_may_write_no_more_writes_nothing(bucket, tmp_path):
  def taken():
    raise ClaimedError("another's")

  made, scores = played(0)
  other = Board(bucket, rollouts_per_task=2, told=tmp_path / "s", sure=taken)
  with pytest.raises(ClaimedError):
    other.announce(5, [made], [scores])
  with pytest.raises(ClaimedError):
    other.write_stats("main", 5, {})
  assert bucket.list() == []


def test_a_damaged_record_is_named(board, bucket):
  made, scores = played(0)
  key = "steps/5.json"
  board.announce(5, [made], [scores])
  value = bytearray(bucket.get(key))
  value[len(value) // 2] ^= 1
  bucket.put(key, bytes(value))
  with pytest.raises(CorruptError, match=key):
    board.step(5)


def test_evaluations_and_stats_come_back(board):
  parts = {
      "place": Accuracy(correct=2, n=5, failed=1),
      "link": Accuracy(correct=1, n=3, failed=0),
  }
  overall = Accuracy(correct=3, n=8, failed=1)
  found = Evaluation(overall=overall, by_family=parts, groups=())
  assert board.evaluation("dev", 3) is None
  board.write_evaluation("dev", 3, found, {"main": 7})
  assert board.evaluation("dev", 3) == (found, {"main": 7})
  assert board.evaluation("test", 3) is None
  board.write_stats("main", 2, {"reward": 0.1, "trained_tokens": 5.0})
  assert board.stats("main", 2) == {"reward": 0.1, "trained_tokens": 5.0}
  assert board.stats("main", 3) is None


def test_scores_survive_their_shortest_writing():
  rng = np.random.default_rng(0)
  columns = [field.name for field in dataclasses.fields(rewards.Scores)]
  scores = rewards.Scores(
      **{n: rng.normal(size=1000).astype(np.float32) for n in columns}
  )
  assert same(read_scores(write_scores(scores)), scores)


def spool(folder):
  async def nothing(tokens, sampling, seed, *, session):
    raise AssertionError("nothing is sampled")

  shared = environment({"main": nothing, "researcher": nothing}, team=TEAM)
  made, _ = played(0)
  return Spool(folder, tasks={"t": made.task}, environments=lambda _: shared)


def test_a_spooled_step_comes_back_and_goes_when_it_is_not_needed(tmp_path):
  made, scores = played(0)
  account = Account(
      sampled=3, turns=1, format=True, correct=1.0, expert=None, overlong=0.0
  )
  calls = list(made.trajectories)
  calls[1] = dataclasses.replace(calls[1], account=account)
  made = group(task(), calls, num_rollouts=2)
  kept = spool(tmp_path)
  kept.write(4, [made], None)
  kept.write(5, [made], [scores])
  (back,), none = kept.read(4)
  assert none is None and back.trajectories[1].account == account
  for name in ("rollout", "parent", "role", "call"):
    assert np.array_equal(getattr(back, name), getattr(made, name))
  _, (found,) = kept.read(5)
  assert same(found, scores)
  kept.trim(5)
  assert kept.read(4) is None and kept.read(5) is not None


def test_a_damaged_spool_is_named(tmp_path):
  made, scores = played(0)
  kept = spool(tmp_path)
  kept.write(5, [made], [scores])
  (file,) = tmp_path.iterdir()
  file.write_bytes(file.read_bytes()[:-9])
  with pytest.raises(CorruptError, match=file.name):
    kept.read(5)
