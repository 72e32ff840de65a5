"""What each alignment and normaliser makes of one case of the team game."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments.method import ALIGNMENTS, COMPARISONS
from mgrpo_jax.comparison import Comparison
from mgrpo_jax.credit import Align
from mgrpo_jax.rewards import RewardWeights
from mgrpo_jax.testing import batches, estimators, game

CHUNK = 4000  # batches at a time, so that programs compile once
EXACT_CALLS = 4  # K·A; more calls of a sub-agent cannot be listed in time
MAIN_SPLIT = RewardWeights(format=0.1, correct=0.9, expert=0.0, overlong=0.0)
SPLITS = {  # b1, b2, b3
    "paper": RewardWeights(format=0.1, correct=0.4, expert=0.5, overlong=0.0),
    "expert": RewardWeights(format=0.1, correct=0.0, expert=0.9, overlong=0.0),
    "team": RewardWeights(format=0.1, correct=0.9, expert=0.0, overlong=0.0),
    "faint": RewardWeights(format=0.1, correct=0.89, expert=0.01, overlong=0.0),
}
LAWS = {  # of the number of calls; the last three have mean 2
    "base": (0.1, 0.3, 0.6),
    "steady": (0.0, 0.0, 1.0, 0.0, 0.0),
    "even": (0.0, 0.25, 0.5, 0.25, 0.0),
    "wide": (0.0, 2 / 3, 0.0, 0.0, 1 / 3),
}
REPORTS = ((0.6, 0.3, 0.1), (0.3, 0.4, 0.3))  # right, vague, malformed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
  """Of cases that cannot be listed.

  Attributes:
    batches: how many, >= 1; rounded up to whole chunks.
    seed: of rollouts and alignments.
  """

  batches: int
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A batch that is measured.

  Attributes:
    role: `main` or `sub`.
    split: of the sub-agent's reward, one of `SPLITS`; empty for the root.
    law: of the number of requests, one of `LAWS`.
    attempts: A, at each request.
    tasks: B.
    rollouts: K.
    slots: D.
  """

  role: str
  split: str
  law: str
  attempts: int
  tasks: int
  rollouts: int
  slots: int

  @property
  def exact(self) -> bool:
    """Whether every batch can be listed."""
    few = self.rollouts * self.attempts <= EXACT_CALLS
    return self.tasks == 1 and (self.role == "main" or few)

  @property
  def normalisers(self) -> dict[str, Comparison]:
    """What the slots can be compared with, by name."""
    left_out = set()
    if self.tasks == 1:
      left_out.add("per_batch")  # it is `per_task` then
    if self.role == "main" or self.exact:
      # Of the root it is `per_task`; a list has groups in one order only.
      left_out.add("per_block")
    if self.attempts == 1:
      left_out.add("per_subtask")  # compares nothing then
    return {
        name: comparison
        for name, comparison in COMPARISONS.items()
        if name not in left_out
        and (self.role == "sub" or comparison.given == "rewards")
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """The game as one role sees it."""

  policies: game.Policies
  rules: game.Game
  outcomes: game.Outcomes
  chance: np.ndarray
  calls: game.Calls


def measure(case: Case, draws: Draws) -> Iterator[dict[str, Any]]:
  """Compares every alignment and normaliser with what it aims at.

  Args:
    case: the batch.
    draws: where it is not exact.

  Yields:
    A row for each; errors are 0 where it is exact.
  """
  problem = _problem(case.role, case.split, case.law, case.attempts)
  sub = case.role == "sub"
  by_rollout, _ = _targets(problem, case, ALIGNMENTS["inverse_count"])
  for alignment in ALIGNMENTS if sub else ("inverse_count",):
    align = ALIGNMENTS[alignment]
    own, true = _targets(problem, case, align)
    if case.exact:
      moments = _listed(problem, case, align)
    else:
      moments = _drawn(problem, case, align, draws)
    for normaliser, comparison in case.normalisers.items():
      found = moments(comparison)
      yield {
          **dataclasses.asdict(case),
          "alignment": alignment if sub else "",
          "normaliser": normaliser,
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
  problem = _problem(case.role, case.split, case.law, case.attempts)
  pair = [
      _every(problem, case, ALIGNMENTS[name])
      for name in ("duplicate_or_drop", "inverse_count")
  ]
  for normaliser, comparison in case.normalisers.items():
    (copies, mass), (plain, _) = (
        estimators.given_rollouts(_evaluate(one.slots, comparison), one)
        for one in pair
    )
    squares = np.sum([(copies - plain) ** 2, plain**2], axis=2) @ mass
    yield {
        **dataclasses.asdict(case),
        "normaliser": normaliser,
        "exact": True,
        "gap": math.sqrt(squares[0] / squares[1]),
    }


@functools.cache
def _problem(role: str, split: str, law: str, attempts: int) -> Problem:
  """Lists the game's outcomes, in double precision."""
  calls = np.log(np.maximum(LAWS[law], 1e-12))
  policies = game.Policies(calls=calls, reports=np.log(REPORTS))
  rules = game.small_game(len(calls) - 1)
  every = game.outcomes(
      max_calls=len(calls) - 1, num_reports=len(REPORTS[0]), attempts=attempts
  )
  with jax.enable_x64(True):
    seen = _main_calls(policies, every, weights=MAIN_SPLIT)
    if role == "sub":
      seen = _sub_calls(
          policies, rules, every, weights=SPLITS[split], roots=seen.roots
      )
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
) -> Callable[[Comparison], estimators.Moments]:
  """Prepares exact moments of any normaliser."""
  every = _every(problem, case, align)

  def moments(comparison: Comparison) -> estimators.Moments:
    return estimators.exact_moments(_evaluate(every.slots, comparison), every)

  return moments


def _drawn(
    problem: Problem, case: Case, align: Align, draws: Draws
) -> Callable[[Comparison], estimators.Moments]:
  """Prepares moments, from random batches, of any normaliser."""
  number = -(-draws.batches // CHUNK)
  keys = jax.random.split(jax.random.key(draws.seed), (3, number))

  def drawn(alignment: int) -> batches.Slots:
    parts = [
        _sample(
            keys[0, chunk],
            keys[alignment, chunk],
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

  def moments(comparison: Comparison) -> estimators.Moments:
    return estimators.sampled_moments(
        _evaluate(once, comparison), _evaluate(again, comparison)
    )

  return moments


def _evaluate(slots: batches.Slots, comparison: Comparison) -> np.ndarray:
  """Computes every batch's gradient, a chunk at a time."""
  number = len(slots.weights)

  def chunk(array: np.ndarray, start: int) -> np.ndarray:
    piece = array[start : start + CHUNK]
    missing = [(0, CHUNK - len(piece))] + [(0, 0)] * (piece.ndim - 1)
    return np.pad(piece, missing)

  found = [
      _gradients(
          jax.tree.map(functools.partial(chunk, start=start), slots),
          comparison=comparison,
      )
      for start in range(0, number, CHUNK)
  ]
  return np.concatenate(found)[:number]


_gradients = jax.jit(estimators.gradients, static_argnames="comparison")
_SIZES = ("num_batches", "num_tasks", "num_rollouts", "num_slots")
_sample = jax.jit(batches.sample_slots, static_argnames=("align", *_SIZES))
_main_calls = jax.jit(game.main_calls, static_argnames="weights")
_sub_calls = jax.jit(game.sub_calls, static_argnames="weights")
_probabilities = jax.jit(game.probabilities)
_own_gradient = jax.jit(game.own_gradient)
_slopes = jax.jit(jax.grad(game.expected_reward))
