"""Publishes and reads a policy, against plain files of as many bytes.

    python -m experiments.bench.publish --folder=/tmp/bench --out=publish.json
    python -m experiments.bench.publish --folder=/tmp/bench --source=POLICY_DIR

One after the other: a plain file is written, flushed (fsync), dropped from the
page cache and read; a version is published, its files flushed, dropped and read
into arrays of jax, digests checked; as many plain files of the same sizes are
written and read as the one was, for a disk may be slower with many. Flushing is
counted apart: arrays are not flushed when they are published (see
`store.open`), the pointer is. The pause is how long a training thread is held
by handing a version over.

Before anything is written or read garbage is collected, for jax gives memory
back then that it shares with numpy: the version read before. Where a machine is
slow to find memory, what is written next is up to twice as fast with it.
"""

import gc
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from mgrpo_jax import atomic, leaves, publish, store
from mgrpo_jax.policy.load import load
from mgrpo_jax.writer import Writer

_FOLDER = flags.DEFINE_string("folder", "", "an empty or new folder")
_SOURCE = flags.DEFINE_string("source", "smollm2", "what policy.load takes")
_PAIRS = flags.DEFINE_integer("pairs", 5, "how many, after one to warm up")
_OUT = flags.DEFINE_string("out", "", "JSON file for the times")

_SUMS = {  # rows of the table
    "write": ("write",),
    "write and flush": ("write", "flush"),
    "read": ("read",),
    "all three": ("write", "flush", "read"),
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
  """Returns how long something took, in seconds, and what it returned."""
  begun = time.perf_counter()
  found = work()
  return time.perf_counter() - begun, found


def flush(folder: pathlib.Path) -> None:
  """Has every file below a folder written to the disk."""
  for path in folder.rglob("*"):
    if path.is_file():
      descriptor = os.open(path, os.O_RDONLY)
      os.fsync(descriptor)
      os.close(descriptor)


def drop(folder: pathlib.Path) -> None:
  """Has every file below a folder, flushed before, leave the page cache."""
  for path in folder.rglob("*"):
    if path.is_file():
      descriptor = os.open(path, os.O_RDONLY)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(descriptor)


def plain(
    folder: pathlib.Path, data: memoryview, sizes: Sequence[int]
) -> dict[str, float]:
  """Times files of these bytes, each from the start of data."""
  paths = {folder / f"plain{number}": n for number, n in enumerate(sizes)}
  room = memoryview(bytearray(sum(sizes)))  # filled, so it need not be found

  def write() -> None:
    for path, size in paths.items():
      with path.open("wb") as file:
        file.write(data[:size])

  def read() -> None:
    start = 0
    for path, size in paths.items():
      with path.open("rb", buffering=0) as file:
        while file.readinto(room[start : start + size]) != size:
          raise RuntimeError("a plain file was not read at once")
      start += size

  gc.collect()
  times = {"write": timed(write)[0], "flush": timed(lambda: flush(folder))[0]}
  drop(folder)
  gc.collect()
  times["read"] = timed(read)[0]
  for path in paths:
    path.unlink()
  return times


def ours(folder: pathlib.Path, number: int, params: Any) -> dict[str, float]:
  """Times one version: handed over, written, flushed, read."""
  bucket = store.open_folder(folder)
  writer = Writer(
      bucket, keep=1, short=False, whole_every=1, tell=lambda _: None
  )
  writer.write("warm", 0, {"up": np.zeros(1)}, meta={})  # starts the thread
  writer.settle()

  def write() -> float:
    pause, _ = timed(
        lambda: writer.write("main", number, params, meta={"step": number})
    )
    writer.settle()
    return pause

  times = {}
  gc.collect()
  times["write"], times["pause"] = timed(write)
  writer.close()
  times["flush"] = timed(lambda: flush(folder))[0]
  drop(folder)
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)

  def read() -> Any:
    found = publish.read(bucket, "main", "latest", like=like)
    return jax.block_until_ready(found.params)

  gc.collect()
  times["read"], _ = timed(read)
  return times


def measure(folder: pathlib.Path) -> dict[str, Any]:
  """Runs the pairs; the first is not counted."""
  params = load(_SOURCE.value).params
  arrays = leaves.to_host(params)
  data = np.concatenate(
      [array.reshape(-1).view(np.uint8) for array in arrays.values()]
  ).data
  rows: list[dict[str, dict[str, float]]] = []
  for number in range(_PAIRS.value + 1):
    place = folder / "pair"
    place.mkdir(parents=True)
    row = {"plain": plain(place, data, [data.nbytes])}
    row["ours"] = ours(place, number, params)
    files = [path for path in place.rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    shutil.rmtree(place)
    place.mkdir()
    row["files"] = plain(place, data, sizes)
    shutil.rmtree(place)
    rows.append(row)
    cli.say(f"pair {number}: {row}")
  return {"bytes": data.nbytes, "pairs": rows[1:]}


def table(found: dict[str, Any]) -> str:
  """Returns medians with smallest and largest, and the ratios pair by pair."""
  pairs = found["pairs"]
  columns = (
      "one file, s",
      "as many files, s",
      "ours, s",
      "one file/ours",
      "as many/ours",
  )
  lines = [f"| what | {' | '.join(columns)} |", "|---" * 6 + "|"]
  for what, parts in _SUMS.items():
    one, many, new = (
        [sum(pair[who][part] for part in parts) for pair in pairs]
        for who in ("plain", "files", "ours")
    )
    ratios = [
        [a / b for a, b in zip(other, new, strict=True)]
        for other in (one, many)
    ]
    cells = [_spread(values) for values in (one, many, new, *ratios)]
    lines.append(f"| {what} | {' | '.join(cells)} |")
  shares = [p["ours"]["pause"] / p["ours"]["write"] for p in pairs]
  lines.append(f"\npause / time to write: {_spread(shares, 5)}")
  return "\n".join(lines)


def _spread(values: list[float], digits: int = 2) -> str:
  """Returns the median of values, with smallest and largest."""
  middle = statistics.median(values)
  low, high = min(values), max(values)
  return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
  """Prints the table and writes every time."""
  found = measure(pathlib.Path(_FOLDER.value))
  cli.say(f"{found['bytes'] / 1e6:.0f} MB\n\n{table(found)}")
  if _OUT.value:
    atomic.write_json(_OUT.value, found)


if __name__ == "__main__":
  cli.run(main, required=("folder",))
