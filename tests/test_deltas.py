"""Versions that are stored as differences to whole ones."""

import json
import math
import pathlib
import shutil
import types
import uuid

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_publish import damage

from mgrpo_jax import (
    atomic,
    chunks,
    contents,
    deltas,
    leaves,
    publish,
    store,
)
from mgrpo_jax import manifest as manifests
from mgrpo_jax.bases import Bases
from mgrpo_jax.chunks import Grid

DTYPES = (np.float32, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_)
ODD = np.array(  # bits of float32: NaNs, zeros, denormals, infinities, numbers
    [0x7FC00000, 0x7F800001, 0xFFC12345, 0, 1 << 31, 1, 0x80000001]
    + [0x7F800000, 0xFF800000, 0x3F800000, 0xC0490FDB, 0x007FFFFF],
    np.uint32,
)


def tree(number: int) -> dict:
  """Weights of a version, which differ a little from those before."""
  rng = np.random.default_rng(0)
  first = rng.standard_normal((16, 8), dtype=np.float32)
  steps = np.random.default_rng(number).standard_normal((16, 8)) * number
  return {
      "embed": (first * (1 + 1e-4 * steps)).astype(np.float32),
      "odd": np.roll(ODD, number).view(np.float32).reshape(4, 3),
      "short": np.roll(ODD, number).view(ml_dtypes.bfloat16),
      "same": np.arange(5, dtype=np.int32),
      "count": np.int32(number),
      "none": np.zeros((0, 3), np.float32),
  }


LIKE = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in tree(0).items()}


def bits(params) -> dict:
  return {n: np.asarray(a).tobytes() for n, a in params.items()}


@pytest.fixture
def bucket(tmp_path) -> store.Store:
  return store.open_folder(tmp_path)


def put(bucket, number, bases, *, keep=99, params=None, short=False):
  return publish.publish(
      bucket,
      "main",
      number,
      tree(number) if params is None else params,
      keep=keep,
      meta={"step": number},
      short=short,
      bases=bases,
  )


def read(bucket, number="latest"):
  return publish.read(bucket, "main", number, like=LIKE)


def base_of(bucket, number) -> int | None:
  """The version that one is the difference to; checks its format."""
  text = bucket.get(f"policies/main/v{number}/manifest.json")
  manifest = manifests.parse(text, "main", number)
  base = manifests.base(manifest)
  assert manifest["format"] == (5 if base is None else 6)
  return base and base[0]


def fill(bucket, count, whole_every, **kwargs):
  bases = Bases(whole_every)
  for number in range(count):
    put(bucket, number, bases, **kwargs)
  return bases


@st.composite
def pairs(draw):
  """Two arrays of any bits, of one form, and how they are cut."""
  dtype = np.dtype(draw(st.sampled_from(DTYPES)))
  shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
  highest = 1 if dtype == np.bool_ else 255
  size = math.prod(shape) * dtype.itemsize
  raw = hnp.arrays(np.uint8, size, elements=st.integers(0, highest))
  two = [draw(raw).view(dtype).reshape(shape) for _ in range(2)]
  chunk = tuple(draw(st.integers(1, 5)) for _ in shape)
  return two, Grid(shape=shape, dtype=dtype, chunk=chunk)


@settings(deadline=None)
@given(pairs())
def test_a_difference_makes_its_base_what_it_was_taken_from(drawn):
  (new, old), grid = drawn
  held = {"w": chunks.parts(new, grid)}, {"w": chunks.parts(old, grid)}
  change = deltas.between(*held)["w"]
  assert change.dtype == deltas.words(grid).dtype and change.dtype.kind == "u"
  kept = old.tobytes()
  made = deltas.apply(held[1]["w"], change)
  for number, piece in held[0]["w"].pieces.items():
    assert made.pieces[number].tobytes() == piece.tobytes()
  assert (made.shape, made.dtype) == (new.shape, new.dtype)
  words = np.asarray(new.view(change.dtype) ^ old.view(change.dtype))
  assert deltas.apply(old, words).tobytes() == new.tobytes()
  assert old.tobytes() == kept


@settings(max_examples=20, deadline=None)
@given(st.lists(pairs(), min_size=1, max_size=3), st.booleans())
def test_any_bits_come_back_from_a_store(drawn, twice):
  bucket, bases = store.open(f"memory://{uuid.uuid4().hex}"), Bases(2)
  versions = [
      {str(at): two[one] for at, (two, _) in enumerate(drawn)}
      for one in (0, 1, 0 if twice else 1)
  ]
  like = {
      name: jax.ShapeDtypeStruct(a.shape, a.dtype)
      for name, a in versions[0].items()
  }
  for number, params in enumerate(versions):
    put(bucket, number, bases, params=params)
  assert [base_of(bucket, n) for n in range(3)] == [None, 0, None]
  for number, params in enumerate(versions):
    found = publish.read(bucket, "main", number, like=like).params
    assert bits(found) == bits(params)


@pytest.mark.parametrize("short", [False, True])
def test_versions_across_several_whole_ones_are_read_bit_for_bit(bucket, short):
  fill(bucket, 8, 3, short=short)
  assert [base_of(bucket, n) for n in range(8)] == [
      None, 0, 0, None, 3, 3, None, 6,
  ]  # fmt: skip
  plain = store.open(f"memory://{uuid.uuid4().hex}")
  for number in range(8):
    found = read(bucket, number)
    publish.publish(
        plain, "main", number, tree(number), keep=1, meta={}, short=short
    )
    whole = publish.read(plain, "main", number, like=LIKE)
    assert bits(found.params) == bits(whole.params)
    assert short or bits(found.params) == bits(tree(number))
    assert found.meta == {"step": number}
  assert read(bucket).version.number == 7


def test_what_is_stored_is_packed_words_that_any_zarr_reader_has(
    bucket, tmp_path
):
  fill(bucket, 2, 2)
  path = tmp_path / "policies/main/v1"
  for name, kind in (("embed", "uint32"), ("short", "uint16")):
    said = json.loads((path / name / "zarr.json").read_text())
    assert said["data_type"] == kind
    raw, blosc = said["codecs"]
    assert raw == {"name": "bytes", "configuration": {"endian": "little"}}
    assert blosc["name"] == "blosc"
    assert blosc["configuration"]["cname"] == "zstd"
    assert blosc["configuration"]["shuffle"] == "shuffle"
    assert blosc["configuration"]["typesize"] == np.dtype(kind).itemsize
  words = bucket.read_arrays("policies/main/v1", ["embed"])["embed"]
  expected = [tree(n)["embed"].view(np.uint32) for n in (0, 1)]
  np.testing.assert_array_equal(words, expected[0] ^ expected[1])
  files = [f.name for f in (path / "same").rglob("*") if f.is_file()]
  assert files == ["zarr.json"]  # nothing changed, so no chunk lies there


def test_small_changes_take_few_bytes(bucket, tmp_path):
  rng = np.random.default_rng(0)
  weights = rng.standard_normal((64, 64), dtype=np.float32)
  bases, sizes = Bases(2), []
  for number in range(2):
    put(bucket, number, bases, params={"w": weights}, short=True)
    file = tmp_path / f"policies/main/v{number}/w/c/0/0"
    sizes.append(file.stat().st_size)
    weights = weights * np.float32(1.0001)
  assert sizes[0] == weights.nbytes // 2
  assert sizes[1] < 0.2 * sizes[0]  # one weight in 50 differs as bfloat16


def test_without_differences_bytes_are_as_they_were(bucket, tmp_path):
  fill(bucket, 3, 1)
  plain = store.open(f"memory://{uuid.uuid4().hex}")
  for number in range(3):
    assert base_of(bucket, number) is None
    manifest = json.loads(bucket.get(f"policies/main/v{number}/manifest.json"))
    digest = put(plain, number, None).version.digest
    assert manifest["digest"] == digest
    chunk = tmp_path / f"policies/main/v{number}/embed/c/0/0"
    assert chunk.read_bytes() == tree(number)["embed"].tobytes()


def test_a_difference_is_read_into_another_mesh(bucket):
  def sharded(shape, names, parts):
    mesh = jax.make_mesh(shape, names)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))

  one = sharded((4, 2), ("fsdp", "tensor"), ("fsdp", "tensor"))
  other = sharded((2, 4), ("data", "tensor"), (None, "tensor"))
  bases = Bases(9)
  for number in range(2):
    spread = {"embed": jax.device_put(tree(number)["embed"], one)}
    put(bucket, number, bases, params=spread)
  assert base_of(bucket, 1) == 0
  like = {"embed": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=other)}
  found = publish.read(bucket, "main", 1, like=like).params["embed"]
  assert found.sharding == other
  assert np.asarray(found).tobytes() == tree(1)["embed"].tobytes()


def test_of_several_processes_each_reads_its_chunks_of_both(
    bucket, monkeypatch
):
  monkeypatch.setattr(chunks, "MAX_BYTES", 128)  # four rows of embed
  fill(bucket, 2, 2)
  regions = {"mine": (slice(4, 8), slice(0, 8))}
  where = types.SimpleNamespace(
      is_fully_addressable=False,
      addressable_devices_indices_map=lambda shape: regions,
  )
  mine = types.SimpleNamespace(shape=(16, 8), sharding=where)
  text = bucket.get("policies/main/v1/manifest.json")
  manifest = manifests.parse(text, "main", 1)
  counted = {}
  straight = store.Arrays.read_parts

  def counting(arrays, folder, wanted, seen):
    counted[folder] = {name: numbers for name, (_, numbers) in wanted.items()}
    return straight(arrays, folder, wanted, seen)

  monkeypatch.setattr(store.Arrays, "read_parts", counting)
  found = contents.read(bucket, manifest, LIKE | {"embed": mine})
  assert counted == {f"policies/main/v{n}": {"embed": [1]} for n in range(2)}
  assert found["embed"].dtype == np.float32
  part = found["embed"][regions["mine"]]
  assert part.tobytes() == tree(1)["embed"][4:8].tobytes()
  assert found["odd"].tobytes() == tree(1)["odd"].tobytes()
  damage(
      pathlib.Path(bucket.url.removeprefix("file://"))
      / "policies/main/v0/embed/c/1/0",
      "flip",
  )
  with pytest.raises(atomic.CorruptError, match=r"differ: embed/c/1/0 \(it is"):
    contents.read(bucket, manifest, LIKE | {"embed": mine})


def test_s3_holds_differences_too(s3_endpoint):
  name = uuid.uuid4().hex
  bucket = store.open(f"s3://my-bucket/{name}?endpoint={s3_endpoint}")
  fill(bucket, 4, 3, keep=1)
  assert publish.versions(bucket, "main") == [3]
  fill(bucket, 3, 3, keep=1)
  assert publish.versions(bucket, "main") == [0, 2]
  assert bits(read(bucket).params) == bits(tree(2))


@pytest.mark.parametrize("how", ["delete", "truncate", "empty", "flip"])
@pytest.mark.parametrize("what", ["manifest.json", "embed/c/0/0"])
def test_a_damaged_base_leads_to_the_version_before_it(
    bucket, tmp_path, how, what
):
  fill(bucket, 5, 2)  # 0 and 2 and 4 are whole
  damage(tmp_path / "policies/main/v4" / what, how)
  damage(tmp_path / "policies/main/v2" / what, how)
  found = read(bucket)
  assert found.version.number == 1
  assert bits(found.params) == bits(tree(1))
  lines = dict(zip((4, 3, 2), found.skipped, strict=False))
  assert "version 3 of main" in lines[3]
  assert "it is the difference to version 2" in lines[3]
  for number in (3, 4):
    with pytest.raises((atomic.CorruptError, publish.NoVersionError)):
      read(bucket, number)


@pytest.mark.parametrize("how", ["delete", "truncate", "empty", "flip"])
def test_a_damaged_difference_leads_to_the_one_before(bucket, tmp_path, how):
  fill(bucket, 4, 9)
  damage(tmp_path / "policies/main/v3/embed/c/0/0", how)
  found = read(bucket)
  assert found.version.number == 2
  (line,) = found.skipped
  assert line.startswith("version 3 of main in ")
  assert bits(read(bucket, 2).params) == bits(tree(2))


def test_a_base_that_is_gone_another_or_no_base_is_told(bucket, tmp_path):
  fill(bucket, 3, 9)
  root = tmp_path / "policies/main"
  shutil.copytree(root, tmp_path / "kept")

  def refused(line):
    text = rf"version 2 of main in .* is corrupt: {line} \(it is the diff"
    with pytest.raises(atomic.CorruptError, match=text):
      read(bucket, 2)
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "kept", root)
    assert bits(read(bucket, 2).params) == bits(tree(2))

  def rebased(change):
    body = json.loads((root / "v2/manifest.json").read_text())
    body.pop("digest")
    text = json.dumps(leaves.seal(body | change))
    (root / "v2/manifest.json").write_text(text)

  shutil.rmtree(root / "v0")
  refused("its base is not in the store")
  shutil.rmtree(root / "v0")
  put(store.open_folder(tmp_path / "other"), 0, None, params=tree(5))
  shutil.copytree(tmp_path / "other/policies/main/v0", root / "v0")
  refused("its base is another one by now")
  other = json.loads((root / "v1/manifest.json").read_text())["digest"]
  rebased({"base": {"number": 1, "digest": other}})
  refused("its base is not whole")
  arrays = json.loads((root / "v2/manifest.json").read_text())["arrays"]
  arrays["embed"] |= {"chunk": [8, 8], "digests": ["", ""]}
  rebased({"arrays": arrays})
  refused("its base is cut otherwise")
  integers = np.zeros((16, 8), np.int32)
  bucket.write_arrays("policies/main/v2", {"embed": integers})
  refused("policies/main/v2/embed is another array")
  bucket.write_arrays("policies/main/v0", {"embed": integers})
  refused("policies/main/v0/embed is another array")
  numbers = ("0", -1, 2, 3, 10**600)  # itself, later ones, none that has a key
  named = [{"number": number, "digest": other} for number in numbers]
  for base in (None, 0, {}, *named):
    rebased({"base": base})
    with pytest.raises(atomic.CorruptError, match="does not name its base"):
      read(bucket, 2)


def test_who_keeps_the_base_reads_what_differs_and_no_more(
    bucket, tmp_path, monkeypatch
):
  asked, straight = [], bucket.read_arrays

  def reading(prefix, names, seen, forms):
    asked.append(prefix.rpartition("/")[2])
    return straight(prefix, names, seen, forms)

  monkeypatch.setattr(bucket, "read_arrays", reading)
  held, bases = contents.Held(), Bases(4)
  expected = {0: ["v0"], 1: ["v0", "v1"], 4: ["v4"], 5: ["v4", "v5"]}
  for number in range(7):
    put(bucket, number, bases)
    asked.clear()
    found = publish.read(bucket, "main", "latest", like=LIKE, held=held)
    assert bits(found.params) == bits(tree(number))
    assert asked == expected.get(number, [f"v{number}"])
  asked.clear()
  read_again = [
      publish.read(bucket, "main", n, like=LIKE, held=held) for n in (4, 6)
  ]
  assert [one.version.number for one in read_again] == [4, 6]
  assert asked == ["v4", "v4", "v6"]  # whole ones free what was kept
  held.find(
      manifests.base(
          manifests.unsealed(bucket.get("policies/main/v6/manifest.json"))
      )[1],
      {},
  )["embed"][0, 0] += 1
  found = publish.read(bucket, "main", "latest", like=LIKE, held=held)
  assert found.version.number == 6 and found.skipped == ()  # read again
  assert bits(found.params) == bits(tree(6))
  asked.clear()
  damage(tmp_path / "policies/main/v6/embed/c/0/0", "flip")
  found = publish.read(bucket, "main", "latest", like=LIKE, held=held)
  assert found.version.number == 5 and len(found.skipped) == 1
  assert bits(found.params) == bits(tree(5))
