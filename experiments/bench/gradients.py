r"""How far from the true gradient each estimator is: tables, and JSON.

    python -m experiments.bench.gradients [--rollouts=2,4,8] [--out=FILE]

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

The last table sets the mean of duplicate_or_drop over its draws, the rollouts
held fixed, beside inverse_count: the root mean square of the gap over that of
inverse_count's gradient. What can be listed is exact; the rest has one
standard error behind ±.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from mgrpo_jax import advantages, alignment, atomic
from mgrpo_jax.credit import Advantage, Align
from mgrpo_jax.rewards import RewardWeights
from mgrpo_jax.testing import batches, estimators, game

_ROLLOUTS = flags.DEFINE_list(
    "rollouts", ["2", "4", "8"], "K of the batches, each >= 2; to 4 exact."
)
_BATCHES = flags.DEFINE_integer(
    "batches", 20_000, "Random batches, >= 1; rounded up."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random batches.")
_OUT = flags.DEFINE_string("out", None, "Where all figures are written.")

CHUNK = 4000  # batches at a time, so that programs compile once
EXACT_ROLLOUTS = 4  # more calls of a sub-agent cannot be listed in time
ALIGNMENTS = (
    alignment.duplicate_or_drop,
    alignment.inverse_count,
    alignment.mask,
)
NORMALISERS = (
    advantages.plain,
    advantages.other_rollouts,
    advantages.mean_only,
    advantages.leave_one_out,
    advantages.per_task,
    advantages.per_call_index,
)
IN_BLOCKS = (*NORMALISERS[2:], advantages.per_batch)
MAIN_SPLIT = RewardWeights(format=0.1, correct=0.9, expert=0.0)
SPLITS = {  # b1, b2, b3
    "paper": RewardWeights(format=0.1, correct=0.4, expert=0.5),
    "expert": RewardWeights(format=0.1, correct=0.0, expert=0.9),
    "team": RewardWeights(format=0.1, correct=0.9, expert=0.0),
    "faint": RewardWeights(format=0.1, correct=0.89, expert=0.01),
}
LAWS = {  # of the number of calls; the last three have mean 2
    "base": (0.1, 0.3, 0.6),
    "steady": (0.0, 0.0, 1.0, 0.0, 0.0),
    "even": (0.0, 0.25, 0.5, 0.25, 0.0),
    "wide": (0.0, 2 / 3, 0.0, 0.0, 1 / 3),
}
SPREADS = (("steady", 4), ("even", 4), *(("wide", d) for d in (2, 4, 8)))
COPIES = "Copies on average beside inverse_count, the rollouts held fixed"
REPORTS = ((0.6, 0.3, 0.1), (0.3, 0.4, 0.3))  # right, vague, malformed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A batch that is measured."""

  role: str
  split: str
  law: str
  tasks: int
  rollouts: int
  slots: int

  @property
  def exact(self) -> bool:
    """Whether every batch can be listed."""
    few = self.role == "main" or self.rollouts <= EXACT_ROLLOUTS
    return self.tasks == 1 and few


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """The game as one role sees it."""

  policies: game.Policies
  rules: game.Game
  outcomes: game.Outcomes
  chance: np.ndarray
  calls: game.Calls


SUB = Case(role="sub", split="paper", law="base", tasks=1, rollouts=4, slots=3)


def main() -> None:
  """Measures; see the module."""
  with cli.user_errors(ValueError, OSError):
    rollouts = _positive(_ROLLOUTS.value)
    if _BATCHES.value < 1:
      raise ValueError(f"--batches must be >= 1, got {_BATCHES.value}")
    tables = {
        title: [row for case in cases for row in measure(case)]
        for title, cases in _parts(rollouts).items()
    }
    copied = _copied(rollouts)
    tables[COPIES] = [row for case in copied for row in measure_copies(case)]
    for title, rows in tables.items():
      cli.say(f"\n{title}\n\n{_table(rows)}")
    if _OUT.value:
      number = -(-_BATCHES.value // CHUNK) * CHUNK
      setup = {"batches": number, "seed": _SEED.value}
      atomic.write_json(pathlib.Path(_OUT.value), {**setup, "tables": tables})


def measure(case: Case) -> Iterator[dict[str, Any]]:
  """Compares every alignment and normaliser with what it aims at.

  Args:
    case: the batch.

  Yields:
    A row for each; errors are 0 where it is exact.
  """
  problem = _problem(case.role, case.split, case.law)
  blocks = case.tasks > 1
  aligns = ALIGNMENTS if case.role == "sub" else (alignment.inverse_count,)
  for align in aligns:
    own, true = _targets(problem, case, align)
    by_rollout, _ = _targets(problem, case, alignment.inverse_count)
    moments = (_listed if case.exact else _drawn)(problem, case, align)
    for advantage in IN_BLOCKS if blocks else NORMALISERS:
      found = moments(advantage)
      yield {
          **dataclasses.asdict(case),
          "alignment": align.__name__ if case.role == "sub" else "",
          "normaliser": advantage.__name__,
          "exact": case.exact,
          **dataclasses.asdict(estimators.compare(found, own)),
          "cosine_true": estimators.compare(found, true).cosine,
          "cosine_by_rollout": estimators.compare(found, by_rollout).cosine,
      }


def measure_copies(case: Case) -> Iterator[dict[str, Any]]:
  """Compares the mean over draws of copies with `inverse_count`.

  Args:
    case: of the sub-agent; exact.

  Yields:
    For each normaliser the relative gap, root mean square over rollouts.
  """
  problem = _problem(case.role, case.split, case.law)
  pair = [_every(problem, case, align) for align in ALIGNMENTS[:2]]
  for advantage in NORMALISERS:
    (copies, mass), (plain, _) = (
        estimators.given_rollouts(_evaluate(one.slots, advantage), one)
        for one in pair
    )
    squares = np.sum([(copies - plain) ** 2, plain**2], axis=2) @ mass
    yield {
        **dataclasses.asdict(case),
        "normaliser": advantage.__name__,
        "gap": math.sqrt(squares[0] / squares[1]),
    }


@functools.cache
def _problem(role: str, split: str, law: str) -> Problem:
  """Lists the game's outcomes, in double precision."""
  calls = np.log(np.maximum(LAWS[law], 1e-12))
  policies = game.Policies(calls=calls, reports=np.log(REPORTS))
  rules = game.small_game(len(calls) - 1)
  every = game.outcomes(max_calls=len(calls) - 1, num_reports=len(REPORTS[0]))
  with jax.enable_x64(True):
    if role == "main":
      seen = _main_calls(policies, every, weights=MAIN_SPLIT)
    else:
      seen = _sub_calls(policies, rules, every, weights=SPLITS[split])
    return Problem(
        policies=policies,
        rules=rules,
        outcomes=every,
        chance=np.asarray(_probabilities(policies, rules, every)),
        calls=jax.device_get(seen),
    )


def _targets(
    problem: Problem, case: Case, align: Align
) -> tuple[np.ndarray, np.ndarray]:
  """Computes the gradient aimed at, and that of the expected reward."""
  calls = problem.calls
  with jax.enable_x64(True):
    weights = batches.call_weights(
        calls.num_calls, align=align, num_slots=case.slots
    )
    own = _own_gradient(problem.chance.mean(0), calls, weights)
    slopes = _slopes(
        problem.policies,
        game=problem.rules,
        outcomes=problem.outcomes,
        calls=calls,
        call_weights=weights,
    )
  true = slopes.calls if case.role == "main" else slopes.reports
  return np.asarray(own), np.ravel(true)


def _every(problem: Problem, case: Case, align: Align) -> batches.Enumerated:
  """Lists a case's batches."""
  return batches.enumerate_slots(
      problem.chance,
      problem.calls,
      align=align,
      num_rollouts=case.rollouts,
      num_slots=case.slots,
  )


def _listed(
    problem: Problem, case: Case, align: Align
) -> Callable[[Advantage], estimators.Moments]:
  """Prepares exact moments of any normaliser."""
  every = _every(problem, case, align)

  def moments(advantage: Advantage) -> estimators.Moments:
    return estimators.exact_moments(_evaluate(every.slots, advantage), every)

  return moments


def _drawn(
    problem: Problem, case: Case, align: Align
) -> Callable[[Advantage], estimators.Moments]:
  """Prepares moments, from random batches, of any normaliser."""
  number = -(-_BATCHES.value // CHUNK)
  keys = jax.random.split(jax.random.key(_SEED.value), (3, number))

  def drawn(draws: int) -> batches.Slots:
    parts = [
        _sample(
            keys[0, chunk],
            keys[draws, chunk],
            problem.chance,
            problem.calls,
            align=align,
            num_batches=CHUNK,
            num_tasks=case.tasks,
            num_rollouts=case.rollouts,
            num_slots=case.slots,
        )
        for chunk in range(number)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)

  once, again = drawn(1), drawn(2)

  def moments(advantage: Advantage) -> estimators.Moments:
    return estimators.sampled_moments(
        _evaluate(once, advantage), _evaluate(again, advantage)
    )

  return moments


def _evaluate(slots: batches.Slots, advantage: Advantage) -> np.ndarray:
  """Computes every batch's gradient, a chunk at a time."""
  number = len(slots.weights)

  def chunk(array: np.ndarray, start: int) -> np.ndarray:
    piece = array[start : start + CHUNK]
    missing = [(0, CHUNK - len(piece))] + [(0, 0)] * (piece.ndim - 1)
    return np.pad(piece, missing)

  found = [
      _gradients(
          jax.tree.map(functools.partial(chunk, start=start), slots),
          advantage=advantage,
      )
      for start in range(0, number, CHUNK)
  ]
  return np.concatenate(found)[:number]


_gradients = jax.jit(estimators.gradients, static_argnames="advantage")
_SIZES = ("num_batches", "num_tasks", "num_rollouts", "num_slots")
_sample = jax.jit(batches.sample_slots, static_argnames=("align", *_SIZES))
_main_calls = jax.jit(game.main_calls, static_argnames="weights")
_sub_calls = jax.jit(game.sub_calls, static_argnames="weights")
_probabilities = jax.jit(game.probabilities)
_own_gradient = jax.jit(game.own_gradient)
_slopes = jax.jit(jax.grad(game.expected_reward))


def _parts(rollouts: Sequence[int]) -> Mapping[str, list[Case]]:
  """The cases of each table, by its title."""
  replace = dataclasses.replace
  main = replace(SUB, role="main", split="", slots=1)
  blocks = replace(SUB, tasks=2, rollouts=max(rollouts))
  return {
      "Main agent": [
          replace(main, tasks=tasks, rollouts=k)
          for tasks, k in [*((1, k) for k in rollouts), (2, max(rollouts))]
      ],
      "Sub-agent, by split of its reward": [
          replace(SUB, split=split) for split in SPLITS
      ],
      "Sub-agent, by number of rollouts": [
          replace(SUB, rollouts=k) for k in rollouts if k != SUB.rollouts
      ],
      "Sub-agent, two tasks, by spread of calls and number of slots": [
          replace(blocks, law=law, slots=slots) for law, slots in SPREADS
      ],
  }


def _copied(rollouts: Sequence[int]) -> list[Case]:
  """The cases of the table of copies; K = 2 affords more slots."""
  few = sorted({k for k in rollouts if k <= EXACT_ROLLOUTS})
  cases = [dataclasses.replace(SUB, rollouts=k) for k in few]
  more = [dataclasses.replace(SUB, rollouts=2, slots=d) for d in (4, 5)]
  return [*cases, *more]


def _positive(texts: Sequence[str]) -> list[int]:
  """Reads numbers of rollouts."""
  try:
    numbers = [int(text) for text in texts]
  except ValueError:
    numbers = []
  if not numbers or min(numbers) < 2:
    raise ValueError(f"--rollouts must be numbers >= 2, got {','.join(texts)}")
  return numbers


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows in Markdown, without the columns that say the same in all."""
  varying = [
      name
      for name in ("split", "law", "tasks", "rollouts", "slots", "alignment")
      if len({row.get(name) for row in rows}) > 1
  ]
  cells = [
      {name: str(row[name]) for name in (*varying, "normaliser")}
      | _figures(row)
      for row in rows
  ]
  lines = [f"| {' | '.join(cells[0])} |", "|---" * len(cells[0]) + "|"]
  lines += [f"| {' | '.join(cell.values())} |" for cell in cells]
  return "\n".join(lines)


def _figures(row: Mapping[str, Any]) -> dict[str, str]:
  """One row's numbers for a reader."""
  if "gap" in row:
    return {"gap": f"{row['gap']:.4f}"}
  errors = ("", "")
  if not row["exact"]:
    # A mean that is off by an angle has its cosine lowered by half its square.
    lowered = 1 - math.cos(row["angle_error"])
    errors = (f" ±{row['scale_error']:.3f}", f" ±{lowered:.4f}")
  return {
      "scale": f"{row['scale']:.3f}{errors[0]}",
      "cosine": f"{row['cosine']:.4f}{errors[1]}",
      "to ∇J": f"{row['cosine_true']:.4f}",
      "by rollout": f"{row['cosine_by_rollout']:.4f}",
      "noise": f"{row['noise']:.2f}",
      "draws": f"{row['draws']:.1%}",
  }


if __name__ == "__main__":
  cli.run(main)
