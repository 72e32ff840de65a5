r"""How far from the true gradient each estimator is: tables, and JSON.

    python -m experiments.bench.gradients [--rollouts=2,4,8] [--out=FILE]
    python -m experiments.bench.gradients --read=FILE    # prints them again

The game is `mgrpo_jax.testing.game`: its true gradient is known. Every row is
an alignment and a normaliser; of the gradient of one batch it says

  scale       what a step along the gradient aimed at is multiplied by
  cosine      between the mean and that gradient, which credits each call with
              its own reward
  to ∇J       between the mean and the gradient of the expected reward, which
              has what a report does to other calls of its rollout, too
  by rollout  between the mean and what is aimed at where rollouts count once
  noise       trace of the covariance over the squared length of the mean
  draws       share of that noise which the alignment's draws make

The main agent sees the first of A attempts at a request; where A is 1,
`per_subtask` has nothing to compare and no row. `inherit_parent` gives calls
the advantage of their root.

The last table sets the mean of duplicate_or_drop over its draws, the rollouts
held fixed, beside inverse_count: the root mean square of the gap over that of
inverse_count's gradient. What can be listed is exact; the rest has one
standard error behind ±.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench import gradient_tables
from experiments.bench.estimated import (
    CHUNK,
    EXACT_CALLS,
    SPLITS,
    Case,
    Draws,
    measure,
    measure_copies,
)

_ROLLOUTS = flags.DEFINE_list(
    "rollouts", ["2", "4", "8"], "K of the batches, each >= 2; to 4 exact."
)
_BATCHES = flags.DEFINE_integer(
    "batches", 20_000, "Random batches, >= 1; rounded up."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random batches.")
_OUT = flags.DEFINE_string("out", None, "Where all figures are written.")
_READ = flags.DEFINE_string("read", None, "Prints this file; measures nothing.")

SUB = Case(
    role="sub",
    split="paper",
    law="base",
    attempts=1,
    tasks=1,
    rollouts=4,
    slots=3,
)
CROSSED = ("paper", "expert", "team")  # splits seen with every K, D and law
SLOTS = (1, 2, 4, 5)  # D, beside 3
SPREADS = (("steady", 4), ("even", 4), *(("wide", d) for d in (2, 4, 8)))
COPIES = "Copies on average beside inverse_count, the rollouts held fixed"


def main() -> None:
  """Measures; see the module."""
  with cli.user_errors(ValueError, OSError, argparse.ArgumentTypeError):
    if _READ.value is not None:
      for flag in (_ROLLOUTS, _BATCHES, _SEED, _OUT):
        if flag.present:
          raise ValueError(f"--{flag.name} goes without --read only")
      cli.say(gradient_tables.markdown(gradient_tables.read(_READ.value)))
      return
    rollouts = _positive(_ROLLOUTS.value)
    if _BATCHES.value < 1:
      raise ValueError(f"--batches must be >= 1, got {_BATCHES.value}")
    if _OUT.value:
      cli.out_file(_OUT.value)
    rows = []
    for table in _tables(rollouts):
      cli.say(gradient_tables.markdown(table))
      rows += table
    if _OUT.value:
      number = -(-_BATCHES.value // CHUNK) * CHUNK
      setup = {"batches": number, "seed": _SEED.value}
      gradient_tables.write(_OUT.value, rows, setup=setup)


def _tables(rollouts: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
  """Measures table by table."""
  draws = Draws(batches=_BATCHES.value, seed=_SEED.value)
  for title, cases in _parts(rollouts).items():
    yield [
        {"table": title, **row}
        for case in cases
        for row in measure(case, draws)
    ]
  yield [
      {"table": COPIES, **row}
      for case in _copied(rollouts)
      for row in measure_copies(case)
  ]


def _parts(rollouts: Sequence[int]) -> Mapping[str, list[Case]]:
  """The cases of each table, by its title."""
  replace = dataclasses.replace
  main = replace(SUB, role="main", split="", slots=1)
  few, most = min(rollouts), max(rollouts)
  crossed = [replace(SUB, split=split) for split in CROSSED]
  twice = [replace(case, attempts=2, rollouts=2, slots=4) for case in crossed]
  return {
      "Main agent": [
          replace(main, tasks=tasks, rollouts=k)
          for tasks, k in [*((1, k) for k in rollouts), (2, most)]
      ],
      "Sub-agent, by split of its reward": [
          replace(SUB, split=split) for split in SPLITS
      ],
      "Sub-agent, by split and number of rollouts": [
          replace(case, rollouts=k)
          for case in crossed
          for k in rollouts
          if k != SUB.rollouts
      ],
      "Sub-agent, by split and number of slots": [
          replace(case, rollouts=few, slots=slots)
          for case in crossed
          for slots in SLOTS
      ],
      "Sub-agent, two tasks, by split, spread of calls and number of slots": [
          replace(case, tasks=2, rollouts=most, law=law, slots=slots)
          for case in crossed
          for law, slots in SPREADS
      ],
      "Sub-agent, two attempts at each request, by split and slots": [
          replace(case, slots=slots) for case in twice for slots in (2, 3, 4, 5)
      ],
      "Sub-agent, attempts at each request, by number of rollouts": [
          replace(SUB, attempts=attempts, rollouts=k, slots=2 * attempts)
          for attempts in (2, 4)
          for k in rollouts
          if (attempts, k) != (2, 2)
      ],
      "Sub-agent, two tasks, two attempts, by split and spread of calls": [
          replace(case, tasks=2, rollouts=most, law=law, slots=8)
          for case in twice
          for law in ("steady", "even", "wide")
      ],
  }


def _copied(rollouts: Sequence[int]) -> list[Case]:
  """The cases of the table of copies; K = 2 affords more slots."""
  few = sorted({k for k in rollouts if k <= EXACT_CALLS})
  cases = [dataclasses.replace(SUB, rollouts=k) for k in few]
  more = [dataclasses.replace(SUB, rollouts=2, slots=d) for d in (4, 5)]
  again = dataclasses.replace(SUB, rollouts=2, attempts=2, slots=4)
  return [*cases, *more, again]


def _positive(texts: Sequence[str]) -> list[int]:
  """Reads numbers of rollouts."""
  try:
    numbers = [int(text) for text in texts]
  except ValueError:
    numbers = []
  if not numbers or min(numbers) < 2:
    raise ValueError(f"--rollouts must be numbers >= 2, got {','.join(texts)}")
  return numbers


if __name__ == "__main__":
  cli.run(main)
