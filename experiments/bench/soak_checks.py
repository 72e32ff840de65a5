"""What must hold after a soak: nothing torn, lost, doubled, other weights."""

import collections
import contextlib
import hashlib
import json
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from mgrpo_jax import atomic, leaves, publish, store
from mgrpo_jax.report import records
from mgrpo_jax.report.writer import read_metrics


class Reader:
  """Reads the newest versions and remembers what each of them was.

  Attributes:
    seen: digests by policy and number.
    reads: that succeeded.
    failed: reads that did not.
  """

  def __init__(self, bucket: str, like: Mapping[str, Any]) -> None:
    """Reads nothing yet.

    Args:
      bucket: URL.
      like: weights of each policy, for their shapes.
    """
    self.seen: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
    self.reads = 0
    self.failed = 0
    self._bucket = store.open(bucket, patience=20.0)
    self._like = like
    self._over = threading.Event()

  @contextlib.contextmanager
  def reading(self) -> Iterator[None]:
    """Reads, in a thread."""
    thread = threading.Thread(target=self._run, daemon=True)
    thread.start()
    try:
      yield
    finally:
      self._over.set()
      thread.join()

  def torn(self) -> list[str]:
    """The versions that were read in more than one way, a line each."""
    return [
        f"version {number} of {policy} was read in {len(digests)} ways"
        for (policy, number), digests in self.seen.items()
        if len(digests) > 1
    ]

  def _run(self) -> None:
    """Reads until told to stop."""
    while not self._over.wait(1.0):
      for policy, like in self._like.items():
        try:
          found = publish.read(self._bucket, policy, "latest", like=like)
        except (atomic.StorageError, publish.NoVersionError):
          self.failed += 1
          continue
        self.reads += 1
        arrays = leaves.to_host(found.params)
        digest = hashlib.sha256()
        for name in sorted(arrays):
          digest.update(arrays[name].tobytes())
        key = (policy, found.version.number)
        self.seen[key].add(digest.hexdigest())


def played(folder: pathlib.Path, policy: str) -> list[str]:
  """Reads every trajectory of a policy.

  Args:
    folder: a run directory.
    policy: whose; the role has its name.

  Returns:
    A line for each, sorted: where it belongs, and what it was.
  """
  found = []
  for step, path in records.list_steps(folder / "rollouts").items():
    read = records.read_step(path)
    found += [f"{step} damaged: {problem}" for problem in read.problems]
    for group in read.groups:
      for one in group["trajectories"]:
        if one["role"] == policy:
          kept = [one["tokens"], one["logprobs"], one["rewards"]]
          text = json.dumps([*kept, one["advantage"], one["parent"]])
          place = [one["rollout"], one["call"]]
          found.append(f"{step} {group['task']['id']} {place} {text}")
  return sorted(found)


def wrong(
    alone: pathlib.Path, jobs: Mapping[str, pathlib.Path], *, steps: int
) -> list[str]:
  """Compares the run directories of jobs with that of a run left alone.

  Args:
    alone: of the run in one process.
    jobs: by policy.
    steps: that each took.

  Returns:
    What differs, a line each; empty where all is well.
  """
  found = []
  for policy, two in jobs.items():
    one, file = alone, f"policies/{policy}/model.safetensors"
    if (one / file).read_bytes() != (two / file).read_bytes():
      found.append(f"parameters of {policy} differ")
    expected = collections.Counter(played(one, policy))
    actual = collections.Counter(played(two, policy))
    if lost := expected - actual:
      found.append(f"{lost.total()} trajectories of {policy} are lost")
    if more := actual - expected:
      found.append(f"{more.total()} of {policy} are doubled or others")
    rows = [row["step"] for row in read_metrics(two / "metrics.jsonl")]
    if rows != list(range(steps)):
      found.append(f"steps of {policy}: {rows}")
  return found
