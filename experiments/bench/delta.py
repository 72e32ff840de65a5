"""Publishes a run's versions again, whole and as differences.

    python -m experiments.bench.delta --bucket=RUN/bucket --policy=main \
        --folder=/tmp/bench

The versions that a bucket keeps, in float32 and in bfloat16, each once with
every version whole and once with one in `--whole_every`, by turns, `--rounds`
times. Whole versions and differences are counted apart: bytes that files take,
seconds to write and to read one into arrays of jax, digests checked: each on
its own, and by a reader that keeps the base, after it read the one before.
Nothing is flushed. Arrays come `--copies` times, one after the other and each
copy in another order, so that none is compressed as the repetition of another:
neighbouring versions of small models are at hand, and files of a few KiB say
nothing about speed.
"""

import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from mgrpo_jax import atomic, contents, publish, store
from mgrpo_jax import manifest as manifests
from mgrpo_jax.bases import Bases

_BUCKET = flags.DEFINE_string("bucket", "", "URL of a bucket, or a folder")
_POLICY = flags.DEFINE_string("policy", "", "whose versions")
_FOLDER = flags.DEFINE_string("folder", "", "an empty or new folder")
_FIRST = flags.DEFINE_integer("first", 0, "the first version that is taken")
_MOST = flags.DEFINE_integer("most", 8, "how many are taken")
_EVERY = flags.DEFINE_integer("whole_every", 8, "of how many one is whole")
_COPIES = flags.DEFINE_integer("copies", 1, "of each array, shuffled")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "how often all is written and read")
_OUT = flags.DEFINE_string("out", "", "JSON file for what was measured")

Row = dict[str, Any]


def weights(bucket: store.Store, policy: str, number: int) -> dict[str, Any]:
  """Returns a whole version's arrays by name, as they were published."""
  path = manifests.path(policy, number)
  data = bucket.get(f"{path}/manifest.json") or b"{}"
  manifest = manifests.parse(data, policy, number)
  if manifests.base(manifest) is not None:
    raise ValueError(f"bucket: version {number} is a difference")
  kinds = {one["dtype"] for one in manifest["arrays"].values()}
  if "bfloat16" in kinds:  # whose bits the rows of float32 would not have
    raise ValueError(f"bucket: version {number} is in bfloat16, not float32")
  arrays = bucket.read_arrays(path, manifest["arrays"])
  return {name: _larger(array) for name, array in arrays.items()}


def _larger(array: np.ndarray) -> np.ndarray:
  """Returns copies of an array, all but the first shuffled, in one."""
  flat, orders = array.reshape(-1), range(1, _COPIES.value)
  more = [np.random.default_rng(one).permutation(flat) for one in orders]
  return np.concatenate([flat, *more]).reshape(-1, *array.shape[1:])


def measure(
    versions: Sequence[dict[str, Any]],
    folder: pathlib.Path,
    *,
    short: bool,
    whole_every: int,
) -> list[Row]:
  """Publishes versions and reads each; gives what that took, a row each."""
  bucket, bases = store.open_folder(folder), Bases(whole_every)
  like = {
      name: jax.ShapeDtypeStruct(array.shape, array.dtype)
      for name, array in versions[0].items()
  }
  rows: list[Row] = []
  for number, params in enumerate(versions):
    begun = time.perf_counter()
    publish.publish(
        bucket,
        "main",
        number,
        params,
        keep=len(versions),
        meta={},
        short=short,
        bases=bases,
    )
    rows.append({"write": time.perf_counter() - begun})
  held = contents.Held()
  for number, row in enumerate(rows):
    for what, keeps in (("read", None), ("follow", held)):
      begun = time.perf_counter()
      found = publish.read(bucket, "main", number, like=like, held=keeps)
      jax.block_until_ready(found.params)
      row[what] = time.perf_counter() - begun
    path = f"policies/main/v{number}"
    manifest = json.loads(bucket.get(f"{path}/manifest.json") or b"{}")
    base = manifest.get("base")
    row["behind"] = 0 if base is None else number - base["number"]
    row["bytes"] = bucket.taken(path)
    row |= {"short": short, "deltas": whole_every > 1}
  bucket.settle()
  shutil.rmtree(folder)
  return rows


def table(rows: Sequence[Row], size: int) -> str:
  """Returns a line for each dtype and kind of version, medians with spread."""
  lines = [
      "| | bytes, % of float32 | written, s | read, s | read, base kept, s |",
      "|---|---|---|---|---|",
  ]
  for short in (False, True):
    for name, kept in (
        ("whole, where all are", lambda row: not row["deltas"]),
        ("whole, a base", lambda row: row["deltas"] and not row["behind"]),
        ("difference", lambda row: row["behind"]),
    ):
      some = [row for row in rows if row["short"] == short and kept(row)]
      cells = [
          _spread([100 * row["bytes"] / size for row in some], 1),
          *(
              _spread([row[what] for row in some], 3)
              for what in ("write", "read", "follow")
          ),
      ]
      dtype = "bfloat16" if short else "float32"
      lines.append(f"| {dtype}, {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
  """Returns the median of values, with smallest and largest."""
  middle = statistics.median(values)
  low, high = min(values), max(values)
  return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def by_distance(rows: Sequence[Row], size: int) -> str:
  """Returns what differences take, by how many versions the base is behind."""
  lines = ["| versions behind | float32, % | bfloat16, % |", "|---|---|---|"]
  for behind in sorted({row["behind"] for row in rows} - {0}):
    cells = [
        statistics.mean(
            100 * row["bytes"] / size
            for row in rows
            if row["behind"] == behind and row["short"] == short
        )
        for short in (False, True)
    ]
    lines.append(
        f"| {behind} | " + " | ".join(f"{c:.1f}" for c in cells) + " |"
    )
  return "\n".join(lines)


def main() -> None:
  """Prints the tables and writes every row."""
  url, policy = _BUCKET.value, _POLICY.value
  with cli.user_errors(ValueError, OSError):
    bucket = store.open(url) if "://" in url else store.open_folder(url)
    numbers = [
        n for n in publish.versions(bucket, policy) if n >= _FIRST.value
    ][: _MOST.value]
    versions = [weights(bucket, policy, number) for number in numbers]
  if len(versions) < 2 or _EVERY.value < 2:
    cli.fail(f"{url} has versions {numbers} of {policy}; two are needed")
  size = sum(array.nbytes for array in versions[0].values())
  rows: list[Row] = []
  for one in range(_ROUNDS.value + 1):  # the first warms up
    for short in (False, True):
      for every in (1, _EVERY.value)[:: 1 if one % 2 else -1]:
        folder = pathlib.Path(_FOLDER.value) / "again"
        found = measure(versions, folder, short=short, whole_every=every)
        rows += found if one else []
  cli.say(f"{policy}, versions {numbers}, {size / 1e6:.1f} MB\n")
  cli.say(f"{table(rows, size)}\n\n{by_distance(rows, size)}")
  if _OUT.value:
    atomic.write_json(_OUT.value, {"bytes": size, "rows": rows})


if __name__ == "__main__":
  cli.run(main, required=("bucket", "policy", "folder"))
