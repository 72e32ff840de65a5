"""Servers that fail, disks that are full: nothing torn, nothing lost."""

import contextlib
import json
import multiprocessing
import resource
import threading
import time
import uuid

import jax
import killed
import numpy as np
import pytest

from mgrpo_jax import atomic, attempts, publish, store
from mgrpo_jax.testing import faulty
from mgrpo_jax.writer import Writer

LIKE = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, killed.tree(0)))


@contextlib.contextmanager
def behind(endpoint, faults, **settings):
  """A bucket behind a proxy that is well-behaved until its rate is set."""
  with faulty.between(endpoint, faults) as proxy:
    name = uuid.uuid4().hex
    yield store.open(f"s3://my-bucket/{name}?endpoint={proxy}", **settings)


def put(bucket, number, **settings):
  return publish.publish(
      bucket, "main", number, killed.tree(number), keep=2, meta={}, **settings
  )


def number_of(weights) -> int:
  """Which version weights are, all of them; those of `killed.tree` know."""
  for array in weights.params.values():
    assert np.all(np.asarray(array) == weights.version.number)
  return weights.version.number


@pytest.mark.parametrize("kind", [k for k in faulty.KINDS if k != "flip"])
def test_what_a_server_spoils_is_done_again(s3_endpoint, kind):
  faults = faulty.Faults(seed=0, rate=0, seconds=0.3, kinds=(kind,))
  with behind(s3_endpoint, faults) as bucket:
    put(bucket, 0)
    faults.rate = 0.3
    put(bucket, 1)
    for _ in range(3):
      weights = publish.read(bucket, "main", "latest", like=LIKE)
      assert number_of(weights) == 1
      assert weights.skipped == ()
    assert bucket.can_swap
    assert faults.injected[kind] >= 3


def test_what_has_nothing_to_spoil_is_not_counted_as_spoilt(s3_endpoint):
  faults = faulty.Faults(seed=0, rate=1, seconds=0, kinds=("cut", "short"))
  with behind(s3_endpoint, faults) as bucket:
    for kind in ("cut", "short"):
      faults.kinds = (kind,)
      if kind == "cut":
        bucket.put("k", b"value")  # its answer has no body
      else:
        assert bucket.get("k") == b"value"  # the question has none
    assert not faults.injected


def test_an_upload_may_be_slow(s3_endpoint):
  faults = faulty.Faults(seed=0, rate=1, seconds=1.0, kinds=("slow",))
  with behind(s3_endpoint, faults) as bucket:
    begun = time.monotonic()
    bucket.put("k", b"sixteen letters!")
    assert time.monotonic() - begun >= 1.0
    assert faults.injected == {"slow": 1}
    faults.rate = 0
    assert bucket.get("k") == b"sixteen letters!"


def test_a_server_that_is_silent_is_given_up(s3_endpoint, monkeypatch):
  monkeypatch.setattr(attempts, "_ATTEMPT", 1.0)
  faults = faulty.Faults(seed=0, rate=1, seconds=0, kinds=("silent",))
  with behind(s3_endpoint, faults) as bucket:
    threading.Timer(0.5, lambda: setattr(faults, "rate", 0)).start()
    begun = time.monotonic()
    bucket.put("k", b"value")
    assert 1.0 <= time.monotonic() - begun < 20
    assert faults.injected == {"silent": 1}
    assert bucket.get("k") == b"value"


def test_a_bit_that_flips_on_its_way_is_never_believed(s3_endpoint):
  faults = faulty.Faults(seed=0, rate=0, seconds=0, kinds=("flip",))
  with behind(s3_endpoint, faults) as bucket:
    for number in range(3):
      put(bucket, number)
    faults.rate = 0.15
    found = set()
    for _ in range(10):
      with contextlib.suppress(publish.NoVersionError):
        weights = publish.read(bucket, "main", "latest", like=LIKE)
        found.add(number_of(weights))
        assert weights.version.number == 2 or weights.skipped
    assert 2 in found
    assert faults.injected["flip"] >= 5


@pytest.mark.parametrize(
    ("kind", "why"),
    [("503", "http_response_code='503'"), ("hang", "no answer|CURL")],
)
def test_a_server_that_stays_broken_is_given_up_in_time(s3_endpoint, kind, why):
  faults = faulty.Faults(seed=0, rate=1, seconds=1, kinds=(kind,))
  with behind(s3_endpoint, faults, patience=3) as bucket:
    begun = time.monotonic()
    with pytest.raises(atomic.StorageError, match=why) as caught:
      bucket.get("run.json")
    assert time.monotonic() - begun < 15  # and a busy machine's delays
    text = (
        rf"^cannot read {bucket.url}/run\.json: .*\d+ attempts? in [2-9] s\)$"
    )
    assert caught.match(text)
    faults.rate = 0
    assert bucket.get("run.json") is None


def test_who_leaves_does_not_wait_for_a_server_that_is_gone(s3_endpoint):
  faults = faulty.Faults(seed=0, rate=0, seconds=120, kinds=("hang",))
  with behind(s3_endpoint, faults) as bucket:
    put(bucket, 0)
    writer = Writer(
        bucket, keep=2, short=False, whole_every=1, tell=lambda _: None
    )
    faults.rate = 1
    writer.write("main", 1, killed.tree(1), meta={})
    bucket.hurry(1.0)
    begun = time.monotonic()
    writer.close()
    with pytest.raises(atomic.StorageError, match="no answer"):
      bucket.get("run.json")
    assert time.monotonic() - begun < 60  # a busy machine's; 120 s otherwise


def test_an_answer_that_is_lost_does_not_lose_a_swap(s3_endpoint):
  faults = faulty.Faults(seed=0, rate=0, seconds=0, kinds=("lost",))
  with behind(s3_endpoint, faults) as bucket:
    assert bucket.can_swap
    before = bucket.read("k")
    faults.rate = 0.4
    for number in range(6):
      value = json.dumps({"writer": "a", "number": number}).encode()
      after = bucket.swap(before, value)
      assert after is not None
      assert bucket.swap(before, b"another's") is None
      assert bucket.get("k") == value
      before = after
    assert faults.injected["lost"] >= 3


def _fill(folder: str, outcome) -> None:
  """Publishes until files may be no larger than half of what is written."""
  bucket = store.open_folder(folder)
  put(bucket, 0)
  soft = killed.tree(0)["d"].nbytes // 2
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, limits[1]))
  try:
    put(bucket, 1)
  except atomic.StorageError as error:
    outcome.put(str(error))
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert number_of(publish.read(bucket, "main", "latest", like=LIKE)) == 0
  bucket.settle()
  outcome.put(sorted(bucket.list("policies/main/v1")))
  put(bucket, 1)
  assert number_of(publish.read(bucket, "main", "latest", like=LIKE)) == 1


def test_a_disk_that_takes_no_more_costs_only_the_version(tmp_path):
  spawn = multiprocessing.get_context("spawn")
  outcome = spawn.Queue()
  child = spawn.Process(target=_fill, args=(str(tmp_path), outcome))
  child.start()
  assert "main/v1/d/c/0: File too large" in outcome.get(timeout=60)
  assert outcome.get(timeout=60) == []
  child.join(60)
  assert child.exitcode == 0


def test_two_publishers_at_once_never_make_a_mixture(tmp_path):
  """Both write the same numbers with other weights, as fast as they can."""
  put(store.open_folder(tmp_path), 0)
  told = []

  def write(offset: int) -> None:
    bucket = store.open_folder(tmp_path)
    for number in range(1, 12):
      weights = killed.tree(number * 100 + offset)
      try:
        publish.publish(bucket, "main", number, weights, keep=3, meta={})
      except atomic.StorageError as error:
        told.append(error)

  threads = [threading.Thread(target=write, args=(n,)) for n in (1, 2)]
  for thread in threads:
    thread.start()
  bucket, whole = store.open_folder(tmp_path), 0
  while any(thread.is_alive() for thread in threads):
    with contextlib.suppress(publish.NoVersionError):
      weights = publish.read(bucket, "main", "latest", like=LIKE)
      arrays = [np.asarray(array) for array in weights.params.values()]
      assert len({float(v) for array in arrays for v in np.unique(array)}) == 1
      whole += 1
  for thread in threads:
    thread.join()
  assert whole
  assert told  # of two, one learns of the other
