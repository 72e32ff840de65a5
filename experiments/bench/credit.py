r"""Times alignment and advantages of many roles; how the time grows.

    python -m experiments.bench.credit [--step-seconds=6.8] [--out=credit.json]

What `credit.compare` does in a step: it aligns the calls of every role, looks
up their rewards and compares them, K = 64 rollouts a task and D = 16 slots.
Of 100 rollouts 99 fit their slots, which is how the paper picks D. Cases run in
turn, round by round, after one run each whose compilations are
reported apart.

Prints the median of the rounds with least and most, the processor's time, the
share of a step (`--step-seconds`, from `experiments.bench.step` on the same
machine), and the powers of roles, K and D that time grows with: 1 is linear.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import cli
from experiments.method import ALIGNMENTS, COMPARISONS
from mgrpo_jax import credit, metrics, packing
from mgrpo_jax.rewards import RoleCalls

STEP_SECONDS = 6.8  # of the quickstart, experiments/README.md
SPARE = 4  # slots that the most talkative rollout would need beside D
ROLES = (1, 16, 64, 256)
ROLLOUTS = (16, 64, 128)
SLOTS = (4, 16, 32)
NORMALISERS = ("leave_one_out", "other_rollouts", "per_subtask", "per_block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """What is timed.

  Attributes:
    alignment: name of the strategy.
    normaliser: name of what rewards are compared with.
    roles: how many, ≥ 1, none of them the root.
    tasks: B.
    rollouts: K.
    slots: D.
    drops: whether some rollouts have more calls than slots.
    together: whether roles share a program, or one is waited for by one.
  """

  alignment: str = "duplicate_or_drop"
  normaliser: str = "per_task"
  roles: int = 256
  tasks: int = 1
  rollouts: int = 64
  slots: int = 16
  drops: bool = True
  together: bool = True


def drawn(case: Case) -> dict[str, RoleCalls]:
  """Draws rewards and numbers of calls; there are no trajectories."""
  rng = np.random.default_rng(0)
  most = case.slots + SPARE * case.drops
  shape = (case.tasks, case.rollouts)
  calls = {}
  for number in range(case.roles):
    counts = rng.integers(0, case.slots + 1, shape)
    if case.drops:
      counts[rng.random(shape) < 0.01] = most
    calls[f"role{number}"] = RoleCalls(
        calls=(),
        positions=(),
        num_calls=counts.astype(np.int32),
        rewards=(rng.integers(0, 3, (*shape, most)) / 2).astype(np.float32),
        subtasks=rng.integers(0, 4, (*shape, most)).astype(np.int32),
    )
  return calls


def compare(case: Case, calls: Mapping[str, RoleCalls]) -> dict[str, Any]:
  """Runs what is timed."""
  names = list(calls)
  parts = [names] if case.together else [[name] for name in names]
  found: dict[str, Any] = {}
  for part in parts:
    found |= credit.compare(
        {name: calls[name] for name in part},
        root="",
        align=ALIGNMENTS[case.alignment],
        comparison=COMPARISONS[case.normaliser],
        num_slots=case.slots,
        seeds={name: number for number, name in enumerate(names)},
    )
  return found


def measure(cases: Sequence[Case], rounds: int) -> list[dict[str, Any]]:
  """Runs all cases in turn, so that a slow minute slows them all."""
  rows: list[dict[str, Any]] = []
  loads = [drawn(case) for case in cases]
  for case, calls in zip(cases, loads, strict=True):
    with metrics.count_compilations() as compiled:
      compare(case, calls)
    row: dict[str, Any] = {"seconds": [], "cpu_seconds": []}
    row["compile_seconds"] = compiled.seconds
    rows.append(dataclasses.asdict(case) | row)
  for _ in range(rounds):
    for case, calls, row in zip(cases, loads, rows, strict=True):
      started, worked = time.perf_counter(), time.process_time()
      compare(case, calls)
      row["cpu_seconds"].append(time.process_time() - worked)
      row["seconds"].append(time.perf_counter() - started)
  return rows


def on_host(case: Case) -> tuple[float, int]:
  """Seconds that the credits of all roles' calls take, and how many."""
  calls = drawn(case)
  most = next(iter(calls.values())).rewards.shape[2]
  held: Any = [[[None] * most] * case.rollouts] * case.tasks
  found = compare(case, calls)
  started = time.perf_counter()
  number = sum(
      len(packing.fold(held, alignment, gains))
      for alignment, _, gains in found.values()
  )
  return time.perf_counter() - started, number


def exponent(rows: Sequence[Mapping[str, Any]], name: str) -> float:
  """The slope of log seconds over the logarithm of a size."""
  sizes = np.log([row[name] for row in rows])
  seconds = [float(np.median(row["seconds"])) for row in rows]
  return float(np.polyfit(sizes, np.log(seconds), 1)[0])


def tables() -> dict[tuple[str, str], list[Case]]:
  """Cases by title and by the size that grows, if one does."""
  base = Case()
  replace = dataclasses.replace
  found = {
      (f"B = {tasks}, {name}", "roles"): [
          replace(base, alignment=name, tasks=tasks, roles=roles)
          for roles in ROLES
      ]
      for tasks in (1, 2, 16)  # 2: the quickstart's 128 rollouts a step
      for name in ALIGNMENTS
  }
  found["B = 1, duplicate_or_drop, role by role", "roles"] = [
      replace(base, together=False, roles=roles) for roles in ROLES
  ]
  found["64 roles", "rollouts"] = [
      replace(base, roles=64, rollouts=rollouts) for rollouts in ROLLOUTS
  ]
  found["64 roles", "slots"] = [
      replace(base, roles=64, slots=slots) for slots in SLOTS
  ]
  found["nothing dropped", ""] = [
      replace(base, alignment=name, drops=False) for name in ALIGNMENTS
  ]
  found["other normalisers", ""] = [
      replace(base, normaliser=name) for name in NORMALISERS
  ]
  return found


def _print(
    title: str, size: str, rows: Sequence[Mapping[str, Any]], step: float
) -> None:
  """One table for a reader."""
  grows = ""
  if size:
    # Up to some size dispatching costs as much as computing.
    whole, last = exponent(rows, size), exponent(rows[-2:], size)
    grows = f"; grows with {size} to the power {whole:.2f}, at last {last:.2f}"
  print(f"{title}{grows}")
  for row in rows:
    label = row[size] if size else f"{row['alignment']} {row['normaliser']}"
    middle = statistics.median(row["seconds"])
    least, most = min(row["seconds"]), max(row["seconds"])
    worked = statistics.median(row["cpu_seconds"])
    print(
        f"  {label!s:>32}{1e3 * middle:9.1f} ms ({1e3 * least:.1f} to"
        f" {1e3 * most:.1f}), CPU {1e3 * worked:.1f} ms,"
        f" {middle / step:.2%} of a step; compiled in"
        f" {row['compile_seconds']:.1f} s",
        flush=True,
    )


def main() -> None:
  """Prints the tables; writes JSON where asked."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS)
  parser.add_argument("--out", type=cli.out_file)
  arguments = parser.parse_args()
  if arguments.rounds < 1 or not arguments.step_seconds > 0:
    parser.error("--rounds must be at least 1, --step-seconds above 0")
  groups = tables()
  rows = measure(
      [c for cases in groups.values() for c in cases], arguments.rounds
  )
  left = list(rows)
  for (title, size), cases in groups.items():
    _print(title, size, left[: len(cases)], arguments.step_seconds)
    del left[: len(cases)]
  seconds, number = on_host(Case())
  print(f"records of {number} credited calls, on the host: {seconds:.3f} s")
  if arguments.out:
    result = {"rows": rows, "host_seconds": seconds, "host_calls": number}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
