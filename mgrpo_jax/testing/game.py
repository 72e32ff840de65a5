"""A team of two whose every outcome can be listed, so gradients are known.

The main agent decides how often to ask, d of 0..C. Each of A attempts at the
n-th request gets one of R reports; the first request and the later ones have
logits of their own. The main agent sees the first attempt at each; the chance
that it is right grows with the useful reports among these and depends on the
kind of task. Rewards are M-GRPO's (arXiv 2511.13288, Eq. 4–5).

    p(d, r, c) = π_main(d) Π_{n<d} Π_a π_sub(r_na | n) P(c | useful r_n0, kind)

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

  calls: Any  # [C + 1] float, logits of the number of requests
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

  requests: Any  # [N] int32, d
  reports: Any  # [N, C, A] int32, 0 beyond d
  correct: Any  # [N] float, 1 where the main agent is right


@flax.struct.dataclass
class Calls:
  """One role's calls in each outcome; P parameters of its policy.

  At most M of them: 1 of the main agent, C·A of the sub-agent.
  """

  num_calls: Any  # [N] int32, A d
  rewards: Any  # [N, M] float, 0 where there is no call
  scores: Any  # [N, M, P] float, ∇ log π of each call, likewise
  subtasks: Any  # [N, M] int32, number of the request, -1 likewise
  roots: Any  # [N] float, what the rollout's root earned


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


def outcomes(*, max_calls: int, num_reports: int, attempts: int) -> Outcomes:
  """Lists every outcome of a rollout, on the host.

  Args:
    max_calls: C ≥ 1, of the main agent.
    num_reports: R ≥ 1.
    attempts: A ≥ 1, at each request.

  Returns:
    N = 2 Σ_{d ≤ C} R^(A d) outcomes.

  Raises:
    ValueError: if a size is out of range, naming it.
  """
  sizes = dict(max_calls=max_calls, num_reports=num_reports, attempts=attempts)
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"{name} must be >= 1, got {size}")
  rows = [
      (d, said + (0,) * (attempts * (max_calls - d)), right)
      for d in range(max_calls + 1)
      for said in itertools.product(range(num_reports), repeat=attempts * d)
      for right in (0.0, 1.0)
  ]
  requests, reports, correct = zip(*rows, strict=True)
  said = np.array(reports, np.int32)
  return Outcomes(
      requests=np.array(requests, np.int32),
      reports=said.reshape(len(rows), max_calls, attempts),
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
  main = jax.nn.log_softmax(policies.calls)[outcomes.requests]
  chosen = jnp.exp(main + jnp.sum(jnp.where(real, said, 0.0), axis=(1, 2)))
  helps = jnp.where(real, jnp.asarray(game.useful)[outcomes.reports], 0)
  useful = jnp.sum(helps[..., 0], axis=1)  # the others are not seen
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
      num_calls=jnp.ones_like(outcomes.requests),
      rewards=rewards[:, None],
      scores=slopes[outcomes.requests][:, None],
      subtasks=jnp.zeros_like(outcomes.requests)[:, None],
      roots=rewards,
  )


def sub_calls(
    policies: Policies,
    game: Game,
    outcomes: Outcomes,
    weights: RewardWeights,
    *,
    roots: Float[Array, " N"],
) -> Calls:
  """Sees each outcome as the calls of the sub-agent.

      R_S = b1 · format + b2 · main_correct + b3 · expert, 0 if the format of
      the call is invalid      (Eq. 5)

  Args:
    policies: main and sub policy.
    game: grades and formats.
    outcomes: all of them.
    weights: b1, b2 and b3.
    roots: what the main agent earned, see `main_calls`.

  Returns:
    A d calls in each outcome, attempts at a request side by side as the
    library orders them; P = REQUESTS · R.
  """
  number, most, attempts = outcomes.reports.shape
  shape = (number, most * attempts)
  said = outcomes.reports.reshape(shape)
  real = _real(outcomes).reshape(shape)
  alone = weights.format + weights.expert * jnp.asarray(game.expert)
  shared = weights.correct * jnp.asarray(outcomes.correct)
  earned = alone[said] + shared[:, None]
  counted = real * jnp.asarray(game.valid)[said]
  slopes = jax.jacfwd(_report_logprobs)(policies.reports, outcomes)
  slopes = slopes.reshape(*shape, -1)
  asked = jnp.arange(shape[1], dtype=jnp.int32) // attempts
  return Calls(
      num_calls=jnp.asarray(outcomes.requests) * attempts,
      rewards=earned * counted,
      scores=jnp.where(real[..., None], slopes, 0.0),
      subtasks=jnp.where(real, asked[None], -1),
      roots=jnp.asarray(roots),
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
  """Marks the reports that were given, [N, C, A] bool."""
  order = jnp.arange(outcomes.reports.shape[1])
  asked = order[None] < jnp.asarray(outcomes.requests)[:, None]
  return jnp.broadcast_to(asked[..., None], outcomes.reports.shape)


def _report_logprobs(reports: Array, outcomes: Outcomes) -> Array:
  """Looks up log π of every report, [N, C, A]."""
  order = jnp.arange(outcomes.reports.shape[1])
  request = jnp.minimum(order, REQUESTS - 1)
  return jax.nn.log_softmax(reports)[request[:, None], outcomes.reports]
