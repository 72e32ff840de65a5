"""What a version's manifest says: shapes, dtypes and digests of its arrays."""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mgrpo_jax import atomic, leaves

FORMAT = 1
NAMES = {"manifest.json", "published.json"}  # beside a version's arrays
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def path(policy: str, number: int) -> str:
  """Returns where a version lies."""
  return f"policies/{policy}/v{number}"


def make(
    policy: str,
    number: int,
    arrays: Mapping[str, np.ndarray],
    *,
    rounded: Mapping[str, str],
    meta: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns a sealed manifest.

  Args:
    policy: the policy's name.
    number: of the version.
    arrays: as they are written, by name.
    rounded: dtypes that arrays had before they were rounded, by name.
    meta: JSON kept beside them.

  Raises:
    ValueError: an array has a name that is taken.
  """
  if taken := sorted(NAMES & {name.split("/")[-1] for name in arrays}):
    raise ValueError(f"params: a leaf may not be named {taken[0]!r}")
  body = {
      "format": FORMAT,
      "policy": policy,
      "number": number,
      "meta": dict(meta),
      "arrays": leaves.describe_all(arrays),
  }
  return leaves.seal(body | ({"rounded": dict(rounded)} if rounded else {}))


def parse(data: bytes, policy: str, number: int) -> dict[str, Any]:
  """Returns a manifest that is what was written for this version.

  Raises:
    CorruptError: it is not.
    MismatchError: it is of another format.
  """
  try:
    manifest = leaves.check_seal(json.loads(data))
  except (ValueError, RecursionError) as error:
    raise atomic.CorruptError("the manifest is not JSON") from error
  if (manifest["policy"], manifest["number"]) != (policy, number):
    raise atomic.CorruptError("the manifest is another version's")
  if manifest["format"] != FORMAT:
    raise atomic.MismatchError(f"format {manifest['format']}, not {FORMAT}")
  return manifest


def round_off(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Rounds float32 arrays to bfloat16, to nearest even.

  Args:
    arrays: by name.

  Returns:
    All arrays, and the dtypes of those that were rounded.
  """
  wide = {n for n, array in arrays.items() if array.dtype == np.float32}
  done = {
      name: array.astype(_BFLOAT16) if name in wide else array
      for name, array in arrays.items()
  }
  return done, {name: arrays[name].dtype.name for name in sorted(wide)}


def widened(
    arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Gives arrays that were rounded the dtype back that they had."""
  before = manifest.get("rounded", {})
  return {
      name: array.astype(before[name]) if name in before else array
      for name, array in arrays.items()
  }
