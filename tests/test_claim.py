"""One run directory at a time has a policy's job."""

import asyncio
import threading
import time

import killed
import pytest

from mgrpo_jax import publish, retention, store, workdir
from mgrpo_jax.atomic import CorruptError, StorageError
from mgrpo_jax.decoupled import claim, members, run
from mgrpo_jax.decoupled.claim import Home
from mgrpo_jax.decoupled.ending import Ending
from mgrpo_jax.decoupled.errors import AbsentError, ClaimedError
from mgrpo_jax.decoupled.members import Heart
from mgrpo_jax.decoupled.part import Job

OURS = Home(id="a", place="here:/run")
OTHERS = Home(id="b", place="there:/other")


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path / "bucket")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(claim, "_LOOK", 0.02)


def heart(bucket, home, *, every=0.05, patience=30.0, lost=print, tell=print):
  return Heart(
      bucket,
      policy="sub",
      address="http://127.0.0.1:1",
      home=home,
      every=every,
      patience=patience,
      tell=tell,
      lost=lost,
  )


def test_the_same_run_directory_goes_on_at_once(bucket):
  with heart(bucket, OURS, every=1000.0):
    first = members.read(bucket, "sub")
  with heart(bucket, OURS, patience=1000.0):
    second = members.read(bucket, "sub")
  assert first.incarnation != second.incarnation and second.place == OURS.place


def test_another_run_directory_is_told_where_the_job_is(bucket):
  with heart(bucket, OTHERS):
    with pytest.raises(ClaimedError, match="runs already, from there:/other"):
      with heart(bucket, OURS):
        pass
    assert members.read(bucket, "sub").home == "b"


def test_another_run_directory_waits_until_the_first_is_silent(bucket):
  with heart(bucket, OTHERS):
    pass
  began = time.monotonic()
  with heart(bucket, OURS, patience=0.5):
    assert time.monotonic() - began > 0.5
    assert members.read(bucket, "sub").home == "a"


def test_what_another_run_directory_trained_is_not_replaced(bucket):
  with heart(bucket, OTHERS):
    for number in range(3):
      publish.publish(
          bucket, "sub", number, killed.tree(number), keep=2, meta={}
      )
  with pytest.raises(ClaimedError, match="version 2 .*from there:/other"):
    with heart(bucket, OURS, patience=1000.0):  # it need not wait for that
      pass
  assert publish.versions(bucket, "sub") == [1, 2]


def test_a_directory_that_cannot_have_the_job_is_not_made(bucket, tmp_path):
  """Else it would stand there, of a bucket that is not its own."""
  key = members.key("sub")

  def check():
    claim.check_new(bucket, policy="sub", key=key, path=tmp_path / "new")

  check()  # nobody has it
  with heart(bucket, OTHERS):
    pass
  check()  # somebody has, who has trained nothing
  for number in range(2):
    publish.publish(bucket, "sub", number, killed.tree(number), keep=2, meta={})
  with pytest.raises(ClaimedError, match="from there:/other.*:.*/new, cannot"):
    check()
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("swaps", [True, False])
def test_who_lost_the_job_is_told_and_may_write_no_more(
    bucket, monkeypatch, swaps
):
  monkeypatch.setattr(bucket, "_can_swap", swaps)
  told, seen = threading.Event(), []

  def lost(error):
    seen.append(error)
    told.set()

  with heart(bucket, OURS, lost=lost) as first:
    first.sure()
    with heart(bucket, OURS):
      assert told.wait(20)
      for act in (first.sure, lambda: first.ready(3)):
        with pytest.raises(ClaimedError, match="taken over .*here:/run"):
          act()
      assert members.read(bucket, "sub").ready == members.NOT_READY
  assert len(seen) == 1


def test_who_was_away_looks_before_it_publishes(bucket):
  """Stopped for long, while another process took over: no beat tells it."""
  with heart(bucket, OURS, every=0.2) as first:
    publish.publish(bucket, "sub", 0, killed.tree(0), keep=2, meta={})
    first._stop.set()  # as by SIGSTOP
    first._thread.join()
    with heart(bucket, OURS):
      time.sleep(0.6)
      with pytest.raises(ClaimedError):
        publish.publish(
            bucket,
            "sub",
            1,
            killed.tree(1),
            keep=1,
            meta={},
            sure=first.sure,
        )
  assert publish.versions(bucket, "sub") == [0]


@pytest.mark.parametrize("key", ["LATEST", "v1/manifest.json"])
def test_who_loses_the_job_while_it_publishes_is_told_that(
    bucket, monkeypatch, key
):
  """Not that a pointer changed, which would have it started again."""

  def lose(number):
    publish.publish(bucket, "sub", 1, killed.tree(1), keep=2, meta={})
    first._stop.set()  # as by SIGSTOP
    first._thread.join()
    with heart(bucket, OURS):
      time.sleep(0.6)
    if number:
      raise StorageError("cannot write")

  def once(name, number, write):
    def changed(where, value):
      place = where if isinstance(where, str) else where.key
      if place == f"policies/sub/{key}":
        monkeypatch.undo()
        monkeypatch.setattr(claim, "_LOOK", 0.02)
        lose(number)
      return write(where, value)

    monkeypatch.setattr(bucket, name, changed)

  with heart(bucket, OURS, every=0.2) as first:
    publish.publish(bucket, "sub", 0, killed.tree(0), keep=2, meta={})
    once("replace", 0, bucket.replace)
    once("put", 1, bucket.put)
    with pytest.raises(ClaimedError, match="taken over"):
      publish.publish(
          bucket, "sub", 1, killed.tree(1), keep=2, meta={}, sure=first.sure
      )
  assert publish.versions(bucket, "sub") == [0, 1]


@pytest.mark.parametrize(
    ("room", "call"), [(publish, "_is_whole"), (retention, "remove")]
)
def test_who_loses_the_job_before_it_writes_removes_no_version(
    bucket, monkeypatch, room, call
):
  straight = getattr(room, call)

  def late(store, where):
    found = straight(store, where)
    monkeypatch.setattr(room, call, straight)
    first._stop.set()  # as by SIGSTOP
    first._thread.join()
    with heart(bucket, OURS):
      publish.publish(bucket, "sub", 1, killed.tree(1), keep=2, meta={})
      time.sleep(0.6)
    return found

  with heart(bucket, OURS, every=0.2) as first:
    publish.publish(bucket, "sub", 0, killed.tree(0), keep=2, meta={})
    monkeypatch.setattr(room, call, late)
    with pytest.raises(ClaimedError, match="taken over"):
      publish.publish(
          bucket, "sub", 1, killed.tree(2), keep=2, meta={}, sure=first.sure
      )
  found = publish.read(bucket, "sub", "latest", like=killed.tree(0))
  assert found.version.number == 1 and not found.skipped
  assert all((array == 1).all() for array in found.params.values())


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("lost", [True, False])
def test_who_fails_is_told_first_that_the_job_is_lost(
    bucket, monkeypatch, lost, reads
):
  """Stopped for so long that others seem to be gone."""

  def fail(key):
    raise StorageError("cannot read")

  expected = ClaimedError if lost and reads else AbsentError
  with pytest.raises(expected):
    with heart(bucket, OURS, every=0.2) as first:
      first._stop.set()  # as by SIGSTOP
      first._thread.join()
      if lost:
        with heart(store.open(bucket.url), OURS):
          pass
      time.sleep(0.6)
      if not reads:
        monkeypatch.setattr(bucket, "read", fail)
      raise AbsentError("no sign of life")


def job_in(path):
  """The job of a run directory."""
  return Job(
      policy="sub",
      workdir=workdir.Workdir(path),
      where=None,
      address="http://127.0.0.1:1",
      token="",
      patience=30.0,
      heartbeat=0.2,
      tell=print,
  )


def test_a_run_ends_where_its_job_is_taken_over(bucket, tmp_path):
  job = job_in(tmp_path / "run")

  async def work():
    async with run.alive(bucket, job):
      with heart(store.open(bucket.url), claim.home_of(job.workdir.path)):
        await asyncio.sleep(20)

  with pytest.raises(ClaimedError, match="taken over"):
    asyncio.run(work())


@pytest.mark.parametrize("lost", [True, False])
def test_what_fails_beside_the_run_is_told_after_that_the_job_is_lost(
    bucket, tmp_path, lost
):
  """As where a call of another job cannot be kept on the disk."""
  job = job_in(tmp_path / "run")

  async def work():
    async with run.alive(bucket, job) as (first, ending):
      first._stop.set()  # as by SIGSTOP
      first._thread.join()
      if lost:
        with heart(store.open(bucket.url), claim.home_of(job.workdir.path)):
          pass
      time.sleep(0.6)
      ending.tell(StorageError("File too large"))
      await asyncio.sleep(60)

  with pytest.raises(ClaimedError if lost else StorageError):
    asyncio.run(work())


def test_a_beat_that_arrives_late_undoes_no_later_one(bucket):
  with heart(bucket, OURS, every=1000.0) as beating:
    late = bucket.read(members.key("sub"))
    beating.ready(1)
    assert not bucket.replace(late, beating._next(ready=7))
    beating.ready(2)
    assert members.read(bucket, "sub").ready == 2


def test_a_heart_that_stops_for_another_reason_says_so(bucket):
  told, heard = [], threading.Event()

  def lost(error):
    told.append(error)
    heard.set()

  with heart(bucket, OURS, lost=lost) as beating:
    beating._claim.renew = lambda _: (_ for _ in ()).throw(OSError("a fault"))
    assert heard.wait(20)
  assert [str(error) for error in told] == ["a fault"]


def test_of_two_that_come_at_once_one_has_the_job(bucket):
  outcomes = []
  ready = threading.Barrier(2)

  def come(home):
    ready.wait()
    try:
      with heart(bucket, home):
        outcomes.append(home.id)
        time.sleep(0.3)
        assert ready.wait(20) >= 0
    except ClaimedError:
      outcomes.append("refused")
      ready.wait(20)

  threads = [threading.Thread(target=come, args=(h,)) for h in (OURS, OTHERS)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  assert sorted(outcomes)[1:] == ["refused"]


def test_a_record_that_is_damaged_is_nobodys_sign_of_life(bucket, monkeypatch):
  monkeypatch.setattr(bucket, "replace", bucket.replace)
  with heart(bucket, OURS, every=1000.0) as beating:
    bucket.put(members.key("sub"), b"\x00 no record")
    with pytest.raises(CorruptError):
      members.read(bucket, "sub")
    beating.ready(4)  # written over: it was ours
    assert members.read(bucket, "sub").ready == 4


def test_a_run_directory_is_known_wherever_it_lies(tmp_path):
  (tmp_path / "one").mkdir()
  first = claim.home_of(tmp_path / "one")
  (tmp_path / "one").rename(tmp_path / "two")
  second = claim.home_of(tmp_path / "two")
  assert first.id == second.id and second.place.endswith("/two")
  (tmp_path / "two/job_id.json").write_text("[]")
  with pytest.raises(CorruptError, match="job_id.json"):
    claim.home_of(tmp_path / "two")


def test_what_happens_in_a_thread_ends_the_run():
  async def work():
    async with Ending() as ending:
      error = ClaimedError("taken")
      threading.Timer(0.05, ending.tell, [error]).start()
      await asyncio.sleep(60)

  with pytest.raises(ClaimedError, match="taken"):
    asyncio.run(work())


def test_only_the_first_reason_counts_and_later_ones_disturb_nobody():
  async def work():
    ending = Ending()
    try:
      async with ending:
        ending.tell(ClaimedError("first"))
        ending.tell(ClaimedError("second"))
        await asyncio.sleep(60)
    except ClaimedError as error:
      ending.tell(ClaimedError("third"))
      await asyncio.sleep(0.05)
      return str(error), asyncio.current_task().cancelling()

  assert asyncio.run(work()) == ("first", 0)


def test_what_is_told_when_the_run_is_over_disturbs_nobody():
  async def work():
    async with Ending() as ending:
      pass
    ending.tell(ClaimedError("late"))
    await asyncio.sleep(0.05)

  asyncio.run(work())


def test_a_cancelled_run_stays_cancelled():
  async def body():
    async with Ending():
      await asyncio.sleep(60)

  async def work():
    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    return task.cancelled()

  assert asyncio.run(work())
