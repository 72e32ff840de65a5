"""TRL: the losses and advantages inside its trainers, losses in float64.

They are methods of trainers; `trl_stand_in` is the trainer.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from trl import GRPOTrainer, RLOOTrainer

from experiments.bench.peers import compare, of_ours, trl_stand_in
from experiments.bench.peers.compare import Batch, Check, Pair
from mgrpo_jax import advantages, importance, losses

NAME = f"TRL {importlib.metadata.version('trl')}"
DEVIATION = "n-1; ε 1e-4 on the deviation"
Settings = dict[str, Any]


def checks() -> list[Check]:
  """Everything of TRL that has a counterpart here."""
  score = "_generate_and_score_completions"
  forms: list[tuple[str, str, str, Callable[[Batch], Iterator[Pair]]]] = [
      (
          "per_task",
          f"GRPOTrainer.{score}",
          DEVIATION,
          functools.partial(_scaled_pairs, "group"),
      ),
      (
          "mean_only",
          f"GRPOTrainer.{score} scale_rewards=none",
          "",
          functools.partial(_scaled_pairs, "none"),
      ),
      (
          "mean_only",
          f"GRPOTrainer.{score} scale_rewards=batch",
          f"over the batch's deviation ({DEVIATION})",
          functools.partial(_scaled_pairs, "batch"),
      ),
      ("leave_one_out", f"RLOOTrainer.{score}", "", _rloo_pairs),
  ]
  found = [
      Check(
          what=what,
          peer=peer,
          difference=difference,
          pairs=pairs,
          limit=compare.SINGLE,
      )
      for what, peer, difference, pairs in forms
  ]
  found.append(
      Check(
          what="per_task, equal rewards",
          peer=f"GRPOTrainer.{score}",
          difference="rounding of the mean over ε",
          pairs=_equal_pairs,
      )
  )
  return [*found, *_loss_checks(), *_weight_checks()]


def _loss_checks() -> list[Check]:
  """The whole loss, in the forms that it has here and there."""
  found = [
      Check(
          what=what,
          peer="GRPOTrainer._compute_loss "
          + " ".join(str(x) for x in there.values() if isinstance(x, str)),
          difference=difference,
          pairs=functools.partial(_loss_pairs, ours, there),
          limit=compare.DOUBLE,
      )
      for what, difference, ours, there in _forms()
  ]
  return [
      *found,
      Check(
          what="sequence_ratio, clipped, mean of trajectories",
          peer="RLOOTrainer._compute_loss",
          difference="the value counts -A of a trajectory without tokens",
          pairs=_sequence_pairs,
          limit=compare.DOUBLE,
      ),
  ]


def _forms() -> list[tuple[str, str, Settings, Settings]]:
  """What is compared, what differs, our loss, and their settings."""
  token, mean = losses.token_mean, losses.sequence_mean_token_mean
  dual = functools.partial(losses.dual_clipped_surrogate, floor=3.0)
  constant = functools.partial(
      losses.sequence_mean_token_sum_norm, max_tokens=40.0
  )
  return [
      (
          "token_ratio, clipped, mean of means",
          "",
          {"aggregation": mean},
          {"loss_type": "grpo"},
      ),
      (
          "token_ratio, dual clip, token_mean",
          "delta bounds ρ on both sides of A; the same above 1 + ε_high",
          {"surrogate": dual},
          {"loss_type": "bnpo", "delta": 3.0},
      ),
      ("token_ratio, token_mean", "", {}, {"loss_type": "dapo"}),
      (
          "token_ratio, sequence_mean_token_sum_norm",
          "",
          {"aggregation": constant},
          {"loss_type": "dr_grpo"},
      ),
      (
          "geometric_ratio, mean of means",
          "",
          {"ratio": losses.geometric_ratio, "aggregation": mean},
          {"loss_type": "grpo", "importance_sampling_level": "sequence"},
      ),
      (
          "geometric_ratio, sequence_mean_token_sum",
          "",
          {
              "ratio": losses.geometric_ratio,
              "aggregation": losses.sequence_mean_token_sum,
          },
          {"loss_type": "luspo", "importance_sampling_level": "sequence"},
      ),
      (
          "k3, entropy bonus, token_mean",
          "",
          {
              "kl": losses.kl_k3,
              "kl_coefficient": 0.1,
              "entropy_coefficient": 0.01,
          },
          {"loss_type": "bnpo", "beta": 0.1, "entropy_coef": 0.01},
      ),
      (
          "entropy bonus, mean of means",
          "entropy is a mean over tokens, whatever the loss is",
          {"aggregation": mean, "entropy_coefficient": 0.01},
          {"loss_type": "grpo", "entropy_coef": 0.01},
      ),
      (
          "cispo_surrogate (gradients)",
          "bound is epsilon_high itself, none below; factor log π",
          {
              "surrogate": losses.cispo_surrogate,
              "clip_low": 1.0,
              "aggregation": token,
          },
          {"loss_type": "cispo", "epsilon_high": 1.28},
      ),
  ]


def _weight_checks() -> list[Check]:
  """Importance weights, and the loss that they are in."""
  forms = (
      ("token_truncate", importance.by_token, ""),
      ("sequence_truncate", importance.by_sequence, ""),
      (
          "sequence_mask",
          importance.reject_sequences,
          "what is kept has ρ, not 1",
      ),
  )
  return [
      Check(
          what=f"{own.__name__}, token_mean",
          peer=f"GRPOTrainer {mode}",
          difference=difference,
          pairs=functools.partial(_weight_pairs, mode, own),
          limit=compare.DOUBLE,
      )
      for mode, own, difference in forms
  ]


def _scaled_pairs(scale: str, batch: Batch) -> Iterator[Pair]:
  """GRPO's advantages, scaled by a group's deviation, the batch's or not."""
  rewards, ones = batch.rewards, np.ones(batch.rewards.shape)
  if rewards.shape[1] < 2:  # refused by their configuration
    return
  kept = of_ours.spread(rewards, ones)
  told = trl_stand_in.scored(GRPOTrainer, batch, scale_rewards=scale)[
      "advantages"
  ]
  theirs = told.numpy().reshape(rewards.shape)
  size = float(np.abs(rewards).max())
  if scale == "group":
    plain = of_ours.advantages(advantages.per_task, rewards, ones)
    ours, size = of_ours.rescaled(plain, rewards, ones, epsilon=1e-4), 1.0
  else:
    plain = ours = of_ours.advantages(advantages.mean_only, rewards, ones)
  if scale == "batch":
    whole = rewards.reshape(1, -1)
    _, deviation = of_ours.deviations(whole, np.ones(whole.shape))
    ours, size = ours / (deviation + 1e-4), 1.0
  if kept.any():
    yield Pair(
        theirs=theirs[kept], ours=ours[kept], plain=plain[kept], scale=size
    )


def _equal_pairs(batch: Batch) -> Iterator[Pair]:
  """GRPO's advantages of one group of equal rewards; ours are 0."""
  members = len(batch.mask)
  if members > 1:
    rewards = np.full((1, members), batch.rewards[0, 0])
    equal = dataclasses.replace(batch, rewards=rewards)
    theirs = trl_stand_in.scored(GRPOTrainer, equal)["advantages"].numpy()
    nothing = np.zeros(members)
    yield Pair(theirs=theirs, ours=nothing, plain=nothing, scale=1)


def _rloo_pairs(batch: Batch) -> Iterator[Pair]:
  """RLOO's advantages."""
  ones = np.ones(batch.rewards.shape)
  ours = of_ours.advantages(advantages.leave_one_out, batch.rewards, ones)
  theirs = (
      trl_stand_in.scored(RLOOTrainer, batch)["advantages"]
      .numpy()
      .reshape(ones.shape)
  )
  scale = float(np.abs(batch.rewards).max())
  yield Pair(theirs=theirs, ours=ours, plain=ours, scale=scale)


def _loss_pairs(
    ours: Settings, there: Settings, batch: Batch
) -> Iterator[Pair]:
  """GRPO's loss in one of its forms."""
  theirs = trl_stand_in.loss(GRPOTrainer, batch, {}, **there)
  mine = compare.policy_loss(compare.objective(**ours), batch)
  plain = mine
  bonus = ours.get("entropy_coefficient", 0.0)
  if bonus and ours.get("aggregation"):  # ours follows the aggregation
    without = compare.objective(**(ours | {"entropy_coefficient": 0.0}))
    parts = compare.policy_loss(without, batch)
    mean = (batch.entropy * batch.mask).sum() / batch.mask.sum()
    slope = -bonus * batch.mask / batch.mask.sum()
    mine = (parts[0] - bonus * mean, parts[1], slope)
  only = there["loss_type"] == "cispo"
  yield from compare.loss_pairs(theirs, mine, plain, gradients_only=only)


def _sequence_pairs(batch: Batch) -> Iterator[Pair]:
  """RLOO's loss: the ratio of whole trajectories."""
  theirs = trl_stand_in.loss(RLOOTrainer, batch, {})
  chosen = compare.objective(
      ratio=losses.sequence_ratio, aggregation=losses.sequence_mean_token_mean
  )
  plain = compare.policy_loss(chosen, batch)
  constant = (batch.advantages * ~batch.filled).mean()
  total = np.abs(((batch.now - batch.old) * batch.mask).sum(1)).max()
  if total > 39:  # ours is bounded there, theirs overflows
    return
  ours = (plain[0] - constant, *plain[1:])
  yield from compare.loss_pairs(theirs, ours, plain)


def _weight_pairs(
    mode: str, own: Callable[..., Any], batch: Batch
) -> Iterator[Pair]:
  """A loss with the weights that their trainer makes of its engine's."""
  settings = {"vllm_importance_sampling_mode": mode, "use_vllm": True}
  if mode == "sequence_mask":
    settings["vllm_importance_sampling_clip_min"] = 1 / compare.CAP
  if batch.rewards.shape[1] < 2:
    return
  scored = trl_stand_in.scored(GRPOTrainer, batch, **settings)
  weights = scored["importance_sampling_ratio"].double()
  more = {"importance_sampling_ratio": weights}
  theirs = trl_stand_in.loss(
      GRPOTrainer, batch, more, loss_type="bnpo", **settings
  )

  def product(*arrays: Any, cap: float) -> Any:
    whole = importance.by_sequence(*arrays, cap=np.inf)
    return importance.reject_sequences(*arrays, cap=cap) * whole

  same = own is not importance.reject_sequences
  pieces = [
      compare.policy_loss(compare.objective(importance=one), batch)
      for one in (own if same else product, own)
  ]
  yield from compare.loss_pairs(theirs, *pieces)
