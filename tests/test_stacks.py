"""Arrays of equal form, in one array and back."""

import json
import types

import jax
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo_jax import (
    arrays,
    chunks,
    contents,
    manifest,
    publish,
    stacks,
    store,
    zarr,
)
from mgrpo_jax.chunks import Parts
from mgrpo_jax.hosts import shards


def planned(arrays, **kinds):
  grids = {name: chunks.grid(array) for name, array in arrays.items()}
  return stacks.plan(grids, dict.fromkeys(grids) | kinds)


def layers(count, shape=(2, 3), name="layers/{}/w"):
  random = np.random.default_rng(count)
  return {
      name.format(n): random.standard_normal(shape, np.float32)
      for n in range(count)
  }


def test_names_that_differ_in_numbers_are_a_stack():
  arrays = layers(12) | layers(2, (4,), "layers/{}/b") | {"w": np.ones(3)}
  assert planned(arrays) == {
      "layers/all/w": [f"layers/{n}/w" for n in range(12)],
      "layers/all/b": ["layers/0/b", "layers/1/b"],
  }


def test_arrays_of_experts_are_stacked_across_layers():
  arrays = layers(2, name="0/{}") | layers(2, name="1/{}")
  assert planned(arrays) == {"all/all": ["0/0", "0/1", "1/0", "1/1"]}


@pytest.mark.parametrize(
    "change",
    [
        {"layers/1/w": np.ones((3, 2), np.float32)},
        {"layers/1/w": np.ones((2, 3), np.float16)},
        {"layers/all/w/c": np.ones(1)},  # which lies where the stack would
    ],
)
def test_what_is_not_alike_stays_as_it_is(change):
  assert not planned(layers(3) | change)
  assert not planned(layers(3), **{"layers/2/w": "elsewhere"})
  assert not planned(layers(1))


def test_arrays_of_which_no_two_fit_a_chunk_stay_as_they_are(monkeypatch):
  monkeypatch.setattr(chunks, "MAX_BYTES", 2 * 24)
  assert planned(layers(3))
  monkeypatch.setattr(chunks, "MAX_BYTES", 2 * 24 - 1)
  assert not planned(layers(3))


@settings(deadline=None)
@given(
    st.integers(2, 9),
    st.lists(st.integers(0, 4), max_size=2),
    st.integers(8, 200),
)
def test_arrays_come_back_from_stacks_and_from_parts_of_them(
    count, shape, limit
):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunks, "MAX_BYTES", limit)
    arrays = {"a": np.ones(2)} | layers(count, shape) | {"z": np.ones(1)}
    laid = planned(arrays)
    found = stacks.gather(arrays, laid)
    assert list(found) == (["a", "layers/all/w", "z"] if laid else [*arrays])
    whole = {
        name: held[tuple(slice(None) for _ in held.shape)]
        for name, held in found.items()
    }
    apart = stacks.scatter(whole, laid)
  assert {n: held.nbytes for n, held in found.items()} == {
      n: array.nbytes for n, array in whole.items()
  }
  assert list(apart) == list(arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(apart[name], array)
    assert isinstance(apart[name], np.ndarray)
  for name, members in laid.items():
    assert (
        all(np.shares_memory(apart[one], whole[name]) for one in members)
        or not whole[name].size
    )
    cut, pieces = found[name].grid, found[name].pieces
    own = stacks.of_member(cut)
    for at, member in enumerate(members):
      first = stacks.first(cut, at)
      some = {first + n: pieces[first + n] for n in range(len(own))}
      one = stacks.scatter(
          {name: Parts(grid=cut, pieces=some)}, {name: members}
      )[member]
      assert one.grid == own
      np.testing.assert_array_equal(
          one[tuple(slice(None) for _ in shape)], arrays[member]
      )


def test_a_stack_is_a_zarr_array_that_other_programs_read(tmp_path):
  bucket = store.open_folder(tmp_path)
  arrays = layers(5)
  publish.publish(bucket, "main", 0, arrays, keep=1, meta={})
  folder = tmp_path / "policies/main/v0"
  said = json.loads((folder / "manifest.json").read_text())
  (name,) = said["arrays"]
  source = ts.open(
      {"driver": "zarr3", "kvstore": f"file://{folder}/{name}/"}
  ).result()
  found = source.read().result()
  for one, member in zip(found, said["stacks"][name], strict=True):
    np.testing.assert_array_equal(one, arrays[member])
  files = [path for path in folder.rglob("*") if path.is_file()]
  assert len(files) == 4  # with the array's form, manifest and time


def test_few_chunks_of_stacks_are_copied_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(chunks, "MAX_BYTES", 2 * 24)  # two layers
  monkeypatch.setattr(arrays, "_COPIED", 2 * 48 + 1)
  straight, copied, most = zarr.write, [], []

  class Write:
    """One that is under way until it is waited for."""

    def __init__(self, target, piece):
      copied.append(piece.nbytes)
      most.append(sum(copied))
      self.write = straight(target, piece)

    def result(self, timeout):
      self.write.result(timeout=timeout)
      copied.pop()

    def cancel(self):
      self.write.cancel()

  monkeypatch.setattr(zarr, "write", Write)
  bucket, weights = store.open_folder(tmp_path), layers(40)
  publish.publish(bucket, "main", 0, weights, keep=1, meta={})
  assert (len(most), max(most)) == (20, 3 * 48)
  found = publish.read(bucket, "main", 0, like=weights).params
  assert all((found[name] == one).all() for name, one in weights.items())


@pytest.mark.parametrize("short", [False, True])
def test_stacks_are_rounded_as_their_arrays_are(tmp_path, short):
  bucket = store.open_folder(tmp_path)
  arrays = layers(5)
  publish.publish(bucket, "main", 0, arrays, keep=1, meta={}, short=short)
  found = publish.read(bucket, "main", 0, like=arrays).params
  for name, array in arrays.items():
    kept = array.astype(jax.numpy.bfloat16).astype("f4") if short else array
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], kept)


def test_what_had_other_dtypes_before_they_were_rounded_is_in_no_stack(
    tmp_path,
):
  bucket = store.open_folder(tmp_path)
  arrays = layers(3)
  arrays["layers/1/w"] = arrays["layers/1/w"].astype(jax.numpy.bfloat16)
  publish.publish(bucket, "main", 0, arrays, keep=1, meta={}, short=True)
  found = publish.read(bucket, "main", 0, like=arrays).params
  on_devices = jax.tree.map(jax.numpy.asarray, arrays)
  assert shards.shares(on_devices, short=True).keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype


def test_of_several_processes_each_reads_its_chunks_of_a_stack(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(chunks, "MAX_BYTES", 2 * 24)  # two layers
  bucket = store.open_folder(tmp_path)
  arrays = layers(5) | {"w": np.ones((2, 3), np.float32)}
  publish.publish(bucket, "main", 0, arrays, keep=1, meta={})
  read, straight = {}, store.Arrays.read_parts

  def listen(self, folder, wanted, seen):
    read.update({name: numbers for name, (_, numbers) in wanted.items()})
    return straight(self, folder, wanted, seen)

  monkeypatch.setattr(store.Arrays, "read_parts", listen)

  def leaf(*rows):
    regions = {row: (slice(row, row + 1), slice(0, 3)) for row in rows}
    where = types.SimpleNamespace(
        is_fully_addressable=False,
        addressable_devices_indices_map=lambda shape: regions,
    )
    return types.SimpleNamespace(shape=(2, 3), sharding=where)

  text = bucket.get("policies/main/v0/manifest.json")
  said = manifest.parse(text, "main", 0)
  like = {f"layers/{n}/w": leaf(*([1] if n > 3 else [])) for n in range(5)}
  found = contents.read(bucket, said, like | {"w": leaf(0)})
  assert read == {"layers/all/w": [2], "w": [0]}
  apart = stacks.scatter(found, said["stacks"])
  np.testing.assert_array_equal(
      apart["layers/4/w"][slice(1, 2), slice(0, 3)], arrays["layers/4/w"][1:]
  )
  one = {"layers/2/w": np.ones((2, 3))}  # which is all of this process's
  found = contents.read(bucket, said, like | one | {"w": leaf(0)})
  apart = stacks.scatter(found, said["stacks"])
  np.testing.assert_array_equal(apart["layers/2/w"], arrays["layers/2/w"])
