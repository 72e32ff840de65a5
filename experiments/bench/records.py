"""Requests and seconds of a step's record here, beside the model on paper.

    python -m experiments.bench.records [--rollouts=512]

A leader writes the record of a step to a bucket on this disk and a follower
reads it, with everything that they ask of the store counted. `scaling` says how
many requests that should be; they should take as long as such requests alone.
(tests/test_leader.py counts a whole step's requests.)
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench import scaling
from mgrpo_jax import rollout, store
from mgrpo_jax.decoupled import board, wire
from mgrpo_jax.rewards import Scores
from mgrpo_jax.testing.team import environment, small_team
from mgrpo_jax.types import NO_PARENT, Account, Status, Task


class Counted:
  """A store that notes its requests.

  Attributes:
    asked: the key of each.
    written: bytes.
  """

  def __init__(self, real: store.Store, pause: float = 0.0) -> None:
    """Counts from zero.

    Args:
      real: the store that does what is asked.
      pause: seconds that a request takes besides.
    """
    self._real = real
    self._pause = pause
    self.asked: list[str] = []
    self.written = 0

  def __getattr__(self, name: str) -> Any:
    """Does what the store does."""
    done = getattr(self._real, name)
    if name not in ("get", "put", "read", "replace", "swap"):
      return done

    def counted(first: Any, *rest: Any) -> Any:
      self.asked.append(first if isinstance(first, str) else first.key)
      time.sleep(self._pause)
      self.written += sum(len(one) for one in rest if isinstance(one, bytes))
      return done(first, *rest)

    return counted


def check(work: scaling.Work, folder: pathlib.Path) -> list[str]:
  """Counts and times a step's record on this machine.

  Args:
    work: of the step; a task has eight rollouts.
    folder: for the bucket.

  Returns:
    Lines of Markdown: what the model says, and what was seen.
  """
  real = store.open_folder(folder)
  size = scaling.ROW * work.rollouts * (1 + work.calls)
  alone = _alone(lambda: real.put("one", b"x" * size))
  read_alone = _alone(lambda: real.get("one"))
  groups, scores = played(work)
  leader, follower = Counted(real), Counted(real)
  told = board_of(leader, folder)
  took = _seconds(lambda: told.announce(0, groups, scores))
  reads = board_of(follower, folder)
  found: list[Any] = []
  read = _seconds(lambda: found.append(reads.step(0)))
  if not found[0]:
    raise RuntimeError("the step that was written is not there")
  rows = [
      ("requests to write", scaling.WRITTEN, len(leader.asked)),
      ("requests to read", 1, len(follower.asked)),
      ("ms to write", (alone + read_alone) * 1e3, took * 1e3),
      ("ms to read", read_alone * 1e3, read * 1e3),
      ("bytes", size, leader.written),
  ]
  return [
      "| record of a step | model | seen |",
      "|---|---|---|",
      *(f"| {name} | {a:,.4g} | {b:,.4g} |" for name, a, b in rows),
  ]


def board_of(counted: Any, folder: pathlib.Path) -> board.Board:
  """Makes the board of a job.

  Args:
    counted: its store.
    folder: for what a leader keeps.

  Returns:
    The board, of eight rollouts a task.
  """
  return board.Board(
      counted,
      rollouts_per_task=8,
      told=folder / "told",
      sure=lambda: None,  # nobody else writes
  )


def _seconds(do: Callable[[], object]) -> float:
  """How long something takes once."""
  began = time.perf_counter()
  do()
  return time.perf_counter() - began


def _alone(do: Callable[[], object]) -> float:
  """How long a request takes where no other is under way."""
  return statistics.median(_seconds(do) for _ in range(50))


async def _unasked(*arguments: Any, **others: Any) -> Any:
  """Stands where a policy would; nothing is sampled here."""
  raise RuntimeError("a policy was asked, though nothing is sampled here")


def played(work: scaling.Work) -> tuple[list[Any], list[Scores]]:
  """Makes groups of rollouts in which the root calls so often.

  Args:
    work: how often, and how many rollouts, a multiple of eight.

  Returns:
    The groups, without tokens, and their scores.
  """
  nothing = Account(
      sampled=0, turns=0, format=True, correct=None, expert=None, overlong=0.0
  )
  team = environment(
      dict.fromkeys(("main", "researcher"), _unasked), team=small_team()
  )
  groups = []
  for number in range(work.rollouts // 8):
    task = Task(
        id=f"t{number}",
        question="",
        answers=("",),
        stage="easy",
        hops=0,
        evidence=(),
        meta={},
    )
    rollouts = []
    for k in range(8):
      rows = [("main", 0, NO_PARENT)]
      rows += [("researcher", call, 0) for call in range(work.calls)]
      rollouts.append(
          [
              wire.stub(
                  {
                      "task_id": task.id,
                      "rollout": k,
                      "role": role,
                      "call": call,
                      "parent": parent,
                      "attempt": 0,
                      "status": Status.COMPLETED,
                      "version_min": 0,
                      "version_max": 0,
                      "seconds": 0.0,
                  },
                  nothing,
              )
              for role, call, parent in rows
          ]
      )
    groups.append(rollout.group_of(task, rollouts, environment=team))
  rng = np.random.default_rng(0)
  each = [len(group.trajectories) for group in groups]
  names = [field.name for field in dataclasses.fields(Scores)]
  return groups, [
      Scores(**{name: rng.random(m).astype(np.float32) for name in names})
      for m in each
  ]


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rollouts", type=int, default=512, help="B times K")
  arguments = parser.parse_args()
  if arguments.rollouts < 8 or arguments.rollouts % 8:
    parser.error("--rollouts must be a multiple of 8")
  with tempfile.TemporaryDirectory() as folder:
    lines = check(
        scaling.Work(rollouts=arguments.rollouts), pathlib.Path(folder)
    )
  print("\n".join(lines))


if __name__ == "__main__":
  main()
