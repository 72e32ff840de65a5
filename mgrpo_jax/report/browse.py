"""Chooses the rollouts a report carries, and packs them for its page.

A run may hold gigabytes of rollouts; a page that opens at once holds a few
megabytes. The first, the last and evenly spaced steps between them are taken,
and of each as many whole rollouts as its part of the space holds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax.report import records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """What a page shows of a run's rollouts.

  Attributes:
    data: for the page's script; see `_Packer`.
    shown_steps: steps in the page.
    total_steps: steps on disk.
    shown_rollouts: rollouts in the page.
    read_rollouts: whole rollouts in the files of the shown steps.
    problems: a line for each damaged record or file met.
  """

  data: dict[str, Any]
  shown_steps: int
  total_steps: int
  shown_rollouts: int
  read_rollouts: int
  problems: tuple[str, ...]


def select(
    directory: str | os.PathLike[str], *, max_steps: int, max_bytes: int
) -> Selection:
  """Reads and packs rollouts of a run.

  Args:
    directory: the run's `rollouts`; may be absent.
    max_steps: steps to show at most, at least 1.
    max_bytes: about how long the packed JSON may become.

  Returns:
    The packed rollouts and how much of the run they are.

  Raises:
    OSError: a file exists but cannot be opened.
  """
  paths = records.list_steps(directory)
  chosen = spread(list(paths), max_steps)
  packer = _Packer()
  shown = whole = 0
  steps: list[dict[str, Any]] = []
  problems: list[str] = []
  for position, step in enumerate(chosen):
    read = records.read_step(paths[step])
    problems.extend(read.problems)
    left = max(0, max_bytes - packer.size) // (len(chosen) - position)
    packed, count = packer.step(read.groups, limit=packer.size + left)
    shown += count
    whole += sum(group["num_rollouts"] for group in read.groups)
    if packed:
      stage = read.groups[0]["stage"]
      total = len(read.groups)
      steps.append(
          {"step": step, "stage": stage, "total": total, "tasks": packed}
      )
  return Selection(
      data={"pieces": packer.pieces, "steps": steps},
      shown_steps=len(steps),
      total_steps=len(paths),
      shown_rollouts=shown,
      read_rollouts=whole,
      problems=tuple(problems),
  )


def spread(items: Sequence[int], count: int) -> list[int]:
  """Picks items evenly, the first and the last among them.

  Args:
    items: ascending.
    count: how many at most, at least 1; a single one is the last.

  Returns:
    The picked items, ascending, none twice.
  """
  if len(items) <= count:
    return list(items)
  if count == 1:
    return [items[-1]]
  gaps = count - 1
  return [items[round(i * (len(items) - 1) / gaps)] for i in range(count)]


class _Packer:
  """Turns records into the page's JSON and keeps count of its length.

  Tokens become positions in one table of (piece, id), which is what keeps a
  page small: most tokens of a run are the same few hundred.
  """

  def __init__(self) -> None:
    """Starts with an empty table."""
    self.pieces: list[tuple[str, int]] = []
    self.size = 0  # bytes of JSON so far, the table included
    self._positions: dict[tuple[str, int], int] = {}

  def step(
      self, groups: Sequence[records.GroupRecord], *, limit: int
  ) -> tuple[list[dict[str, Any]], int]:
    """Packs tasks until `size` would pass `limit`; also counts rollouts."""
    tasks: list[dict[str, Any]] = []
    count = 0
    for group in groups:
      task = _task(group)
      cost = _length(task)
      for k, calls in enumerate(_by_rollout(group)):
        packed = [self._call(call, parent) for call, parent in calls]
        cost += _length(packed)
        if self.size + cost > limit:
          return tasks, count
        if not task["rollouts"]:
          tasks.append(task)
        task["rollouts"].append({"k": k, "calls": packed})
        self.size += cost
        cost = 0
        count += 1
    return tasks, count

  def _call(
      self, call: records.TrajectoryRecord, parent: int
  ) -> dict[str, Any]:
    """Packs one agent call."""
    pairs = zip(call["pieces"], call["tokens"], strict=True)
    return {
        "role": call["role"],
        "call": call["call"],
        "parent": parent,
        "request": call["request"],
        "result": call["result_text"],
        "status": call["status"],
        "versions": [call["version_min"], call["version_max"]],
        "seconds": call["seconds"],
        "rewards": call["rewards"],
        "advantage": call["advantage"],
        "tokens": [self._position(*pair) for pair in pairs],
        "spans": call["spans"],
        "logprobs": [round(x, 3) for x in call["logprobs"]],
        "turns": [
            [turn["kind"], turn["name"], turn["argument"], turn["page"]]
            for turn in call["turns"]
        ],
    }

  def _position(self, piece: str, token: int) -> int:
    """Where a token stands in the table, which it joins if it is new."""
    key = (piece, token)
    position = self._positions.setdefault(key, len(self.pieces))
    if position == len(self.pieces):
      self.pieces.append(key)
      self.size += _length(key)
    return position


def _task(group: records.GroupRecord) -> dict[str, Any]:
  """What the page says of a task."""
  task = group["task"]
  meta: Mapping[str, Any] = task["meta"]
  return {
      "id": task["id"],
      "question": task["question"],
      "answers": task["answers"],
      "hops": task["hops"],
      "kind": str(meta.get("kind", "")),
      "evidence": [[hop["question"], hop["page"]] for hop in task["evidence"]],
      "total": group["num_rollouts"],
      "rollouts": [],
  }


def _by_rollout(
    group: records.GroupRecord,
) -> list[list[tuple[records.TrajectoryRecord, int]]]:
  """The calls of each rollout, with parents as positions within it."""
  rollouts: list[list[tuple[records.TrajectoryRecord, int]]] = [
      [] for _ in range(group["num_rollouts"])
  ]
  within: list[int] = []
  for call in group["trajectories"]:
    calls = rollouts[call["rollout"]]
    within.append(len(calls))
    parent = call["parent"]
    calls.append((call, within[parent] if parent >= 0 else -1))
  return rollouts


def _length(value: Any) -> int:
  """Bytes a value takes in the page; `<`, `>` and `&` grow when escaped."""
  text = json.dumps(value, separators=(",", ":"))
  return len(text) + 5 * sum(text.count(c) for c in "<>&") + 1
