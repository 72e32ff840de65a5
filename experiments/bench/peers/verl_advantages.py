"""verl: the advantages of `verl.trainer.ppo.core_algos`."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo import core_algos

from experiments.bench.peers import compare, of_ours, torch_side
from experiments.bench.peers.compare import Batch, Check, Numbers, Pair
from mgrpo_jax import advantages

LONE = "a lone member keeps its reward"
WHITE = "n-1; ε 1e-8 on the variance"
WHOLE = core_algos.compute_reinforce_plus_plus_outcome_advantage
BASELINE = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage
tensor = torch_side.tensor


def checks() -> list[Check]:
  """Group advantages, those of tokens too."""
  found = [
      Check(
          what=own.__name__,
          peer=getattr(function, "func", function).__name__,
          difference=difference,
          pairs=functools.partial(_group_pairs, function, own, lone, epsilon),
          limit=compare.SINGLE,
      )
      for function, own, lone, difference, epsilon in _groupings()
  ]
  return found + [
      Check(
          what="per_task, equal rewards",
          peer="compute_grpo_outcome_advantage",
          difference="rounding of the mean over ε",
          pairs=_equal_pairs,
      ),
      Check(
          what="per_batch, weights = tokens",
          peer="compute_reinforce_plus_plus_outcome_advantage",
          difference=WHITE,
          pairs=functools.partial(_batch_pairs, False),
          limit=compare.SINGLE,
      ),
      Check(
          what="per_batch of mean_only, weights = tokens",
          peer="compute_reinforce_plus_plus_baseline_outcome_advantage",
          difference=f"{WHITE}; {LONE}",
          pairs=functools.partial(_batch_pairs, True),
          limit=compare.SINGLE,
      ),
      Check(
          what="generalised_advantages",
          peer="compute_gae_advantage_return",
          difference=f"whitened over the batch ({WHITE})",
          pairs=_critic_pairs,
          limit=compare.SINGLE,
      ),
  ]


def _groupings() -> (
    list[tuple[Callable[..., Any], Any, bool, str, float | None]]
):
  """Theirs, ours, whether a lone member counts, what differs, and ε."""
  return [
      (
          core_algos.compute_grpo_outcome_advantage,
          advantages.per_task,
          True,
          f"n-1; ε 1e-6 on the deviation; {LONE}",
          1e-6,
      ),
      (
          core_algos.compute_grpo_vectorized_outcome_advantage,
          advantages.per_task,
          True,
          f"n-1; ε 1e-6 on the deviation; {LONE}",
          1e-6,
      ),
      (
          functools.partial(
              core_algos.compute_grpo_outcome_advantage,
              norm_adv_by_std_in_grpo=False,
          ),
          advantages.mean_only,
          True,
          LONE,
          None,
      ),
      (
          core_algos.compute_rloo_outcome_advantage,
          advantages.leave_one_out,
          True,
          LONE,
          None,
      ),
      (
          core_algos.compute_rloo_vectorized_outcome_advantage,
          advantages.leave_one_out,
          False,
          "",
          None,
      ),
  ]


def _members(batch: Batch) -> tuple[Numbers, Numbers, Numbers]:
  """Rewards at the first of two tokens, groups, and places of the present."""
  present = np.flatnonzero(batch.present)
  groups = present // batch.rewards.shape[1]
  rewards = np.zeros((len(present), 2), np.float32)
  rewards[:, 0] = batch.rewards.reshape(-1)[present]
  return rewards, groups, present


def _grouped(function: Callable[..., Any], batch: Batch) -> Numbers:
  """Calls one of their group advantages; 0 where none is present, [B, K]."""
  found = np.zeros(batch.rewards.size)
  rewards, groups, present = _members(batch)
  if len(present):
    told, _ = function(
        tensor(rewards, torch.float32), torch.ones(rewards.shape), groups
    )
    found[present] = told[:, 0].numpy()
  return found.reshape(batch.rewards.shape)


def _group_pairs(
    function: Callable[..., Any],
    own: Callable[..., Any],
    lone: bool,
    epsilon: float | None,
    batch: Batch,
) -> Iterator[Pair]:
  """Advantages of groups of any size."""
  there = batch.present.astype(np.float64)
  plain = of_ours.advantages(own, batch.rewards, there)
  kept = np.ones(len(plain), bool)
  ours, scale = plain, float(np.abs(batch.rewards).max())
  single = there.sum(1) == 1
  if epsilon is not None:
    ours = of_ours.rescaled(plain, batch.rewards, there, epsilon=epsilon)
    kept, scale = single | of_ours.spread(batch.rewards, there), 1.0
  if lone:
    rest = (single[:, None] & batch.present) * batch.rewards
    ours = ours + rest / (1 + (epsilon or 0.0))
  if kept.any():
    theirs = _grouped(function, batch)
    yield Pair(
        theirs=theirs[kept], ours=ours[kept], plain=plain[kept], scale=scale
    )


def _equal_pairs(batch: Batch) -> Iterator[Pair]:
  """GRPO's advantages of groups of equal rewards; ours are 0."""
  for members in range(2, 17):
    rewards = torch.full((members, 1), float(batch.rewards[0, 0]))
    theirs, _ = core_algos.compute_grpo_outcome_advantage(
        rewards, torch.ones(members, 1), np.zeros(members, int)
    )
    nothing = np.zeros(theirs.shape)
    yield Pair(theirs=theirs.numpy(), ours=nothing, plain=nothing, scale=1)


def _batch_pairs(by_group: bool, batch: Batch) -> Iterator[Pair]:
  """REINFORCE++: every token of a trajectory weighs the same."""
  mask, shape = batch.mask, batch.rewards.shape
  if mask.sum() < 2:
    return
  tokens = mask.sum(1).reshape(shape)
  rewards = tensor(of_ours.at_last_token(batch, batch.rewards.reshape(-1)))
  if by_group:
    theirs, _ = BASELINE(rewards, tensor(mask), _groups(shape))
    # Their group means are over all members, those without tokens at 0.
    centred = batch.rewards * (tokens > 0)
    if shape[1] > 1:
      ones = np.ones(shape)
      centred = of_ours.advantages(advantages.mean_only, centred, ones)
  else:
    config = types.SimpleNamespace(gamma=1.0)
    theirs, _ = WHOLE(rewards, tensor(mask), config=config)
    centred = batch.rewards
  line, weights = centred.reshape(1, -1), tokens.reshape(1, -1)
  if not of_ours.spread(line, weights)[0]:
    return
  plain = of_ours.advantages(advantages.per_batch, line, weights)
  # A = deviation / std; theirs is the sample's, over all tokens.
  population, sample = of_ours.deviations(line, weights)
  ours = plain * population / np.sqrt(sample**2 + 1e-8)
  yield Pair(
      theirs=theirs.numpy(),
      ours=ours.reshape(-1, 1) * mask,
      plain=plain.reshape(-1, 1) * mask,
      scale=1,
  )


def _groups(shape: tuple[int, ...]) -> Numbers:
  """The task of every trajectory, [N]."""
  return np.arange(shape[0] * shape[1]) // shape[1]


def _critic_pairs(batch: Batch) -> Iterator[Pair]:
  """Generalised advantages, before and after whitening."""
  where = batch.mask > 0
  if where.sum() < 2:  # they refuse
    return
  rewards = batch.advantages
  white, returns = core_algos.compute_gae_advantage_return(
      tensor(of_ours.at_last_token(batch, rewards)),
      tensor(batch.old_values),
      tensor(batch.mask),
      0.97,
      0.9,
  )
  ours = of_ours.token_advantages(batch, rewards, discount=0.97, trace=0.9)
  theirs = (returns.numpy() - batch.old_values)[where]
  yield Pair(theirs=theirs, ours=ours[where], plain=ours[where], scale=1)
  yield Pair(
      theirs=white.numpy()[where],
      ours=of_ours.whitened(ours, batch.mask)[where],
      plain=ours[where],
      scale=1,
  )
