"""Publishes and reads while the object server fails, and counts what happened.

    python -m experiments.bench.faults --server=s3 --faults=200 --out=s3.json

An emulator (`s3`: moto, `gs`: gcp-storage-emulator) stands behind a proxy that
spoils requests, drawn from a seed (`mgrpo_jax.testing.faulty`). A publisher
writes version after version and one sealed record a version through it; a
follower in another thread reads the newest version all the while, through the
same proxy. A version's arrays all hold its number, so a mixture shows. When
enough was injected the server is left alone, and everything is read again.
"""

import collections
import contextlib
import json
import pathlib
import threading
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from mgrpo_jax import atomic, leaves, publish, store
from mgrpo_jax.testing import faulty, object_servers

_SERVERS = {"s3": object_servers.s3, "gs": object_servers.gcs}
_SHAPES = {"embed": (300, 64), "layers/0": (64, 64), "scale": (64,)}
_SERVER = flags.DEFINE_enum("server", "s3", list(_SERVERS), "which emulator")
_FAULTS = flags.DEFINE_integer("faults", 200, "how many to inject, at least")
_RATE = flags.DEFINE_float("rate", 0.1, "share of requests that are spoilt")
_SECONDS = flags.DEFINE_float("seconds", 0.5, "how long hang and slow last")
_SEED = flags.DEFINE_integer("seed", 0, "of the draws")
_OUT = flags.DEFINE_string("out", "", "JSON file for the counts")


class Outcome:
  """What publisher and follower saw. Safe between threads."""

  def __init__(self) -> None:
    """Starts at nothing."""
    self.counts: collections.Counter[str] = collections.Counter()
    self.errors: collections.Counter[str] = collections.Counter()
    self._lock = threading.Lock()

  def add(self, what: str) -> None:
    """Counts something."""
    with self._lock:
      self.counts[what] += 1

  def fail(self, error: Exception) -> None:
    """Counts an error that a caller was told."""
    with self._lock:
      self.errors[f"{type(error).__name__}: {error}"[:160]] += 1


def tree(number: int) -> dict[str, np.ndarray]:
  """Returns weights that know which version they are of."""
  return {n: np.full(s, number, np.float32) for n, s in _SHAPES.items()}


def write(bucket: store.Store, number: int, outcome: Outcome) -> None:
  """Publishes a version and leaves a record, again until both are told done."""
  record = json.dumps(leaves.seal({"number": number})).encode()
  for _ in range(5):
    try:
      publish.publish(
          bucket, "main", number, tree(number), keep=2, meta={"step": number}
      )
      bucket.put(f"rewards/{number}.json", record)
    except atomic.StorageError as error:
      outcome.fail(error)
      continue
    outcome.add("versions published")
    return
  outcome.add("versions lost")


def look(bucket: store.Store, outcome: Outcome) -> int:
  """Reads the newest version and returns its number; -1 where none is read."""
  like = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in _SHAPES.items()}
  try:
    weights = publish.read(bucket, "main", "latest", like=like)
  except (atomic.StorageError, publish.NoVersionError) as error:
    outcome.fail(error)
    return -1
  number = weights.version.number
  whole = all(
      np.all(np.asarray(array) == number) for array in weights.params.values()
  )
  outcome.add("whole reads" if whole else "torn reads")
  if weights.skipped:
    outcome.add("reads that fell back to an older version")
  return number


def follow(
    bucket: store.Store, outcome: Outcome, done: threading.Event
) -> None:
  """Reads until told to stop."""
  while not done.is_set():
    look(bucket, outcome)


def verify(bucket: store.Store, last: int, outcome: Outcome) -> None:
  """Reads everything again from a server that is left alone."""
  found = look(bucket, outcome)
  outcome.add("newest version right" if found == last else "newest wrong")
  for number in range(last + 1):
    value = bucket.get(f"rewards/{number}.json")
    with contextlib.suppress(ValueError, atomic.CorruptError):
      if value and leaves.check_seal(json.loads(value))["number"] == number:
        outcome.add("records kept")
        continue
    outcome.add("records lost")


def measure() -> dict[str, Any]:
  """Runs publisher and follower until enough faults were injected."""
  faults = faulty.Faults(seed=_SEED.value, rate=0.0, seconds=_SECONDS.value)
  outcome = Outcome()
  with (
      _SERVERS[_SERVER.value]() as server,
      faulty.between(server, faults) as proxy,
  ):
    url = f"{_SERVER.value}://{object_servers.BUCKET}/run?endpoint={proxy}"
    writer, reader = store.open(url), store.open(url)
    write(writer, 0, outcome)
    faults.rate, number = _RATE.value, 0
    done = threading.Event()
    follower = threading.Thread(target=follow, args=(reader, outcome, done))
    begun = time.monotonic()
    follower.start()
    try:
      while faults.injected.total() < _FAULTS.value:
        number += 1
        write(writer, number, outcome)
    finally:
      done.set()
      follower.join()
    seconds = time.monotonic() - begun
    faults.rate = 0.0
    verify(writer, number, outcome)
  return {
      "server": _SERVER.value,
      "seconds": round(seconds, 1),
      "requests": faults.requests,
      "injected": dict(faults.injected),
      "outcome": dict(outcome.counts),
      "errors": dict(outcome.errors),
  }


def main() -> None:
  """Prints the tables and writes them."""
  found = measure()
  cli.say(
      f"{found['server']}: {sum(found['injected'].values())} faults in"
      f" {found['requests']} requests, {found['seconds']} s"
  )
  for title in ("injected", "outcome", "errors"):
    cli.say(f"\n| {title} | times |\n|---|---|")
    for what, times in sorted(found[title].items()):
      cli.say(f"| {what} | {times} |")
  if _OUT.value:
    atomic.write_json(pathlib.Path(_OUT.value), found)


if __name__ == "__main__":
  cli.run(main)
