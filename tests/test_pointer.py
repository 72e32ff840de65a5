"""LATEST: who reads by it gets what it names, who moves it is not overtaken."""

import json

import pytest
from test_publish import LIKE, params, put, read, same

from mgrpo_jax import publish, store

KEY = "policies/main/LATEST"


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path)


def misname(bucket):
  """Has LATEST name another version of the same number."""
  said = json.loads(bucket.get(KEY))
  bucket.put(KEY, json.dumps(said | {"digest": "0" * 64}).encode())


def overtaken(monkeypatch, bucket, name, key, others, *, after=False):
  """Has others do something when a key is used, or when it has been."""
  straight = getattr(bucket, name)

  def use(where, *value):
    if where != key:
      return straight(where, *value)
    monkeypatch.undo()
    if not after:
      others()
    found = straight(where, *value)
    if after:
      others()
    return found

  monkeypatch.setattr(bucket, name, use)


def test_a_version_of_another_digest_than_is_named_is_skipped(bucket):
  for number in range(2):
    put(bucket, number)
  misname(bucket)
  weights = read(bucket)
  assert weights.version.number == 0 and same(weights.params, params(0))
  (line,) = weights.skipped
  assert "version 1" in line and "not the one that LATEST names" in line
  assert same(read(bucket, 1).params, params(1))
  put(bucket, 1)  # publishing again heals it
  assert read(bucket).version.number == 1


def test_where_no_other_version_is_there_is_none(bucket):
  put(bucket, 0)
  misname(bucket)
  with pytest.raises(publish.NoVersionError, match="version 0 .* LATEST names"):
    read(bucket)


def test_what_is_published_anew_while_it_is_read_is_read(bucket, monkeypatch):
  for number in range(2):
    put(bucket, number)
  other = store.open(bucket.url)
  overtaken(
      monkeypatch,
      bucket,
      "get",
      KEY,
      lambda: put(other, 1, seed=100, keep=1),
      after=True,
  )
  weights = read(bucket)
  assert weights.version.number == 1 and same(weights.params, params(100))
  assert weights.skipped == ()


def test_what_was_skipped_is_read_when_the_one_before_it_has_gone(
    bucket, monkeypatch
):
  """A resumed run had written its manifest and not yet moved the pointer."""
  for number in range(2):
    put(bucket, number)
  misname(bucket)
  other = store.open(bucket.url)
  overtaken(
      monkeypatch,
      bucket,
      "get",
      "policies/main/v0/manifest.json",
      lambda: put(other, 1, seed=100, keep=1),
  )
  weights = publish.read(bucket, "main", "latest", like=LIKE)
  assert weights.version.number == 1 and same(weights.params, params(100))
  assert weights.skipped == ()


@pytest.mark.parametrize("when", ["before", "at once"])
def test_who_was_overtaken_without_compare_and_swap_is_told(
    bucket, monkeypatch, when
):
  other = store.open(bucket.url)
  bucket._can_swap = other._can_swap = False
  put(bucket, 0)

  def others():
    put(other, 1, seed=100)

  if when == "before":
    key = "policies/main/v2/manifest.json"
    overtaken(monkeypatch, bucket, "put", key, others)
  else:
    overtaken(monkeypatch, bucket, "put", KEY, others, after=True)
  with pytest.raises(publish.OvertakenError, match="another process publishes"):
    put(bucket, 2)
  weights = read(bucket)
  assert weights.version.number == 1 and same(weights.params, params(100))


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("newer", [1, 2])
def test_who_publishes_what_is_there_is_told_too(
    bucket, monkeypatch, swaps, newer
):
  """A run that resumes does; its pointer says already what it would write."""
  other = store.open(bucket.url)
  if not swaps:
    bucket._can_swap = other._can_swap = False
  for number in range(2):
    put(bucket, number)
  manifest = "policies/main/v1/manifest.json"
  overtaken(
      monkeypatch,
      bucket,
      "get",
      manifest,
      lambda: put(other, newer, seed=100),
  )
  with pytest.raises(publish.OvertakenError):
    put(bucket, 1)
  assert newer in publish.versions(bucket, "main")


def test_without_compare_and_swap_one_publisher_goes_on(bucket):
  bucket._can_swap = False
  for number in (0, 1, 1, 2, 1):
    put(bucket, number)
    assert read(bucket).version.number == number
