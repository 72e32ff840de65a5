"""Weights that several processes publish, each its own chunks.

The processes are threads, to which four virtual devices each belong; real ones
are in test_two_writers.py.
"""

import collections
import contextlib
import json
import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_hosts import pair

from mgrpo_jax import atomic, chunks, publish, store
from mgrpo_jax.bases import Bases
from mgrpo_jax.hosts import shards
from mgrpo_jax.hosts.channel import SilentError
from mgrpo_jax.hosts.sharing import Helper, Shared
from mgrpo_jax.writer import Writer

AXES = {  # name: how each leaf is split over data, fsdp and tensor
    "embed": ("fsdp", "tensor"),
    "up": ("tensor", "fsdp"),
    "norm": (),
    "experts": (None, "tensor", None),
    "count": (),
} | {
    name: axes
    for layer in range(5)
    for name, axes in {
        f"layers/{layer}/gate": ("fsdp", "tensor"),
        f"layers/{layer}/scale": (),
    }.items()
}


def tree(seed=0):
  random = np.random.default_rng(seed)
  return {
      "embed": random.standard_normal((16, 8), dtype=np.float32),
      "up": random.standard_normal((4, 24), dtype=np.float32),
      "norm": random.standard_normal((6,), dtype=np.float32),
      "experts": random.standard_normal((3, 4, 5), dtype=np.float32),
      "count": np.int32(seed),
  } | {
      name: random.standard_normal(8 if axes == () else (8, 4)).astype("f4")
      for name, axes in AXES.items()
      if name.startswith("layers")
  }


def shardings(shape):
  mesh = jax.make_mesh(
      shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
  )
  return {n: NamedSharding(mesh, PartitionSpec(*a)) for n, a in AXES.items()}


def like(shape=None):
  where = shardings(shape) if shape else dict.fromkeys(AXES)
  return {
      name: jax.ShapeDtypeStruct(
          np.shape(leaf), leaf.dtype, sharding=where[name]
      )
      for name, leaf in tree().items()
  }


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path)


class Counting:
  """Counts the bytes of chunks that are written, by thread's store."""

  def __init__(self, monkeypatch):
    self.written = collections.Counter()
    straight = store.Arrays.write_parts

    def write(arrays, folder, parts):
      for name, held in parts.items():
        self.written[arrays, name] += held.nbytes
      straight(arrays, folder, parts)

    monkeypatch.setattr(store.Arrays, "write_parts", write)

  def of(self, bucket):
    return sum(
        n for (one, _), n in self.written.items() if one is bucket.arrays
    )


class Pair:
  """Two processes that publish together."""

  def __init__(self, bucket, patience=600.0):
    self.bucket, self.other = bucket, store.open(bucket.url)
    self.first, self.second, self.keys = pair(patience)
    self.helper = Helper(self.other, self.second)
    self.count = 0

  def offer(self, params, number, *, short=False, helps=True):
    topic, self.count = f"publish/{self.count}", self.count + 1
    if helps:
      self.helper.begin(
          params, topic=topic, folder=f"policies/main/v{number}", short=short
      )
    return Shared(params, channel=self.first, topic=topic, short=short)

  def put(self, params, number, *, keep=3, short=False, bases=None):
    offer = self.offer(params, number, short=short)
    return publish.publish(
        self.bucket,
        "main",
        number,
        offer,
        keep=keep,
        meta={"step": number},
        bases=bases,
    )


@pytest.fixture
def both(bucket, monkeypatch):
  """Devices 0 to 3 are process 0's, the others process 1's."""
  monkeypatch.setattr(shards, "process_of", lambda device: device.id // 4)
  shards._regions.cache_clear()
  made = Pair(bucket)
  yield made
  made.helper.close()
  shards._regions.cache_clear()


def same(found, expected):
  return all(
      np.asarray(found[name]).tobytes() == np.asarray(one).tobytes()
      for name, one in expected.items()
  )


def spread(shape, seed=0):
  return jax.tree.map(jax.device_put, tree(seed), shardings(shape))


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2), (1, 2, 4), (4, 2, 1)])
@pytest.mark.parametrize("into", [None, (1, 1, 4), (1, 2, 2), (2, 1, 4)])
def test_what_two_processes_write_is_read_into_any_mesh(both, shape, into):
  both.put(spread(shape), 0)
  weights = publish.read(both.bucket, "main", "latest", like=like(into))
  assert same(weights.params, tree())
  assert weights.meta == {"step": 0}
  if into:
    found = {name: leaf.sharding for name, leaf in weights.params.items()}
    assert found == shardings(into)


def test_one_process_s_version_is_read_into_eight_devices(bucket):
  publish.publish(bucket, "main", 0, tree(), keep=1, meta={})
  weights = publish.read(bucket, "main", 0, like=like((1, 4, 2)))
  assert same(weights.params, tree())


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2), (2, 4, 1)])
def test_each_process_writes_its_part_once(both, monkeypatch, shape):
  counting = Counting(monkeypatch)
  both.put(spread(shape), 0)
  total = sum(one.nbytes for one in tree().values())
  shares = [counting.of(one) for one in (both.bucket, both.other)]
  assert sum(shares) == total
  assert max(shares) < 0.6 * total


def test_chunks_are_the_shards(both, tmp_path):
  both.put(spread((1, 4, 2)), 0)
  path = tmp_path / "policies/main/v0"
  manifest = json.loads((path / "manifest.json").read_text())
  assert manifest["arrays"]["embed"]["chunk"] == [4, 4]
  assert len(manifest["arrays"]["embed"]["digests"]) == 8
  assert manifest["arrays"]["norm"]["chunk"] == [6]
  assert manifest["arrays"]["count"]["chunk"] == []
  files = [f for f in (path / "embed/c").rglob("*") if f.is_file()]
  assert len(files) == 8


def test_a_chunk_of_a_stack_is_the_same_shard_of_some(
    both, monkeypatch, tmp_path
):
  monkeypatch.setattr(chunks, "MAX_BYTES", 2 * 16)  # two shards of a layer
  both.put(spread((1, 4, 2)), 0)
  path = tmp_path / "policies/main/v0"
  manifest = json.loads((path / "manifest.json").read_text())
  names = [f"layers/{layer}/gate" for layer in range(5)]
  shared = shards.shares(spread((1, 4, 2)), short=False)["layers/all/gate"]
  assert shared.owners == 3 * (0, 0, 0, 0, 1, 1, 1, 1)  # whoever has the shard
  assert manifest["stacks"] == {"layers/all/gate": names}
  said = manifest["arrays"]["layers/all/gate"]
  assert (said["shape"], said["chunk"]) == ([5, 8, 4], [2, 2, 2])
  assert len([*(path / "layers/all/gate/c").rglob("*/*/*")]) == 3 * 8
  for into in (None, (1, 1, 4), (2, 1, 4)):
    weights = publish.read(both.bucket, "main", 0, like=like(into))
    assert same(weights.params, tree())


def test_what_other_devices_have_is_in_no_stack():
  where = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Explicit,) * 2)
  weights = {
      f"{layer}/w": jax.device_put(
          np.ones((4, 2), np.float32), NamedSharding(where, PartitionSpec(axis))
      )
      for layer, axis in enumerate("ab")
  }
  assert [*shards.shares(weights, short=False)] == ["0/w", "1/w"]


def test_large_shards_are_several_chunks(both, monkeypatch, tmp_path):
  monkeypatch.setattr(chunks, "MAX_BYTES", 40)
  both.put(spread((1, 4, 2)), 0)
  assert (tmp_path / "policies/main/v0/embed/c/7/1").stat().st_size == 32
  weights = publish.read(both.bucket, "main", 0, like=like((1, 2, 4)))
  assert same(weights.params, tree())


def test_a_damaged_chunk_of_two_processes_is_named(both, tmp_path):
  both.put(spread((1, 4, 2), 0), 0)
  both.put(spread((1, 4, 2), 1), 1)
  path = tmp_path / "policies/main/v1/embed/c/3/1"
  data = bytearray(path.read_bytes())
  data[0] ^= 1
  path.write_bytes(data)
  weights = publish.read(both.bucket, "main", "latest", like=like())
  assert weights.version.number == 0
  assert weights.skipped[0].endswith("digests differ: embed/c/3/1")


def test_short_weights_of_two_processes_come_back_rounded(both, monkeypatch):
  counting = Counting(monkeypatch)
  both.put(spread((2, 2, 2)), 0, short=True)
  found = publish.read(both.bucket, "main", 0, like=like((1, 4, 2))).params
  for name, leaf in tree().items():
    wide = leaf.dtype == np.float32
    rounded = leaf.astype(jax.numpy.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found[name], rounded if wide else leaf)
  total = sum(one.nbytes for one in tree().values()) // 2 + 2  # and an int32
  assert sum(counting.written.values()) == total


def test_the_same_weights_again_are_not_written_again(both, monkeypatch):
  version = both.put(spread((2, 2, 2)), 0).version
  both.put(spread((2, 2, 2), 1), 1)
  counting = Counting(monkeypatch)
  assert both.put(spread((2, 2, 2)), 0).version == version
  assert not counting.written
  assert publish.latest(both.bucket, "main").number == 0
  both.put(spread((1, 4, 2), 2), 2)  # both still take part
  assert publish.versions(both.bucket, "main") == [0, 2]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("into", [None, (1, 2, 4)])
def test_each_process_writes_the_differences_of_its_chunks(
    both, monkeypatch, short, into
):
  counting, bases = Counting(monkeypatch), Bases(3)
  for number in range(5):
    both.put(
        spread((1, 4, 2), number), number, short=short, bases=bases, keep=9
    )
  formats = []
  for number in range(5):
    text = both.bucket.get(f"policies/main/v{number}/manifest.json")
    formats.append(json.loads(text)["format"])
    found = publish.read(both.bucket, "main", number, like=like(into)).params
    expected = tree(number)
    if short:
      wide = {n: a.dtype == np.float32 for n, a in expected.items()}
      expected = {
          n: a.astype(jax.numpy.bfloat16).astype(np.float32) if wide[n] else a
          for n, a in expected.items()
      }
    assert same(found, expected)
  assert formats == [5, 6, 6, 5, 6]
  total = sum(one.nbytes for one in tree().values())
  total = 5 * (total // 2 + 2 if short else total)  # words are as wide
  shares = [counting.of(one) for one in (both.bucket, both.other)]
  assert sum(shares) == total
  assert max(shares) < 0.6 * total


@pytest.mark.parametrize("who", ["bucket", "other"])
def test_after_a_base_that_failed_both_begin_with_a_whole_one(
    both, monkeypatch, who
):
  bases, straight = Bases(2), store.Arrays.write_parts
  for number in range(2):
    both.put(spread((1, 4, 2), number), number, bases=bases)

  def write(arrays, folder, parts):
    if arrays is getattr(both, who).arrays:
      raise atomic.StorageError(f"cannot write {folder}: No space left")
    straight(arrays, folder, parts)

  with monkeypatch.context() as broken:
    broken.setattr(store.Arrays, "write_parts", write)
    with pytest.raises(atomic.StorageError, match="v2: No space left"):
      both.put(spread((1, 4, 2), 2), 2, bases=bases)
  for number in (3, 4):
    both.put(spread((1, 4, 2), number), number, bases=bases)
    found = publish.read(both.bucket, "main", "latest", like=like())
    assert found.version.number == number
    assert same(found.params, tree(number))
  text = both.bucket.get("policies/main/v4/manifest.json")
  assert json.loads(text)["base"]["number"] == 3


def test_after_a_past_version_that_failed_both_begin_with_a_whole_one(
    both, monkeypatch
):
  """The other process has kept its part of that one in place of the base."""
  bases = Bases(9)
  both.put(spread((1, 4, 2), 2), 2, bases=bases)

  def full(folder, parts):
    raise atomic.StorageError(f"cannot write {folder}: No space left")

  with monkeypatch.context() as broken:
    broken.setattr(both.bucket.arrays, "write_parts", full)
    with pytest.raises(atomic.StorageError, match="v1: No space left"):
      both.put(spread((1, 4, 2), 1), 1, bases=bases)
  both.put(spread((1, 4, 2), 3), 3, bases=bases)
  found = publish.read(both.bucket, "main", "latest", like=like())
  assert found.version.number == 3 and same(found.params, tree(3))


def test_who_has_no_base_says_so(both):
  bases = Bases(9)
  both.put(spread((1, 4, 2)), 0, bases=bases)
  both.helper.close()
  both.helper = Helper(both.other, both.second)  # started anew, alone
  with pytest.raises(
      atomic.StorageError,
      match="^process 1 of this job: .*policies/main/v0 is not kept here",
  ):
    both.put(spread((1, 4, 2), 1), 1, bases=bases)
  assert publish.versions(both.bucket, "main") == [0]


def test_nothing_is_left_in_the_key_value_store(both):
  for number in range(3):
    both.put(spread((2, 2, 2), number), number)
  assert not both.keys.values


def test_where_all_are_whole_nothing_is_kept(both):
  both.put(spread((2, 2, 2)), 0)
  assert both.helper._kept == ("", {})


@pytest.mark.parametrize("who", ["bucket", "other"])
def test_what_one_process_cannot_write_is_told(
    both, monkeypatch, tmp_path, who
):
  both.put(spread((1, 4, 2)), 0)
  straight = store.Arrays.write_parts
  finished = threading.Event()

  def write(arrays, folder, parts):
    if arrays is getattr(both, who).arrays:
      raise atomic.StorageError(f"cannot write {folder}: No space left")
    straight(arrays, folder, parts)
    finished.set()

  monkeypatch.setattr(store.Arrays, "write_parts", write)
  named = "process 1 of this job: " if who == "other" else ""
  with pytest.raises(
      atomic.StorageError, match=f"^{named}cannot write .*v1: No space left$"
  ):
    both.put(spread((1, 4, 2), 1), 1)
  assert finished.is_set()  # the other one's chunks are removed, too
  monkeypatch.undo()
  both.bucket.settle()
  assert not (tmp_path / "policies/main/v1").exists()
  assert publish.latest(both.bucket, "main").number == 0


def test_what_one_process_cannot_describe_is_told(both, monkeypatch):
  straight = shards.held

  def held(tree, shared, process):
    if process:
      raise MemoryError("no room\nat all")
    return straight(tree, shared, process)

  monkeypatch.setattr(shards, "held", held)
  with pytest.raises(
      atomic.StorageError, match="^process 1 of this job: MemoryError: no room$"
  ):
    both.put(spread((1, 4, 2)), 0)
  assert both.bucket.list() == []


def test_a_process_that_says_nothing_is_named(both):
  both.first.patience = 0.01
  offer = both.offer(spread((1, 4, 2)), 0, helps=False)
  with pytest.raises(SilentError, match="process 1 of this job has not said"):
    publish.publish(both.bucket, "main", 0, offer, keep=1, meta={})
  assert both.bucket.list() == []


def test_who_may_publish_no_more_has_nobody_write(both):
  def taken():
    raise RuntimeError("another has the job")

  offer = both.offer(spread((1, 4, 2)), 0)
  with pytest.raises(RuntimeError, match="another has the job"):
    publish.publish(both.bucket, "main", 0, offer, keep=1, meta={}, sure=taken)
  both.put(spread((1, 4, 2), 1), 1)  # nobody waits for the word any more
  assert publish.versions(both.bucket, "main") == [1]


def test_who_leaves_does_not_wait_for_a_silent_process(both):
  writer = Writer(
      both.bucket, keep=1, short=False, whole_every=1, tell=lambda _: None
  )
  offer = both.offer(spread((1, 4, 2)), 0, helps=False)
  writer.write("main", 0, offer, meta={})
  both.bucket.hurry(0.1)
  writer.close()
  with pytest.raises(SilentError, match="process 1"):
    writer.settle()


def test_a_helper_that_leaves_waits_for_no_word(both):
  with contextlib.closing(both.offer(spread((1, 4, 2)), 0)) as offer:
    offer.describe(both.bucket)
    both.helper.close()
  assert both.bucket.list() == []
