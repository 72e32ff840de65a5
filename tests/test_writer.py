"""Weights go to the store while other work goes on."""

import asyncio
import gc
import math
import sys
import threading
import time
from types import SimpleNamespace

import jax
import killed
import numpy as np
import pytest
import replicated
from jax.sharding import PartitionSpec

from mgrpo_jax import atomic, publish, resources, store
from mgrpo_jax.hosts.sharing import Helper, Shared
from mgrpo_jax.writer import Writer


@pytest.fixture
def bucket(tmp_path) -> store.Store:
  return store.open_folder(tmp_path)


def hand_over(writer, number):
  writer.write("main", number, killed.tree(number), meta={"step": number})


def test_handing_over_does_not_wait_for_the_store(bucket, monkeypatch):
  go, straight = threading.Event(), bucket.write_arrays

  def slow(prefix, arrays):
    assert go.wait(60)
    straight(prefix, arrays)

  monkeypatch.setattr(bucket, "write_arrays", slow)
  writer = Writer(
      bucket, keep=3, short=False, whole_every=1, tell=lambda _: None
  )
  for number in range(3):
    hand_over(writer, number)
  assert publish.latest(bucket, "main") is None
  go.set()
  assert writer.settle() == []
  assert publish.versions(bucket, "main") == [0, 1, 2]
  assert publish.latest(bucket, "main").number == 2
  writer.close()


def test_a_version_that_fails_is_told_and_the_next_is_written(
    bucket, monkeypatch
):
  def full(prefix, arrays):
    monkeypatch.undo()
    raise atomic.StorageError(f"cannot write {prefix}: No space left on device")

  monkeypatch.setattr(bucket, "write_arrays", full)
  writer = Writer(
      bucket, keep=3, short=False, whole_every=1, tell=lambda _: None
  )
  hand_over(writer, 0)
  hand_over(writer, 1)
  with pytest.raises(atomic.StorageError, match="v0: No space left"):
    writer.settle()
  assert writer.settle() == []  # told once
  assert publish.versions(bucket, "main") == [1]
  hand_over(writer, 2)
  writer.close()  # waits, whatever happens
  assert publish.latest(bucket, "main").number == 2


def test_what_is_damaged_is_handed_on(bucket):
  bucket.put("policies/main/leases/notes", b"0")
  writer = Writer(
      bucket, keep=1, short=False, whole_every=1, tell=lambda _: None
  )
  hand_over(writer, 0)
  (line,) = writer.settle()
  assert "leases/notes" in line
  writer.close()


class Idle:
  """An engine that samples nothing."""

  async def __aenter__(self):
    return self

  async def __aexit__(self, *exception):
    pass


def test_a_last_version_has_its_time_where_replicas_help(bucket, monkeypatch):
  found, straight = [], bucket.write_arrays

  def slow(prefix, arrays):
    end = time.monotonic() + 60
    while bucket.limit() == math.inf and time.monotonic() < end:
      time.sleep(0.01)  # until the run leaves
    time.sleep(0.2)
    found.append(bucket.limit() - time.monotonic())
    straight(prefix, arrays)

  monkeypatch.setattr(bucket, "write_arrays", slow)
  writer = Writer(
      bucket, keep=3, short=False, whole_every=1, tell=lambda _: None
  )
  pool = replicated.pool(
      Idle(), bucket, "main", slots=1, context=9, vocab_size=9
  )
  made = SimpleNamespace(writer=writer, engines={"main": pool})
  monkeypatch.setattr(resources, "Resources", lambda *_: made)

  async def leave():
    async with resources.open_resources(None, bucket):
      hand_over(writer, 0)
      raise RuntimeError("the run ends")

  with pytest.raises(RuntimeError, match="the run ends"):
    asyncio.run(leave())
  assert 20 < found[0] < 30
  assert publish.latest(bucket, "main").number == 0


class Litter:
  """What runs code, and so lets other threads run, when it is collected."""

  def __init__(self):
    self.me = self

  def __del__(self):
    sum(range(50))


@pytest.fixture
def restless():
  """Threads that take turns, and litter that is collected, all the time."""
  interval, threshold = sys.getswitchinterval(), gc.get_threshold()
  sys.setswitchinterval(1e-6)
  gc.set_threshold(3, 1, 1)
  yield
  sys.setswitchinterval(interval)
  gc.set_threshold(*threshold)


@pytest.mark.parametrize("how", ["a writer", "a helper", "an offer"])
def test_all_threads_find_all_shards(bucket, monkeypatch, restless, how):
  found, both = [], threading.Barrier(2)

  def look(array):
    both.wait(60)
    found.append(len(array.addressable_shards))

  def publish_it(store, policy, number, params, **_):
    look(params)
    return SimpleNamespace(version=number, damaged=())

  monkeypatch.setattr(publish, "publish", publish_it)
  monkeypatch.setattr(Helper, "_share", lambda self, given, *_: look(*given))
  mesh = jax.make_mesh((8,), ("data",))
  where = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
  writer = Writer(
      bucket, keep=1, short=False, whole_every=1, tell=lambda _: None
  )
  helper = Helper(bucket, None)
  for number in range(200):
    params = jax.device_put(np.arange(16), where)
    _ = [Litter() for _ in range(2)]
    if how == "a writer":
      writer.write("main", number, params, meta={})
    elif how == "a helper":
      helper.begin(params, topic="", folder="", short=False)
    else:
      Shared(params, channel=None, topic="", short=False)
      other = threading.Thread(target=look, args=[params])
      other.start()
    look(params)  # as a checkpoint does meanwhile
    if how == "an offer":
      other.join()
  assert writer.settle() == []
  helper.close()
  writer.close()
  assert found == 400 * [8]
