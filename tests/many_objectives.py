"""Sixteen objectives of M-GRPO's family in which all parts meet in pairs.

An orthogonal array of strength two: any two values of surrogate, aggregation,
KL, importance and ratio occur together in one of them; with and without an
entropy bonus and a critic. Two of imitation beside them.
"""

import functools
import itertools

import jax

from mgrpo_jax import importance, losses, objectives, update
from mgrpo_jax.critic import Critic

MAX_TOKENS = 16.0
SURROGATES = (  # with ε_low, ε_high: tight, so that all are at work
    (losses.clipped_surrogate, 0.05, 0.05),
    (losses.clipped_surrogate, 0.05, 0.1),
    (functools.partial(losses.dual_clipped_surrogate, floor=1.2), 0.05, 0.1),
    (losses.cispo_surrogate, 0.05, 0.1),
)
AGGREGATIONS = (
    losses.token_mean,
    losses.sequence_mean_token_mean,
    losses.sequence_mean_token_sum,
    functools.partial(
        losses.sequence_mean_token_sum_norm, max_tokens=MAX_TOKENS
    ),
)
KLS = (None, losses.kl_k1, losses.kl_k2, losses.kl_k3)
IMPORTANCES = (
    None,
    importance.by_token,
    importance.by_sequence,
    importance.reject_sequences,
)
RATIOS = (
    losses.token_ratio,
    losses.sequence_ratio,
    losses.geometric_ratio,
    losses.token_ratio,
)
CRITIC = Critic(coefficient=0.5, discount=0.95, trace=0.9, clip=0.02)
# Multiplication of the field of four elements, whose addition is ^.
TIMES = ((0, 0, 0, 0), (0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2))


def columns(a, b):
  """Row (a, b) of the array: five columns of four values."""
  return a, b, a ^ b, a ^ TIMES[2][b], a ^ TIMES[3][b]


def extras(a, b):
  """Whether there is an entropy bonus, and a critic.

  Both meet every surrogate, aggregation and KL; five columns are all that an
  array of sixteen rows has, so the first follows from the importance and the
  second from the ratio.
  """
  return (a ^ b >> 1) & 1, (a >> 1 ^ b) & 1


def as_given(params, tokens, positions, segment_ids, *, wanted, prefix_ids):
  """Takes what was said of packed tokens for the parameters."""
  return params


# Programs that run once: time spent on optimising them is lost.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def policy_loss(a, b):
  """The objective of a row."""
  surrogate, aggregation, kl, weighting, ratio = columns(a, b)
  surrogate, clip_low, clip_high = SURROGATES[surrogate]
  kl = KLS[kl]
  return objectives.PolicyLoss(
      ratio=RATIOS[ratio],
      aggregation=AGGREGATIONS[aggregation],
      clip_low=clip_low,
      clip_high=clip_high,
      kl=kl,
      kl_coefficient=0.0 if kl is None else 0.3,
      importance=IMPORTANCES[weighting],
      importance_cap=3.0,
      surrogate=surrogate,
      entropy_coefficient=0.05 * extras(a, b)[0],
      critic=CRITIC if extras(a, b)[1] else None,
  )


def accumulate_each(said, batch, totals):
  """By objective: its gradient by what was said of packed tokens, and tally."""
  return {
      name: update.accumulate(
          update.zeros(said),
          said,
          batch,
          totals,
          objective=objective,
          predict_fn=as_given,
      )
      for name, objective in OBJECTIVES.items()
  }


POLICY_LOSSES = {
    f"policy{a}{b}": policy_loss(a, b)
    for a, b in itertools.product(range(4), repeat=2)
}
OBJECTIVES = {
    **POLICY_LOSSES,
    "imitation": objectives.ImitationLoss(context_weight=0.0),
    "imitation_reading": objectives.ImitationLoss(context_weight=0.1),
}
