"""Batches of rollouts of `game`, aligned: all that can be, or random ones.

A batch is B tasks of K rollouts. Lists are exact and for one task
(`enumerate_slots`); `sample_slots` draws. The draws that alignment makes are
part of both.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mgrpo_jax import numerics
from mgrpo_jax.alignment import gather
from mgrpo_jax.credit import Align
from mgrpo_jax.testing.game import Calls


@flax.struct.dataclass
class Slots:
  """Aligned calls of G batches."""

  rewards: Any  # [G, B, K, D] float
  weights: Any  # [G, B, K, D] float, the alignment's
  scores: Any  # [G, B, K, D, P] float, ∇ log π of the slot's call
  subtasks: Any  # [G, B, K, D] int32, the request it answers
  roots: Any  # [G, B, K, 1] float, what the rollout's root earned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Enumerated:
  """Every batch of one task.

  Attributes:
    slots: of the G batches, B = 1; a group in one order stands for all.
    chance: [G] float64, probability of each.
    rollouts: [G] int64, equal where only the alignment's draws differ.
  """

  slots: Slots
  chance: np.ndarray
  rollouts: np.ndarray


def call_weights(
    num_calls: Int[Array, " N"], *, align: Align, num_slots: int
) -> Float[Array, " N"]:
  """Computes what a call weighs on average over the alignment's draws.

      v(d) = Σ_slots w / d      D/d, min(d, D)/d or 1/d

  Args:
    num_calls: d, int32.
    align: one of `alignment`'s strategies.
    num_slots: D.

  Returns:
    v, 0 where d = 0.
  """
  total = jnp.sum(_weights(num_calls, align, num_slots), axis=1)
  return numerics.divide(total, num_calls.astype(total.dtype))


def sample_slots(
    key: PRNGKeyArray,
    draws: PRNGKeyArray,
    chance: Float[Array, "Q N"],
    calls: Calls,
    *,
    align: Align,
    num_batches: int,
    num_tasks: int,
    num_rollouts: int,
    num_slots: int,
) -> Slots:
  """Draws batches of tasks of random kinds.

  Args:
    key: of kinds and rollouts.
    draws: of the alignment.
    chance: probability of each outcome on each kind of task.
    calls: the role's, in each outcome.
    align: one of `alignment`'s strategies.
    num_batches: G.
    num_tasks: B.
    num_rollouts: K.
    num_slots: D.

  Returns:
    The slots.
  """
  tasks = num_batches * num_tasks
  happened = _happened(key, chance, (tasks, num_rollouts))
  aligned = align(draws, calls.num_calls[happened], num_slots=num_slots)
  slots = Slots(
      rewards=gather(calls.rewards[happened], aligned),
      weights=aligned.weight,
      scores=calls.scores[happened[..., None], aligned.index],
      subtasks=gather(calls.subtasks[happened], aligned),
      roots=calls.roots[happened][..., None],
  )
  return jax.tree.map(
      lambda x: x.reshape(num_batches, num_tasks, *x.shape[1:]), slots
  )


def _happened(
    key: PRNGKeyArray, chance: Float[Array, "Q N"], shape: tuple[int, int]
) -> Int[Array, "tasks K"]:
  """Draws a kind for each task and an outcome for each rollout."""
  kind_key, outcome_key = jax.random.split(key)
  kinds, number = chance.shape
  kind = jax.random.randint(kind_key, (shape[0], 1), 0, kinds)
  # Kind q takes up [q, q + 1) of one ascending scale.
  steps = jnp.cumsum(chance, axis=1) + jnp.arange(kinds)[:, None]
  point = jax.random.uniform(outcome_key, shape) + kind
  place = jnp.searchsorted(steps.ravel(), point, side="right")
  return jnp.clip(place - kind * number, 0, number - 1)


def enumerate_slots(
    chance: Float[np.ndarray, "Q N"],
    calls: Calls,
    *,
    align: Align,
    num_rollouts: int,
    num_slots: int,
) -> Enumerated:
  """Lists every batch of one task, on the host.

  Args:
    chance: probability of each outcome on each kind of task.
    calls: the role's, in each outcome.
    align: one of `alignment`'s strategies.
    num_rollouts: K; groups that differ in order only are listed once.
    num_slots: D.

  Returns:
    The batches with their probabilities.
  """
  chance, calls = merged(np.asarray(chance, np.float64), calls)
  parent, index, share = _fillings(calls.num_calls, align, num_slots)
  members = _multisets(len(parent), num_rollouts)
  each = chance[:, parent] * share
  orders = _orders(members)
  likely = np.mean(orders * np.prod(each[:, members], axis=2), axis=0)
  weights = np.asarray(_weights(calls.num_calls, align, num_slots))
  where = parent[:, None], index
  slots = Slots(
      rewards=calls.rewards[where][members][:, None],
      weights=weights[parent][members][:, None],
      scores=calls.scores[where][members][:, None],
      subtasks=calls.subtasks[where][members][:, None],
      roots=calls.roots[parent][members][:, None, :, None],
  )
  _, rollouts = np.unique(parent[members], axis=0, return_inverse=True)
  return Enumerated(slots=slots, chance=likely, rollouts=rollouts.ravel())


def merged(
    chance: Float[np.ndarray, "Q N"], calls: Calls
) -> tuple[Float[np.ndarray, "Q M"], Calls]:
  """Joins outcomes that a role cannot tell apart, on the host.

  Args:
    chance: probability of each outcome on each kind of task.
    calls: the role's, in each outcome.

  Returns:
    Both, of M ≤ N outcomes.
  """
  number = len(calls.num_calls)
  seen = jax.tree.map(lambda x: np.asarray(x).reshape(number, -1), calls)
  rows = np.concatenate(jax.tree.leaves(seen), axis=1)
  _, first, group = np.unique(
      rows, axis=0, return_index=True, return_inverse=True
  )
  joined = np.zeros((len(first), len(chance)))
  np.add.at(joined, group.ravel(), chance.T)
  return joined.T, jax.tree.map(lambda x: np.asarray(x)[first], calls)


@functools.partial(jax.jit, static_argnames=("align", "num_slots"))
def _weights(num_calls: Array, align: Align, num_slots: int) -> Array:
  """Computes the alignment's weights [N, D]; no draw changes them."""
  aligned = align(jax.random.key(0), num_calls[None], num_slots=num_slots)
  return aligned.weight[0]


def _fillings(
    num_calls: np.ndarray, align: Align, num_slots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Lists outcome, index [D] and probability of all that draws can do."""
  parents, indices, shares = [], [], []
  filled = np.sum(np.asarray(_weights(num_calls, align, num_slots)) > 0, 1)
  for outcome, (d, slots) in enumerate(
      zip(num_calls.tolist(), filled.tolist(), strict=True)
  ):
    options = _options(d, slots)
    padding = (0,) * (num_slots - slots)
    indices += [option + padding for option in options]
    parents += [outcome] * len(options)
    shares += [1 / len(options)] * len(options)
  return np.array(parents), np.array(indices), np.array(shares)


def _options(num_calls: int, filled: int) -> list[tuple[int, ...]]:
  """Lists the equally likely ways to fill slots with calls."""
  if num_calls > filled:
    return list(itertools.combinations(range(num_calls), filled))
  calls = tuple(range(num_calls))
  extra = filled - num_calls
  return [calls + more for more in itertools.product(calls, repeat=extra)]


def _multisets(number: int, size: int) -> np.ndarray:
  """Lists the multisets of a size, [G, size], ascending."""
  chosen = itertools.combinations_with_replacement(range(number), size)
  return np.array(list(chosen))


def _orders(members: np.ndarray) -> np.ndarray:
  """Counts the orders of each multiset: K! / Π multiplicities!."""
  run = np.ones(len(members))
  repeats = np.ones(len(members))
  for left, right in itertools.pairwise(members.T):
    run = np.where(left == right, run + 1, 1.0)
    repeats *= run
  return math.factorial(members.shape[1]) / repeats
