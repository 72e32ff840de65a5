"""What lies in a bucket, as a person wants to know it. Only reads.

The format is that of docs/bucket.md. Nothing is believed that does not parse:
it is named instead. A bucket may be looked at while a run writes there; what
vanishes meanwhile is left out.
"""

import collections
import dataclasses
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax import leases
from mgrpo_jax.atomic import StorageError
from mgrpo_jax.decoupled import members as joined
from mgrpo_jax.store import Store

_MOST = 1e15  # of counts and seconds
_VERSION = re.compile(r"policies/([^/]+)/v(\d+)/manifest\.json")
_LEASE = re.compile(r"policies/([^/]+)/leases/v(\d+)/([^/]+)")
_MEMBER = re.compile(r"members/([^/]+)/([^/]+)\.json")
_REPLICA = re.compile(r"replicas/([^/]+)/([^/]+)\.json")
_STEP = re.compile(r"steps/(\d+)\.json")
_POINTER = re.compile(r"policies/([^/]+)/LATEST")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
  """What was found.

  Attributes:
    url: of the bucket.
    run: what run.json says; empty where there is none.
    versions: a row for each version, by policy; `bytes` are those of its
      weights, `stored` those of its files, its base's not among them.
    members: a row for each process.
    replicas: a row for each sampler that helps.
    leases: a row for each lease.
    records: how many keys lie in each folder.
    damaged: a line for each record that does not parse.
  """

  url: str
  run: Mapping[str, Any]
  versions: Mapping[str, Sequence[Mapping[str, Any]]]
  members: Sequence[Mapping[str, Any]]
  replicas: Sequence[Mapping[str, Any]]
  leases: Sequence[Mapping[str, Any]]
  records: Mapping[str, int]
  damaged: Sequence[str]


class _Reader:
  """Reads JSON records of a store; names those that are none."""

  def __init__(self, store: Store) -> None:
    self.store = store
    self.damaged: list[str] = []

  def read(self, key: str) -> dict[str, Any]:
    """Returns a record; empty where there is none, or none that parses."""
    try:
      value = self.store.get(key)
    except StorageError as error:
      self.damaged.append(str(error))
      return {}
    if value is None:
      return {}
    try:
      found = json.loads(value)
      if isinstance(found, dict):
        return found
    except (ValueError, RecursionError):
      pass
    self.damaged.append(f"{key} is not a JSON object")
    return {}


def look(store: Store, *, now: float) -> Bucket:
  """Reads what a bucket says of itself.

  Args:
    store: the bucket.
    now: seconds since 1970; ages are counted from then.

  Returns:
    What was found.

  Raises:
    StorageError: the store cannot be read.
  """
  reader, keys = _Reader(store), store.list()
  latest = {
      match[1]: reader.read(key).get("number")
      for key in keys
      if (match := _POINTER.fullmatch(key))
  }
  steps = [int(match[1]) + 1 for key in keys if (match := _STEP.fullmatch(key))]
  versions: dict[str, list[dict[str, Any]]] = {name: [] for name in latest}
  held, members, replicas = (list[dict[str, Any]]() for _ in range(3))
  for key in keys:
    if match := _VERSION.fullmatch(key):
      row = _version(reader, key, int(match[2]), now)
      row["latest"] = latest.get(match[1]) == int(match[2])
      versions.setdefault(match[1], []).append(row)
    elif match := _LEASE.fullmatch(key):
      held.append(_lease(reader, key, match.groups(), latest, now))
    elif match := _MEMBER.fullmatch(key):
      told = reader.read(key)
      members.append(
          {"policy": match[1], "process": match[2]}
          | _member(told, latest.get(match[1]), max(steps, default=0), now)
      )
    elif match := _REPLICA.fullmatch(key):
      told = reader.read(key)
      replicas.append(
          {"policy": match[1], "id": match[2]}
          | _member(told, latest.get(match[1]), 0, now)
      )
  for rows in versions.values():
    rows.sort(key=lambda row: row["number"])
  folders = collections.Counter(k.partition("/")[0] for k in keys if "/" in k)
  return Bucket(
      url=store.url,
      run=reader.read("run.json"),
      versions=versions,
      members=members,
      replicas=replicas,
      leases=held,
      records=dict(sorted(folders.items())),
      damaged=tuple(reader.damaged),
  )


def text(found: Bucket) -> str:
  """Returns what was found as lines for a terminal."""
  run = _cell(found.run.get("run", "nobody's yet"))
  lines = [f"{found.url}: run {run}"]
  for policy, rows in sorted(found.versions.items()):
    lines.append(f"\npolicy {policy}")
    told = ("number", "latest", "age", "kind", "bytes", "stored", "arrays")
    lines += _columns(rows, told)
  for title, rows, names in (
      (
          "members",
          found.members,
          ("policy", "process", "address", "heartbeat", "lag", "waits for"),
      ),
      (
          "replicas",
          found.replicas,
          ("policy", "id", "address", "heartbeat", "lag"),
      ),
      ("leases", found.leases, ("policy", "number", "holder", "left", "lag")),
  ):
    if rows:
      lines.append(f"\n{title}")
      lines += _columns(rows, names)
  counts = ", ".join(f"{name} {n}" for name, n in found.records.items())
  lines.append(f"\nkeys: {counts or 'none'}")
  lines += [f"damaged: {line}" for line in found.damaged]
  return "\n".join(lines)


def _version(
    reader: _Reader, key: str, number: int, now: float
) -> dict[str, Any]:
  """Describes one version by its manifest."""
  manifest = reader.read(key)
  arrays, base = manifest.get("arrays"), manifest.get("base")
  size: int | None = None
  try:
    described = dict(arrays or {})
    size = sum(
        math.prod(map(operator.index, one["shape"]))
        * np.dtype(one["dtype"]).itemsize
        for one in described.values()
    )
  except (KeyError, SyntaxError, TypeError, ValueError):
    described = {}
    reader.damaged.append(f"{key} does not describe arrays")
  folder = key.removesuffix("/manifest.json")
  when = _number(reader.read(f"{folder}/published.json").get("time"))
  kind, stored = "whole", reader.store.taken(folder)
  if base is not None:
    of = _number(base.get("number") if isinstance(base, dict) else None)
    kind = f"delta of {'?' if math.isnan(of) else int(of)}"
  return {
      "number": number,
      "age": _seconds(now - when),
      "kind": kind,
      "bytes": "?" if size is None or size >= _MOST else f"{size:,}",
      "stored": "?" if stored is None else f"{stored:,}",
      "arrays": len(described),
  }


def _lease(
    reader: _Reader,
    key: str,
    parts: Sequence[str],
    latest: Mapping[str, Any],
    now: float,
) -> dict[str, Any]:
  """Describes one lease."""
  policy, number, holder = parts
  before = len(reader.damaged)
  end = leases.until(json.dumps(reader.read(key)).encode())
  if math.isnan(end) and len(reader.damaged) == before:
    reader.damaged.append(f"{key} does not say until when")
  left = "for good" if end == math.inf else _seconds(end - now)
  return {
      "policy": policy,
      "number": int(number),
      "holder": holder,
      "left": left if not end < now else f"over ({_seconds(now - end)} ago)",
      "lag": _lag(latest.get(policy), int(number), "version"),
  }


def _member(
    told: Mapping[str, Any], latest: Any, steps: int, now: float
) -> dict[str, Any]:
  """Describes one process by what it says of itself."""
  lag = "?"
  if "version" in told:
    lag = _lag(latest, told["version"], "version")
  elif told.get("ready") == joined.NOT_READY:
    lag = "not ready"
  elif "ready" in told:
    lag = _lag(steps, told["ready"], "step")
  waits = f"{told.get('waits', '')} {told.get('wanted', '')}".strip()
  return {
      "address": str(told.get("address", "?"))[:60],
      "heartbeat": f"{_ago(now - _number(told.get('time')))} ago",
      "lag": lag,
      "waits for": waits[:80],
  }


def _lag(newest: Any, at: Any, unit: str) -> str:
  """Returns how far somebody is behind."""
  behind = _number(newest) - _number(at)
  if math.isnan(behind):
    return "?"
  number = max(0, int(behind))
  return f"{number} {unit}{'s' * (number != 1)}"


def _number(value: Any) -> float:
  """Returns a number of JSON that can be one; NaN for anything else."""
  good = type(value) in (int, float) and abs(value) < _MOST
  return float(value) if good else math.nan


def _ago(span: float) -> str:
  """Returns how long ago; clocks a little apart are no prophets."""
  return _seconds(span if math.isnan(span) else max(0.0, span))


def _seconds(span: float) -> str:
  """Returns a span of time as a person says it."""
  if math.isnan(span):
    return "?"
  for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
    if abs(span) >= 2 * size:
      return f"{span / size:.0f} {unit}"
  return f"{span:.0f} s"


def _columns(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
  """Returns rows as aligned columns; text goes left, what it holds escaped."""
  cells = [list(names)]
  for row in rows:
    line = [row[name] for name in names]
    cells.append([_cell(value) for value in line])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return [
      "  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in cells
  ]


def _cell(value: Any) -> str:
  """Returns a cell's text; what is not printable is escaped."""
  if isinstance(value, bool):
    return "LATEST" if value else ""
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
