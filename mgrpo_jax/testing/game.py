"""A team of two whose every outcome can be listed, so gradients are known.

The main agent decides how often to call, d of 0..C. The n-th call gets one of
R reports; the first request and the later ones have logits of their own. The
chance that the main agent is right grows with the useful reports and depends
on the kind of task. Rewards are M-GRPO's (arXiv 2511.13288, Eq. 4–5).

    p(d, r, c) = π_main(d) Π_{n<d} π_sub(r_n | n) P(c | useful reports, kind)

Everything after `outcomes` is a pure function of arrays, of any float type.
"""

from __future__ import annotations

import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mgrpo_jax.rewards import RewardWeights

REQUESTS = 2  # the first one, and all that follow


@flax.struct.dataclass
class Policies:
  """The parameters of both policies."""

  calls: Any  # [C + 1] float, logits of the number of calls
  reports: Any  # [REQUESTS, R] float, logits of a call's report


@flax.struct.dataclass
class Game:
  """What the policies cannot change; Q kinds of task, equally likely."""

  valid: Any  # [R] float, 1 where the format of a report is valid
  expert: Any  # [R] float, the grade of a report, 0..1
  useful: Any  # [R] int32, 1 where a report helps the main agent
  correct: Any  # [Q, C + 1] float, P(right | kind, useful reports)


@flax.struct.dataclass
class Outcomes:
  """All N that one rollout can have."""

  num_calls: Any  # [N] int32, d
  reports: Any  # [N, C] int32, 0 beyond d
  correct: Any  # [N] float, 1 where the main agent is right


@flax.struct.dataclass
class Calls:
  """One role's calls in each outcome; P parameters of its policy."""

  num_calls: Any  # [N] int32
  rewards: Any  # [N, C] float, 0 where there is no call
  scores: Any  # [N, C, P] float, ∇ log π of each call, likewise


def small_game(max_calls: int) -> Game:
  """Makes an easy and a hard kind of task, and three reports.

  Reports are right (grade 1, useful), vague (grade 0.4) and malformed. With h
  useful ones the main agent is right with 1 - 0.5 · 0.5^h on easy tasks and
  1 - 0.95 · 0.6^h on hard ones.

  Args:
    max_calls: C ≥ 1.

  Returns:
    The game, float64 on the host.
  """
  useful = np.arange(max_calls + 1)
  return Game(
      valid=np.array([1.0, 1.0, 0.0]),
      expert=np.array([1.0, 0.4, 0.0]),
      useful=np.array([1, 0, 0], np.int32),
      correct=np.stack([1 - 0.5 * 0.5**useful, 1 - 0.95 * 0.6**useful]),
  )


def outcomes(*, max_calls: int, num_reports: int) -> Outcomes:
  """Lists every outcome of a rollout, on the host.

  Args:
    max_calls: C ≥ 1.
    num_reports: R ≥ 1.

  Returns:
    N = 2 Σ_{d ≤ C} R^d outcomes.

  Raises:
    ValueError: if a size is out of range, naming it.
  """
  for name, size in (("max_calls", max_calls), ("num_reports", num_reports)):
    if size < 1:
      raise ValueError(f"{name} must be >= 1, got {size}")
  rows = [
      (d, said + (0,) * (max_calls - d), right)
      for d in range(max_calls + 1)
      for said in itertools.product(range(num_reports), repeat=d)
      for right in (0.0, 1.0)
  ]
  num_calls, reports, correct = zip(*rows, strict=True)
  return Outcomes(
      num_calls=np.array(num_calls, np.int32),
      reports=np.array(reports, np.int32),
      correct=np.array(correct),
  )


def probabilities(
    policies: Policies, game: Game, outcomes: Outcomes
) -> Float[Array, "Q N"]:
  """Computes how likely each outcome is on each kind of task.

  Args:
    policies: main and sub policy.
    game: the rest.
    outcomes: all of them.

  Returns:
    Rows that sum to 1.
  """
  real = _real(outcomes)
  said = _report_logprobs(policies.reports, outcomes)
  main = jax.nn.log_softmax(policies.calls)[outcomes.num_calls]
  chosen = jnp.exp(main + jnp.sum(jnp.where(real, said, 0.0), axis=1))
  useful = jnp.sum(
      jnp.where(real, jnp.asarray(game.useful)[outcomes.reports], 0), axis=1
  )
  right = jnp.asarray(game.correct)[:, useful]
  return chosen[None] * jnp.where(outcomes.correct > 0, right, 1 - right)


def main_calls(
    policies: Policies, outcomes: Outcomes, weights: RewardWeights
) -> Calls:
  """Sees each outcome as the main agent's one trajectory.

      R_M = a1 + a2 · correct      (Eq. 4; its format is always valid)

  Args:
    policies: main and sub policy.
    outcomes: all of them.
    weights: a1 and a2.

  Returns:
    One call in every outcome, P = C + 1.
  """
  rewards = weights.format + weights.correct * jnp.asarray(outcomes.correct)
  slopes = jax.jacobian(jax.nn.log_softmax)(policies.calls)
  return Calls(
      num_calls=jnp.ones_like(outcomes.num_calls),
      rewards=rewards[:, None],
      scores=slopes[outcomes.num_calls][:, None],
  )


def sub_calls(
    policies: Policies, game: Game, outcomes: Outcomes, weights: RewardWeights
) -> Calls:
  """Sees each outcome as the calls of the sub-agent.

      R_S = b1 · format + b2 · main_correct + b3 · expert, 0 if the format of
      the call is invalid      (Eq. 5)

  Args:
    policies: main and sub policy.
    game: grades and formats.
    outcomes: all of them.
    weights: b1, b2 and b3.

  Returns:
    d calls in each outcome, P = REQUESTS · R.
  """
  real = _real(outcomes)
  alone = weights.format + weights.expert * jnp.asarray(game.expert)
  shared = weights.correct * jnp.asarray(outcomes.correct)
  earned = alone[outcomes.reports] + shared[:, None]
  counted = real * jnp.asarray(game.valid)[outcomes.reports]
  slopes = jax.jacobian(_report_logprobs)(policies.reports, outcomes)
  slopes = slopes.reshape(*real.shape, -1)
  return Calls(
      num_calls=jnp.asarray(outcomes.num_calls),
      rewards=earned * counted,
      scores=jnp.where(real[..., None], slopes, 0.0),
  )


def expected_reward(
    policies: Policies,
    *,
    game: Game,
    outcomes: Outcomes,
    calls: Calls,
    call_weights: Float[Array, " N"],
) -> Float[Array, ""]:
  """Computes a role's objective exactly.

      J = E[v(d) Σ_n R_n] / E[v(d) d]

  With v = 1/d rollouts count once: the mean over rollouts with calls of their
  calls' mean reward. With v = 1 calls count once: the mean over calls. How
  often it is called is not the sub-agent's doing, so by the parameters of
  either role's own policy the derivative is that role's true gradient.

  Args:
    policies: main and sub policy; differentiable.
    game: the rest.
    outcomes: all of them.
    calls: the role's; only their numbers and rewards matter.
    call_weights: v, what each call of an outcome counts.

  Returns:
    J in units of reward.
  """
  chance = jnp.mean(probabilities(policies, game, outcomes), axis=0)
  counted = chance * call_weights
  earned = jnp.sum(counted * jnp.sum(calls.rewards, axis=1))
  return earned / jnp.sum(counted * calls.num_calls)


def own_gradient(
    chance: Float[Array, " N"],
    calls: Calls,
    call_weights: Float[Array, " N"],
) -> Float[Array, " P"]:
  """Computes what crediting each call with its own reward aims at.

      u = E[v(d) Σ_n R_n ∇ log π(r_n)] / E[v(d) d]

  Of the derivative of `expected_reward` it leaves out what a report does to
  the rewards of the other calls of its rollout, through `main_correct`. For
  the main agent, called once, there is nothing to leave out.

  Args:
    chance: probability of each outcome.
    calls: the role's.
    call_weights: v, as in `expected_reward`.

  Returns:
    u, flat.
  """
  counted = chance * call_weights
  summed = jnp.einsum("n,nc,ncp->p", counted, calls.rewards, calls.scores)
  return summed / jnp.sum(counted * calls.num_calls)


def _real(outcomes: Outcomes) -> Array:
  """Marks the calls that were made, [N, C] bool."""
  order = jnp.arange(outcomes.reports.shape[1])
  return order[None] < jnp.asarray(outcomes.num_calls)[:, None]


def _report_logprobs(reports: Array, outcomes: Outcomes) -> Array:
  """Looks up log π of every report, [N, C]."""
  order = jnp.arange(outcomes.reports.shape[1])
  request = jnp.minimum(order, REQUESTS - 1)
  return jax.nn.log_softmax(reports)[request[None], outcomes.reports]
