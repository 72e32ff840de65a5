"""What is measured of a step, and how much a run has done so far."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

from mgrpo_jax import statistics
from mgrpo_jax.resources import Resources
from mgrpo_jax.types import RolloutGroup
from mgrpo_jax.work import Work


class Meter:
  """Collects the metrics of the step under way.

  Attributes:
    values: metrics by name.
    work: done so far, earlier processes included.
    before: the work done when the step began.
  """

  def __init__(self, resources: Resources) -> None:
    """Starts with nothing done.

    Args:
      resources: whose engines and task streams are watched.
    """
    self.values: dict[str, float] = {}
    self.work = Work()
    self.before = Work()
    self._resources = resources
    self._counts = resources.counts()  # when the step began

  def begin(self) -> None:
    """Forgets the metrics of the step before."""
    self.values = {}
    self.before = dataclasses.replace(self.work)
    self._counts = self._resources.counts()

  def add(self, other: "Meter") -> None:
    """Takes in what was measured apart, of rollouts of the step."""
    self.values |= other.values
    for name, count in dataclasses.asdict(other.work).items():
      setattr(self.work, name, getattr(self.work, name) + count)

  @contextlib.contextmanager
  def timed(self, phase: str) -> Iterator[None]:
    """Adds the wall time of a phase to the step's metrics."""
    started = time.monotonic()
    try:
      yield
    finally:
      name = f"seconds/{phase}"
      spent = time.monotonic() - started
      self.values[name] = self.values.get(name, 0.0) + spent

  def count_events(
      self, now: Mapping[str, int], before: Mapping[str, int]
  ) -> None:
    """Adds what happened in agent calls to the step's metrics.

    Args:
      now: counts since the process began, by event.
      before: those of a while ago.
    """
    for name, count in now.items():
      seen = self.values.get(f"events/{name}", 0.0)
      new = count - before.get(name, 0)
      self.values[f"events/{name}"] = seen + float(new)
    if "events/refused_calls" in self.values:
      refused = self.values["events/refused_calls"]
      made = self.values["events/calls"]
      self.values["refused"] = refused / max(refused + made, 1.0)

  def count_rollouts(self, groups: Sequence[RolloutGroup]) -> None:
    """Adds groups, how fast they came, and how far spares changed them.

    Args:
      groups: drawn for the step, timed as `rollout`, their tokens counted.
    """
    new = sum(group.num_rollouts for group in groups)
    self.work.rollouts += new
    sampled = self.work.generated_tokens - self.before.generated_tokens
    spent = max(self.values["seconds/rollout"], 1e-9)
    self.values["tokens_per_second/rollout"] = sampled / spent
    total = self.work.rollouts - self.before.rollouts
    for name, count in statistics.of_seatings(groups).items():
      earlier = self.values.get(name, 0.0) * (total - new)
      self.values[name] = (earlier + count) / total

  def totals(self, seconds: float) -> dict[str, float]:
    """The metrics of the step, with what has been done so far.

    Args:
      seconds: that the step took.

    Returns:
      Metrics by name.
    """
    done, before = self.work, self.before
    tokens = done.trained_tokens - before.trained_tokens
    tokens += done.generated_tokens - before.generated_tokens
    work = dataclasses.asdict(done)
    queues = self._resources.queues.values()
    now, then = self._resources.counts(), self._counts
    return (
        self.values
        | {name: float(count - then[name]) for name, count in now.items()}
        | {n: float(c) for n, c in self._resources.replicas().items()}
        | {name: float(count) for name, count in work.items()}
        | {
            "seconds/step": seconds,
            "tokens_per_second/step": tokens / max(seconds, 1e-9),
            "waiting": float(sum(queue.waiting for queue in queues)),
        }
    )
