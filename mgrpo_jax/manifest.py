"""What a version's manifest says: shapes, dtypes and digests of its arrays.

A version is whole, or the difference to an earlier one that is: its base.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mgrpo_jax import atomic, chunks, leaves
from mgrpo_jax.chunks import Grid, Parts
from mgrpo_jax.keys import is_key
from mgrpo_jax.stacks import Stacks
from mgrpo_jax.types import PolicyVersion

FORMAT = 5  # of whole versions; before there were stacks, 3
DELTA_FORMAT = 6  # of differences; before there were stacks, 4
_DELTAS = (4, DELTA_FORMAT)
_SHA256 = (1, 2)  # formats whose digests are not BLAKE3
NAMES = {"manifest.json", "published.json"}  # beside a version's arrays
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def path(policy: str, number: int) -> str:
  """Returns where a version lies."""
  return f"policies/{policy}/v{number}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
  """What a version holds.

  Attributes:
    arrays: JSON of each array by name: `shape`, `dtype`, shape of a `chunk` and
      `digests`, of the chunks in C order.
    rounded: dtypes that arrays had before they were rounded, by name.
    stacks: which of the arrays are stacks, and of what.
  """

  arrays: Mapping[str, Mapping[str, Any]]
  rounded: Mapping[str, str]
  stacks: Stacks


def describe(grid: Grid, digests: Iterable[str]) -> dict[str, Any]:
  """Returns what a manifest says of an array.

  Args:
    grid: of the array.
    digests: of its chunks.
  """
  return {
      "shape": list(grid.shape),
      "dtype": grid.dtype.name,
      "chunk": list(grid.chunk),
      "digests": list(digests),
  }


def contents(
    parts: Mapping[str, Parts], rounded: Mapping[str, str], stacks: Stacks
) -> Contents:
  """Describes all chunks of arrays, on as many threads as there are cores.

  Args:
    parts: by name.
    rounded: dtypes that parameters had before they were rounded, by name.
    stacks: which of the arrays are stacks of parameters.
  """

  def one(held: Parts) -> dict[str, Any]:
    return describe(held.grid, map(chunks.digest, held.pieces.values()))

  before = {name: (*stacks.get(name, [name]),)[0] for name in parts}
  return Contents(
      arrays=leaves.threaded(one, parts),
      rounded={n: rounded[m] for n, m in before.items() if m in rounded},
      stacks=stacks,
  )


def make(
    policy: str,
    number: int,
    held: Contents,
    *,
    meta: Mapping[str, Any],
    base: PolicyVersion | None = None,
) -> dict[str, Any]:
  """Returns a sealed manifest.

  Args:
    policy: the policy's name.
    number: of the version.
    held: what the version holds, as it is written.
    meta: JSON kept beside the arrays.
    base: the whole version that what is written is the difference to, if any.

  Raises:
    ValueError: an array has a name that is taken.
  """
  if taken := sorted(NAMES & {name.split("/")[-1] for name in held.arrays}):
    raise ValueError(f"params: a leaf may not be named {taken[0]!r}")
  body = {
      "format": FORMAT if base is None else DELTA_FORMAT,
      "policy": policy,
      "number": number,
      "meta": dict(meta),
      "arrays": dict(held.arrays),
  }
  if held.rounded:
    body["rounded"] = dict(held.rounded)
  if held.stacks:
    body["stacks"] = {name: list(some) for name, some in held.stacks.items()}
  if base is not None:
    body["base"] = {"number": base.number, "digest": base.digest}
  return leaves.seal(body)


def parse(data: bytes, policy: str, number: int) -> dict[str, Any]:
  """Returns a manifest that is what was written for this version.

  Raises:
    CorruptError: it is not.
    MismatchError: it is of another format.
  """
  manifest = unsealed(data)
  if (manifest.get("policy"), manifest.get("number")) != (policy, number):
    raise atomic.CorruptError("the manifest is another version's")
  form = manifest.get("format")
  if type(form) is not int or not 1 <= form <= DELTA_FORMAT:
    raise atomic.MismatchError(
        f"version {number} of {policy} has format {form},"
        f" allowed: 1 to {DELTA_FORMAT}"
    )
  try:
    if form == 1:
      arrays = {n: _in_one(one) for n, one in manifest["arrays"].items()}
      manifest = manifest | {"arrays": arrays}
    if _is_sound(manifest):
      return manifest
  except (
      AttributeError,
      KeyError,
      OverflowError,
      SyntaxError,  # of a dtype
      TypeError,
      ValueError,
  ):
    pass  # it was sealed by something that does not know the format
  raise atomic.CorruptError("the manifest does not describe its arrays")


def base(manifest: Mapping[str, Any]) -> tuple[int, str] | None:
  """Returns the version that this one is a difference to, None for none.

  Args:
    manifest: of any format.

  Returns:
    The base's number, below that of the version, and its manifest's digest.

  Raises:
    CorruptError: it does not say which.
  """
  said, own = manifest.get("base"), manifest.get("number")
  if said is None and manifest.get("format") not in _DELTAS:
    return None
  if isinstance(said, dict) and type(own) is int:
    number, digest = said.get("number"), said.get("digest")
    if type(number) is int and 0 <= number < own and type(digest) is str:
      return number, digest
  raise atomic.CorruptError("the manifest does not name its base")


def unsealed(data: bytes) -> dict[str, Any]:
  """Returns what a manifest of any format says.

  Raises:
    CorruptError: it is none.
  """
  try:
    return leaves.check_seal(json.loads(data))
  except (ValueError, RecursionError) as error:
    raise atomic.CorruptError("the manifest is not JSON") from error


def grids(arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, Grid]:
  """How arrays are cut that a manifest describes, by name."""
  return {
      name: Grid(
          shape=tuple(one["shape"]),
          dtype=np.dtype(one["dtype"]),
          chunk=tuple(one["chunk"]),
      )
      for name, one in arrays.items()
  }


def checker(manifest: Mapping[str, Any]) -> leaves.Checker:
  """Compares arrays that are read, or chunks of them, with what was written.

  Args:
    manifest: of the version.

  Returns:
    The checker of all of its arrays, which names chunks that differ.
  """
  cuts = grids(manifest["arrays"])
  old = manifest["format"] in _SHA256
  digest = chunks.sha256 if old else chunks.digest

  def differing(name: str, found: np.ndarray | Parts) -> list[str]:
    if name not in cuts:
      return [name]
    grid, said = cuts[name], manifest["arrays"][name]["digests"]
    if (found.shape, found.dtype) != (grid.shape, grid.dtype):
      return [name]
    held = found if isinstance(found, Parts) else chunks.parts(found, grid)
    return [
        f"{name}/{grid.key(number)}"
        for number, piece in held.pieces.items()
        if digest(piece) != said[number]
    ]

  return leaves.Checker(cuts, differing)


def narrowed(dtype: np.dtype) -> np.dtype:
  """The dtype that short weights have in place of another."""
  return _BFLOAT16 if dtype == np.float32 else dtype


def round_off(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Rounds float32 arrays to bfloat16, to nearest even.

  Args:
    arrays: by name.

  Returns:
    All arrays, and the dtypes of those that were rounded.
  """
  done = {
      name: array.astype(narrowed(array.dtype), copy=False)
      for name, array in arrays.items()
  }
  return done, {
      name: arrays[name].dtype.name
      for name in sorted(arrays)
      if done[name].dtype != arrays[name].dtype
  }


def widened(
    arrays: Mapping[str, np.ndarray | Parts], manifest: Mapping[str, Any]
) -> dict[str, np.ndarray | Parts]:
  """Gives arrays that were rounded the dtype back that they had."""
  before = manifest.get("rounded", {})
  return {
      name: array.astype(before[name]) if name in before else array
      for name, array in arrays.items()
  }


def _is_sound(manifest: Mapping[str, Any]) -> bool:
  """Whether a manifest has what all readers need, of the kinds they expect."""
  where = path(manifest["policy"], manifest["number"])
  cuts, rounded = grids(manifest["arrays"]), manifest.get("rounded", {})
  return (
      isinstance(manifest["meta"], dict)
      and _are_stacks(manifest.get("stacks", {}), cuts)
      and rounded.keys() <= cuts.keys()
      and all(one == "float32" for one in rounded.values())
      and all(
          is_key(f"{where}/{name}")
          and min(grid.shape, default=0) >= 0
          and min(grid.chunk, default=1) >= 1
          and _are_within(grid.chunk, grid.shape)
          and grid.dtype.kind not in "OSUMm"
          and _are_digests(manifest["arrays"][name]["digests"], len(grid))
          for name, grid in cuts.items()
      )
  )


def _are_within(chunk: Sequence[int], shape: Sequence[int]) -> bool:
  """Whether no chunk is larger than its array, as TensorStore makes room."""
  pairs = zip(chunk, shape, strict=True)
  return all(step <= max(1, size) for step, size in pairs)


def _are_digests(value: Any, number: int) -> bool:
  """Whether a value of JSON can be the digests of so many chunks."""
  return (
      isinstance(value, list)
      and len(value) == number
      and all(isinstance(one, str) for one in value)
  )


def _are_stacks(value: Any, cuts: Mapping[str, Grid]) -> bool:
  """Whether a value of JSON can say which arrays are stacks, and of what."""
  names = [one for some in value.values() for one in some]
  names += [name for name in cuts if name not in value]
  return (
      value.keys() <= cuts.keys()
      and all(isinstance(some, list) for some in value.values())
      and all(isinstance(one, str) for one in names)
      and len(set(names)) == len(names)
      and all(cuts[n].shape[:1] == (len(some),) for n, some in value.items())
  )


def _in_one(described: Mapping[str, Any]) -> dict[str, Any]:
  """What format 1 said of an array, which had one digest, as of one chunk."""
  shape, digest = described["shape"], described["digest"]
  return {
      "shape": shape,
      "dtype": described["dtype"],
      "chunk": [max(1, size) for size in shape],
      "digests": [digest] if 0 not in shape else [],
  }
