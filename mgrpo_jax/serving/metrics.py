"""What a server counts, as Prometheus reads it.

The text format is a dozen lines, so it is written here.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds

Labels = tuple[tuple[str, str], ...]


class Histogram:
  """Counts durations by their size."""

  def __init__(self) -> None:
    """Starts with none."""
    self.counts = [0] * (len(_EDGES) + 1)
    self.total = 0.0

  def add(self, seconds: float) -> None:
    """Counts one duration."""
    self.counts[bisect.bisect_left(_EDGES, seconds)] += 1
    self.total += seconds

  def lines(self, name: str, labels: Labels) -> list[str]:
    """Its samples: cumulative buckets, sum and count."""
    lines, below = [], 0
    for edge, count in zip((*_EDGES, "+Inf"), self.counts, strict=True):
      below += count
      lines.append(
          _sample(f"{name}_bucket", (*labels, ("le", str(edge))), below)
      )
    lines.append(_sample(f"{name}_sum", labels, self.total))
    lines.append(_sample(f"{name}_count", labels, below))
    return lines


class Metrics:
  """What has been served since the start."""

  def __init__(self) -> None:
    """Starts at zero."""
    self._requests: collections.Counter[Labels] = collections.Counter()
    self._tokens: collections.Counter[Labels] = collections.Counter()
    self._seconds: dict[Labels, Histogram] = {}
    self._first: dict[Labels, Histogram] = {}

  def request(self, model: str, status: int, seconds: float) -> None:
    """Counts a request that has ended.

    Args:
      model: its name; empty where the request did not get that far.
      status: of HTTP, 499 where the client left.
      seconds: that it took.
    """
    labels = (("model", model), ("status", str(status)))
    self._requests[labels] += 1
    whole = self._seconds.setdefault((("model", model),), Histogram())
    whole.add(seconds)

  def first_piece(self, model: str, seconds: float) -> None:
    """Counts how long a request waited for the first sampled token."""
    self._first.setdefault((("model", model),), Histogram()).add(seconds)

  def tokens(self, model: str, prompt: int, sampled: int) -> None:
    """Counts tokens that were read and sampled for a request."""
    self._tokens[(("model", model), ("kind", "prompt"))] += prompt
    self._tokens[(("model", model), ("kind", "sampled"))] += sampled

  def text(
      self,
      *,
      inside: int,
      engines: Mapping[str, Mapping[str, Any]],
      resident: int | None,
  ) -> str:
    """Everything in Prometheus' text format.

    Args:
      inside: choices in progress.
      engines: `Engine.stats()` by policy.
      resident: bytes of memory that the process has; None if nobody knows.

    Returns:
      The text.
    """
    blocks = [
        _family(
            "mgrpo_requests_total",
            "counter",
            "Chat completions that ended, by status; 499: the client left.",
            [_sample("mgrpo_requests_total", *s) for s in _by(self._requests)],
        ),
        _family(
            "mgrpo_tokens_total",
            "counter",
            "Tokens of chat completions.",
            [_sample("mgrpo_tokens_total", *s) for s in _by(self._tokens)],
        ),
        _durations(
            "mgrpo_request_seconds",
            "From a request's first byte to its answer's last.",
            self._seconds,
        ),
        _durations(
            "mgrpo_first_token_seconds",
            "From a request's first byte to its first token.",
            self._first,
        ),
        _family(
            "mgrpo_choices_in_progress",
            "gauge",
            "Choices being sampled or waiting.",
            [_sample("mgrpo_choices_in_progress", (), inside)],
        ),
        *_engines(engines),
        *_process(resident),
    ]
    return "".join(blocks)


def _engines(engines: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """What the engines say of themselves."""
  queue, slots, visits, tokens, evictions = [], [], [], [], []
  for name, stats in engines.items():
    label = ("policy", name)
    queue.append(_sample("mgrpo_queue", (label,), stats["requests"]))
    slots += [
        _sample("mgrpo_slots", (label, ("state", state)), count)
        for state, count in stats["slots"].items()
    ]
    visits.append(_sample("mgrpo_visits_total", (label,), stats["visits"]))
    tokens += [
        _sample(
            "mgrpo_device_tokens_total", (label, ("kind", kind)), stats[kind]
        )
        for kind in ("prefilled", "generated")
    ]
    evictions.append(
        _sample("mgrpo_evictions_total", (label,), stats["evictions"])
    )
  return [
      _family("mgrpo_queue", "gauge", "Requests without a slot.", queue),
      _family("mgrpo_slots", "gauge", "Slots by what they do.", slots),
      _family("mgrpo_visits_total", "counter", "Device visits.", visits),
      _family(
          "mgrpo_device_tokens_total",
          "counter",
          "Tokens that were not cached and had to be computed.",
          tokens,
      ),
      _family(
          "mgrpo_evictions_total",
          "counter",
          "Conversations and waiting agents that lost their cache.",
          evictions,
      ),
  ]


def _process(resident: int | None) -> list[str]:
  """What the process takes, under the name that Prometheus has for it."""
  if resident is None:
    return []
  name = "process_resident_memory_bytes"
  about = "Resident memory size in bytes."
  return [_family(name, "gauge", about, [_sample(name, (), resident)])]


def _durations(name: str, about: str, found: Mapping[Labels, Histogram]) -> str:
  """A family of histograms."""
  lines = [
      line
      for labels in sorted(found)
      for line in found[labels].lines(name, labels)
  ]
  return _family(name, "histogram", about, lines)


def _by(counts: collections.Counter[Labels]) -> list[tuple[Labels, float]]:
  """Counts in a fixed order."""
  return sorted(counts.items())


def _family(name: str, kind: str, about: str, lines: list[str]) -> str:
  """One metric with what it means."""
  head = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
  return "\n".join([*head, *lines]) + "\n"


def _sample(name: str, labels: Labels, value: float) -> str:
  """One line."""
  inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
  return f"{name}{{{inner}}} {value}" if inner else f"{name} {value}"


def _escaped(text: str) -> str:
  """A label's value as the format wants it."""
  return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
