"""Pytrees as named arrays on the host, with digests.

What weights and checkpoints have in common: a pytree is a set of named arrays
(`layers/0/attention/query`), each known by shape, dtype and the sha256 of its
bytes; a record is JSON that carries its own digest. Nothing here compiles:
devices are left by copying and entered by `jax.device_put`.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from mgrpo_jax.atomic import CorruptError, MismatchError

_THREADED = 16 << 20  # bytes from which on threads are worth their start


def named(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a pytree by name.

  Args:
    tree: any pytree.

  Returns:
    Leaves by their path, keys joined with `/`, in the tree's order.

  Raises:
    ValueError: two leaves have the same name.
  """
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in leaves:
      raise ValueError(f"tree: two leaves are named {name!r}")
    leaves[name] = leaf
  return leaves


def list_shards(tree: Any) -> None:
  """Has JAX list the shards of arrays, before several threads look at them.

  It does so at the first look and without a lock (0.10 and 0.11): of two
  threads that look at once one may find some of them, or some twice.

  Args:
    tree: pytree of arrays; what is no `jax.Array` is passed over.
  """
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, jax.Array):
      leaf.addressable_shards  # noqa: B018


def to_host(tree: Any) -> dict[str, np.ndarray]:
  """Brings a pytree's leaves to the host.

  Typed PRNG keys become their uint32 words. What is on the host already is not
  copied.

  Args:
    tree: pytree of arrays.

  Returns:
    Arrays by name, C-contiguous.

  Raises:
    ValueError: a leaf is no array, or lives partly in other processes.
  """
  leaves = named(tree)
  for name, leaf in leaves.items():
    if not hasattr(leaf, "dtype"):
      raise ValueError(f"leaf {name!r} is {type(leaf).__name__}, not an array")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise ValueError(
          f"leaf {name!r} is spread over several processes; gather it first"
      )
    if is_key(leaf):
      leaves[name] = jax.random.key_data(leaf)
  fetched = jax.device_get(leaves)
  return {
      name: _native(np.asarray(x, order="C")) for name, x in fetched.items()
  }


def _native(array: np.ndarray) -> np.ndarray:
  """The same numbers in this machine's order of bytes, little-endian."""
  return array.astype(array.dtype.newbyteorder("="), copy=False)


def from_host(arrays: Mapping[str, Any], like: Any, *, what: str) -> Any:
  """Rebuilds a pytree from named arrays.

  Args:
    arrays: what `to_host` returned; every leaf of `like` and no other. Of what
      goes to devices of several processes, `chunks.Parts` are enough.
    like: pytree of arrays or `jax.ShapeDtypeStruct`s. A leaf goes to
      the sharding of its likeness where that has one, else to the default
      device.
    what: what is being read, for the error message.

  Returns:
    Pytree of `jax.Array`s with the structure of `like`.

  Raises:
    MismatchError: names, shapes or dtypes differ from those of `like`.
  """
  wanted = named(like)
  problems = [f"{name} is missing" for name in wanted if name not in arrays]
  problems += [f"{name} is unknown" for name in arrays if name not in wanted]
  for name in wanted.keys() & arrays.keys():
    shape, dtype = _host_form(wanted[name])
    found = arrays[name]
    if (found.shape, found.dtype) != (shape, dtype):
      problems.append(
          f"{name} is {found.dtype}{list(found.shape)}, "
          f"not {dtype}{list(shape)}"
      )
  if problems:
    raise MismatchError(
        f"{what} does not fit this configuration: {_some(sorted(problems))}"
    )
  values = [_to_device(arrays[name], leaf) for name, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(like), values)


def is_key(leaf: Any) -> bool:
  """Returns whether a leaf is an array of typed PRNG keys."""
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def describe(array: np.ndarray) -> dict[str, Any]:
  """Returns shape, dtype and sha256 of an array, as JSON can hold them."""
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return {
      "shape": list(array.shape),
      "dtype": array.dtype.name,
      "digest": hashlib.sha256(data.data).hexdigest(),
  }


def describe_all(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
  """Describes arrays by name, on as many threads as there are cores."""
  return threaded(describe, arrays)


def threaded(
    work: Callable[..., Any], *arrays: Mapping[str, Any]
) -> dict[str, Any]:
  """Does something to arrays by name, on as many threads as there are cores.

  Args:
    work: takes an array of each mapping, all of one name.
    *arrays: by name, the same names in each.

  Returns:
    What it returned, by name.
  """
  names = list(arrays[0])
  columns = [[held[name] for name in names] for held in arrays]
  if sum(array.nbytes for array in columns[0]) < _THREADED:
    return dict(zip(names, map(work, *columns), strict=True))
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    return dict(zip(names, threads.map(work, *columns), strict=True))


class Checker:
  """Compares arrays with what they should be, in threads; a context manager.

  Leaving it waits for them, and raises CorruptError where an array is missing,
  unexpected or different.
  """

  def __init__(
      self,
      names: Iterable[str],
      differing: Callable[[str, Any], Sequence[str]],
  ) -> None:
    """Begins with nothing.

    Args:
      names: of the arrays.
      differing: names what of an array is not as it should be.
    """
    self._names = set(names)
    self._differing = differing
    self._found: dict[str, concurrent.futures.Future] = {}
    self._threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def add(self, name: str, array: Any) -> None:
    """Starts comparing an array, which must not change meanwhile."""
    self._found[name] = self._threads.submit(self._differing, name, array)

  def __exit__(self, kind: object, *_: object) -> None:
    """Waits, and says what differs unless something else went wrong."""
    self._threads.shutdown(cancel_futures=kind is not None)
    if kind is not None:
      return
    if self._found.keys() != self._names:
      names = sorted(self._found.keys() ^ self._names)
      raise CorruptError(f"arrays missing or unexpected: {_some(names)}")
    if bad := [one for found in self._found.values() for one in found.result()]:
      raise CorruptError(f"digests differ: {_some(bad)}")


def verify(arrays: Mapping[str, np.ndarray], described: Mapping) -> None:
  """Checks arrays against their descriptions.

  Args:
    arrays: what was read, by name.
    described: what `describe` said of them when they were written, by name.

  Raises:
    CorruptError: an array is missing, unexpected or different.
  """

  def differing(name: str, array: np.ndarray) -> list[str]:
    return [] if describe(array) == described.get(name) else [name]

  with Checker(described, differing) as checker:
    for name, array in arrays.items():
      checker.add(name, array)


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a record with its own sha256 under `digest`."""
  return {**body, "digest": digest(dict(body))}


def check_seal(record: Any) -> dict[str, Any]:
  """Returns the body of a sealed record.

  Args:
    record: what `seal` returned, after a trip through JSON.

  Returns:
    The record without its digest.

  Raises:
    CorruptError: it is not what was sealed.
  """
  if not isinstance(record, dict) or "digest" not in record:
    raise CorruptError("the record carries no digest")
  body = {key: value for key, value in record.items() if key != "digest"}
  if digest(body) != record["digest"]:
    raise CorruptError("the record's digest differs")
  return body


def digest(value: Any) -> str:
  """Returns the sha256 of a value's canonical JSON."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _host_form(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
  """Returns the shape and dtype a leaf has on the host."""
  if is_key(leaf):
    leaf, _ = _key_form(leaf)
  return tuple(leaf.shape), np.dtype(leaf.dtype)


def _key_form(leaf: Any) -> tuple[jax.ShapeDtypeStruct, Any]:
  """Returns the words behind typed keys, and what makes keys of words."""
  kinds = []

  def words(key: jax.Array) -> jax.Array:
    kinds.append(jax.random.key_impl(key))
    return jax.random.key_data(key)

  return jax.eval_shape(words, leaf), kinds[0]


def _to_device(array: Any, like: Any) -> jax.Array:
  """Puts an array where `like` lives; uncommitted where `like` is."""
  if is_key(like):
    _, kind = _key_form(like)
    return jax.random.wrap_key_data(jax.device_put(array), impl=kind)
  committed = getattr(like, "committed", True)
  sharding = getattr(like, "sharding", None) if committed else None
  if sharding is None or sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  return jax.make_array_from_callback(
      array.shape, sharding, lambda region: array[region]
  )


def _some(items: list[str]) -> str:
  """Joins the first few of many names."""
  more = f" and {len(items) - 4} more" if len(items) > 4 else ""
  return ", ".join(items[:4]) + more
