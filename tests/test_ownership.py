import json
import threading
import time

import pytest

from mgrpo_jax import atomic, leaves, ownership, store, workdir

CONFIG = {"seed": 0}


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path / "bucket")


def test_the_first_run_owns_a_bucket_and_comes_back_to_it(bucket):
  ownership.check(bucket, "")
  ownership.claim(bucket, "one", CONFIG, jobs=False)
  record = json.loads(bucket.get("run.json"))
  assert (record["format"], record["run"]) == (1, "one")
  assert len(record["config"]) == 64
  ownership.claim(bucket, "one", CONFIG, jobs=False)
  ownership.check(bucket, "one")
  assert json.loads(bucket.get("run.json")) == record


@pytest.mark.parametrize("run_id", ["two", ""])
def test_another_run_is_told_and_changes_nothing(bucket, run_id):
  ownership.claim(bucket, "one", CONFIG, jobs=False)
  before = bucket.get("run.json")
  with pytest.raises(ownership.TakenError, match="give another config.publish"):
    ownership.check(bucket, run_id)
  with pytest.raises(ownership.TakenError, match="belongs to another run"):
    ownership.claim(bucket, "two", CONFIG, jobs=False)
  assert bucket.get("run.json") == before


def test_of_two_that_come_at_once_one_owns_it(bucket, monkeypatch):
  nobody = bucket.read("run.json")
  ownership.claim(bucket, "one", CONFIG, jobs=False)
  monkeypatch.setattr(bucket, "read", lambda key: nobody)
  monkeypatch.setattr(
      bucket, "get", lambda key: type(bucket).read(bucket, key).value
  )
  with pytest.raises(ownership.TakenError):
    ownership.claim(bucket, "two", CONFIG, jobs=False)


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[" * 200_000, b'{"run": "one"}', b"[1]"]
)
def test_a_damaged_record_is_named(bucket, damage):
  bucket.put("run.json", damage)
  with pytest.raises(atomic.CorruptError, match="run.json is damaged"):
    ownership.claim(bucket, "one", CONFIG, jobs=False)


def test_a_run_keeps_its_id_and_old_directories_get_one(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  directory = workdir.Workdir(tmp_path)
  assert directory.read_id() == ""
  ids = []
  for _ in range(2):
    with workdir.hold(tmp_path, CONFIG) as held:
      ids.append(held.read_id())
  assert ids[0] and ids[0] == ids[1] == directory.read_id()
  with workdir.hold(tmp_path / "other", CONFIG) as held:
    assert held.read_id() != ids[0]


@pytest.mark.parametrize("damage", ["{}", "[]", '{"run": 3}', "x"])
def test_a_damaged_id_is_named(tmp_path, damage):
  (tmp_path / "run_id.json").write_text(damage)
  with pytest.raises(atomic.CorruptError, match="run_id.json"):
    workdir.Workdir(tmp_path).read_id()


@pytest.mark.parametrize("body", [{}, {"format": 1}, {"format": 1, "run": "a"}])
def test_a_sealed_record_that_is_none_is_named(bucket, body):
  bucket.put("run.json", json.dumps(leaves.seal(body)).encode())
  with pytest.raises(atomic.CorruptError, match="run.json is damaged"):
    ownership.check(bucket, "one")
  with pytest.raises(atomic.CorruptError, match="run.json is damaged"):
    ownership.found(bucket, CONFIG)


@pytest.mark.parametrize("begun_in_jobs", [True, False])
def test_a_run_goes_on_as_it_began(bucket, begun_in_jobs):
  """In jobs or in one process: neither has the other's checkpoints."""
  ownership.claim(bucket, "one", CONFIG, jobs=begun_in_jobs)
  before = bucket.get("run.json")
  words = "belongs to a run .*job.*cannot continue"
  for act in (
      lambda: ownership.claim(bucket, "one", CONFIG, jobs=not begun_in_jobs),
      lambda: ownership.check(bucket, "one", jobs=not begun_in_jobs),
      lambda: ownership.found(bucket, CONFIG, jobs=not begun_in_jobs),
  ):
    with pytest.raises(ownership.TakenError, match=words):
      act()
  ownership.claim(bucket, "one", CONFIG, jobs=begun_in_jobs)
  ownership.check(bucket, "one")  # who only reads
  assert ownership.found(bucket, CONFIG) == "one"
  assert bucket.get("run.json") == before


def test_jobs_do_not_join_a_run_in_one_process(bucket):
  ownership.claim(bucket, "one", CONFIG, jobs=False)
  with pytest.raises(ownership.TakenError, match="a run in one process, which"):
    ownership.join(bucket, CONFIG)


def test_a_run_whose_record_names_no_kind_goes_on(bucket):
  """Records had none before."""
  record = {"format": 1, "run": "one", "config": leaves.seal(CONFIG)["digest"]}
  bucket.put("run.json", json.dumps(leaves.seal(record)).encode())
  ownership.claim(bucket, "one", CONFIG, jobs=False)
  assert ownership.join(bucket, CONFIG) == "one"
  record["jobs"] = "yes"
  bucket.put("run.json", json.dumps(leaves.seal(record)).encode())
  with pytest.raises(atomic.CorruptError, match="run.json is damaged"):
    ownership.check(bucket, "one")


def test_jobs_that_come_at_once_have_one_name_without_swaps(
    bucket, monkeypatch
):
  """Both see that the bucket is nobody's; one writes later than the other."""
  monkeypatch.setattr(bucket, "_can_swap", False)
  monkeypatch.setattr(ownership, "_PAUSE", 1.0)
  both, write, names = threading.Barrier(2), bucket.replace, {}

  def late(record, value):
    both.wait(20)
    if threading.current_thread().name == "second":
      time.sleep(0.2)
    return write(record, value)

  def come():
    name = threading.current_thread().name
    names[name] = ownership.join(bucket, CONFIG)

  monkeypatch.setattr(bucket, "replace", late)
  threads = [threading.Thread(target=come, name=n) for n in ("first", "second")]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  assert names["first"] == names["second"]
  ownership.claim(bucket, names["first"], CONFIG, jobs=True)
