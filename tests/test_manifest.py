"""What a manifest says of chunks, and what older ones said."""

import json

import jax
import numpy as np
import pytest
from test_publish import LIKE, damage, params, put, read, same

from mgrpo_jax import atomic, chunks, leaves, publish, stacks, store
from mgrpo_jax import manifest as manifests
from mgrpo_jax.bases import Bases


@pytest.fixture
def bucket(tmp_path) -> store.Store:
  return store.open_folder(tmp_path)


# Of no array, though its one chunk has a digest.
MINUS = {
    "shape": [-16, -4],
    "dtype": "float32",
    "chunk": [16, 4],
    "digests": ["x"],
}


def manifest_of(bucket, number):
  return json.loads(bucket.get(f"policies/main/v{number}/manifest.json"))


def write_manifest(bucket, number, body):
  text = json.dumps(leaves.seal(body)).encode()
  bucket.put(f"policies/main/v{number}/manifest.json", text)


def test_every_chunk_has_its_digest(bucket, monkeypatch):
  monkeypatch.setattr(chunks, "MAX_BYTES", 80)
  put(bucket, 0)
  said = manifest_of(bucket, 0)["arrays"]["embed"]
  assert (said["shape"], said["chunk"]) == ([16, 4], [4, 4])
  rows = np.split(params(0)["embed"], 4)
  assert said["digests"] == [chunks.digest(one) for one in rows]
  assert same(read(bucket).params, params(0))


@pytest.mark.parametrize("how", ["delete", "flip"])
def test_a_damaged_chunk_is_named(bucket, tmp_path, monkeypatch, how):
  monkeypatch.setattr(chunks, "MAX_BYTES", 80)
  for number in range(2):
    put(bucket, number)
  damage(tmp_path / "policies/main/v1/embed/c/2/0", how)
  (line,) = read(bucket).skipped
  assert line.endswith("is corrupt: digests differ: embed/c/2/0")
  assert read(bucket).version.number == 0


def as_it_was(bucket, number, arrays, form):
  """Rewrites a manifest as it was: with sha256, at first of whole arrays."""
  body = manifest_of(bucket, number)
  body.pop("digest")
  held = leaves.to_host(arrays)
  described = leaves.describe_all(held)
  if form == 2:
    described = {
        name: body["arrays"][name] | {"digests": digests(held[name])}
        for name in described
    }
  write_manifest(bucket, number, body | {"format": form, "arrays": described})


def publish_one(bucket, number, bases):
  publish.publish(
      bucket, "main", number, params(number), keep=3, meta={}, bases=bases
  )


def digests(array):
  cut = chunks.grid(array)
  return list(map(chunks.sha256, chunks.parts(array, cut).pieces.values()))


@pytest.mark.parametrize("form", [1, 2])
def test_versions_of_earlier_formats_are_read_and_checked(
    bucket, tmp_path, form
):
  arrays = {
      "w": np.arange(12, dtype=np.float32).reshape(4, 3),
      "scalar": np.float32(3),
      "none": np.zeros((0, 3), np.float32),
  }
  like = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, arrays))
  publish.publish(bucket, "main", 0, arrays, keep=1, meta={})
  as_it_was(bucket, 0, arrays, form)
  assert same(publish.read(bucket, "main", 0, like=like).params, arrays)
  damage(tmp_path / "policies/main/v0/w/c/0/0", "flip")
  with pytest.raises(atomic.CorruptError, match="digests differ: w/c/0/0"):
    publish.read(bucket, "main", 0, like=like)
  publish.publish(bucket, "main", 0, arrays, keep=1, meta={})
  assert manifest_of(bucket, 0)["format"] == 5
  assert same(publish.read(bucket, "main", 0, like=like).params, arrays)


@pytest.mark.parametrize("deltas", [False, True])
def test_versions_from_before_there_were_stacks_are_read(
    bucket, monkeypatch, deltas
):
  """Formats 3 and 4; a difference to such a version is not made."""
  bases = Bases(9 if deltas else 1)
  with monkeypatch.context() as before:
    before.setattr(stacks, "plan", lambda *_: {})
    before.setattr(manifests, "FORMAT", 3)
    before.setattr(manifests, "DELTA_FORMAT", 4)
    for number in range(2):
      publish_one(bucket, number, bases)
  forms = [manifest_of(bucket, number)["format"] for number in range(2)]
  assert forms == [3, 4 if deltas else 3]
  assert manifest_of(bucket, 1)["arrays"].keys() == leaves.named(LIKE).keys()
  for number in range(2):
    assert same(read(bucket, number).params, params(number))
  publish_one(bucket, 2, bases)
  assert manifest_of(bucket, 2)["format"] == 5
  assert manifest_of(bucket, 2)["stacks"]
  assert same(read(bucket).params, params(2))


@pytest.mark.parametrize("form", [4, 6])
def test_a_difference_that_names_no_base_is_corrupt(bucket, form):
  put(bucket, 0)
  body = manifest_of(bucket, 0)
  body.pop("digest")
  write_manifest(bucket, 0, body | {"format": form})
  with pytest.raises(atomic.CorruptError, match="does not name its base"):
    publish.read(bucket, "main", 0, like=LIKE)


def test_a_format_of_tomorrow_is_refused_in_one_line(bucket):
  put(bucket, 0)
  body = manifest_of(bucket, 0)
  body.pop("digest")
  write_manifest(bucket, 0, body | {"format": 7})
  with pytest.raises(ValueError, match="^version 0 of main has format 7, allo"):
    publish.read(bucket, "main", 0, like=LIKE)


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": None},
        {"arrays": []},
        {"arrays": {"embed": None}},
        {"arrays": {"embed": {"shape": [16, 4], "dtype": "float32"}}},
        {"arrays": {"embed": {"dtype": "nothing"}}},
        {"arrays": {"embed": {"shape": 16}}},
        {"arrays": {"embed": {"shape": ["16", "4"]}}},
        {"arrays": {"embed": {"shape": [-16, 4]}}},
        {"arrays": {"embed": {"chunk": [0, 4]}}},
        {"arrays": {"embed": {"chunk": [5]}}},
        {"arrays": {"embed": {"chunk": [17, 4]}}},  # which takes more memory
        {"arrays": {"embed": {"digests": []}}},
        {"arrays": {"embed": {"digests": {"0": "x"}}}},
        {"arrays": {"embed": {"shape": [1 << 70, 4]}}},
        {"arrays": {"embed": MINUS}},
        {"arrays": {"../embed": MINUS}},
        {"arrays": {"": MINUS}},
        {"arrays": {"é": MINUS}},
        {"arrays": {"embed": {"dtype": "(1,"}}},
        {"arrays": {"embed": {"dtype": "S3"}}},
        {"arrays": {"embed": {"digests": [1]}}},
        {"rounded": {"embed": "int8"}},
        {"meta": None},
        {"meta": 1},
        {"rounded": ["embed"]},
        {"rounded": {"nobody": "float32"}},
        {"rounded": {"embed": "nothing"}},
        {"stacks": None},
        {"stacks": ["embed"]},
        {"stacks": {"nobody": ["one"]}},
        {"stacks": {"embed": None}},
        {"stacks": {"embed": "abcdefghijklmnop"}},
        {"stacks": {"embed": ["one"]}},
        {"stacks": {"embed": list(range(16))}},
        {"stacks": {"embed": ["one"] * 16}},
        {"stacks": {"embed": [*"abcdefghijklmno", "layers/all/query"]}},
        {"stacks": {"embed": [*"abcdefghijklmno", {}]}},
    ],
)
def test_what_was_sealed_by_who_does_not_know_the_format_is_corrupt(
    bucket, change
):
  for number in range(2):
    put(bucket, number)
  body = manifest_of(bucket, 1)
  del body["digest"]
  good = body["arrays"]["embed"]
  if isinstance(one := change.get("arrays"), dict):
    ((name, bad),) = one.items()
    bad = good | bad if bad and len(bad) == 1 else bad
    change = {"arrays": body["arrays"] | {name: bad}}
  write_manifest(bucket, 1, body | change)
  weights = read(bucket)
  assert weights.version.number == 0
  assert "does not describe its arrays" in weights.skipped[0]


@pytest.mark.parametrize("name", ["policy", "number", "format", "meta"])
def test_what_lacks_a_part_is_told(bucket, name):
  put(bucket, 0)
  body = manifest_of(bucket, 0)
  del body["digest"], body[name]
  write_manifest(bucket, 0, body)
  with pytest.raises((atomic.CorruptError, atomic.MismatchError)):
    publish.read(bucket, "main", 0, like=LIKE)


@pytest.mark.parametrize("number", [10**600, 2**63])
def test_a_pointer_beyond_all_numbers_is_corrupt(bucket, number):
  put(bucket, 0)
  told = {"number": number, "path": f"policies/main/v{number}", "digest": ""}
  bucket.put("policies/main/LATEST", json.dumps(told).encode())
  assert read(bucket).version.number == 0
