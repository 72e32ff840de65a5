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
    counts: of reads: that gave the version LATEST points at (`whole`), an older
      one (`older`), that found nothing yet, none that is good, no server.
  """

  def __init__(self, bucket: str, like: Mapping[str, Any]) -> None:
    """Reads nothing yet.

    Args:
      bucket: URL.
      like: weights of each policy, for their shapes.
    """
    self.seen: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
    self.counts: collections.Counter[str] = collections.Counter()
    self._bucket = store.open(bucket, patience=20.0)
    self._like = like
    self._over = threading.Event()
    self._broke = False

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

  def wrong(self, expected: Mapping[tuple[str, int], str]) -> list[str]:
    """The versions that were read as others than they are, a line each.

    Args:
      expected: digests of the versions of a run left alone.
    """
    found = ["the reader broke, see above"] if self._broke else []
    if not self.seen:
      found.append("no version was read among faults")
    for (policy, number), digests in sorted(self.seen.items()):
      if len(digests) > 1:
        ways = len(digests)
        found.append(f"version {number} of {policy} was read in {ways} ways")
      elif digests != {expected.get((policy, number))}:
        found.append(f"version {number} of {policy} was read as another one")
    return found

  def _run(self) -> None:
    """Reads until told to stop."""
    self._broke = True  # unless it comes to its end
    while not self._over.wait(1.0):
      for policy in self._like:
        self.counts[self._read(policy)] += 1
    self._broke = False

  def _read(self, policy: str) -> str:
    """Reads the newest version, and says how that went."""
    like = self._like[policy]
    try:
      if publish.latest(self._bucket, policy) is None:
        return "nothing there yet"
      found = publish.read(self._bucket, policy, "latest", like=like)
    except publish.NoVersionError:
      return "no good version"
    except atomic.StorageError:
      return "no answer"
    self.seen[policy, found.version.number].add(_digest(found))
    return "older" if found.skipped else "whole"


def versions(
    bucket: store.Store, like: Mapping[str, Any]
) -> dict[tuple[str, int], str]:
  """Reads all versions of a bucket.

  Args:
    bucket: at rest.
    like: weights of each policy, for their shapes.

  Returns:
    Digests by policy and number.
  """
  return {
      (policy, number): _digest(
          publish.read(bucket, policy, number, like=like[policy])
      )
      for policy in like
      for number in publish.versions(bucket, policy)
  }


def unread(
    bucket: store.Store,
    like: Mapping[str, Any],
    expected: Mapping[tuple[str, int], str],
    *,
    steps: int,
) -> list[str]:
  """Compares the newest versions of a bucket at rest with a run left alone.

  Args:
    bucket: of the jobs.
    like: weights of each policy, for their shapes.
    expected: digests of the versions of the run left alone.
    steps: that it took.

  Returns:
    A line for each policy whose last version is not there, whole.
  """
  found = []
  for policy in like:
    number = None
    with contextlib.suppress(atomic.CorruptError, publish.NoVersionError):
      read = publish.read(bucket, policy, "latest", like=like[policy])
      number = read.version.number
    if number != steps or _digest(read) != expected.get((policy, steps)):
      found.append(
          f"the newest good version of {policy} is {number}, and not the run's"
          f" last, {steps}"
      )
  return found


def _digest(weights: publish.Weights) -> str:
  """The digest of weights as they were read."""
  arrays = leaves.to_host(weights.params)
  digest = hashlib.sha256()
  for name in sorted(arrays):
    digest.update(arrays[name].tobytes())
  return digest.hexdigest()


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
    kept = {line.split(" ", 1)[0] for line in expected}
    if len(kept) != steps:
      found.append(f"alone, {policy} kept calls of {len(kept)} steps only")
    if lost := expected - actual:
      found.append(f"{lost.total()} trajectories of {policy} are lost")
    if more := actual - expected:
      found.append(f"{more.total()} of {policy} are doubled or others")
    rows = [row["step"] for row in read_metrics(two / "metrics.jsonl")]
    if rows != list(range(steps)):
      found.append(f"steps of {policy}: {rows}")
  return found
