"""verl: `verl.trainer.ppo.core_algos`; losses in float64."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.workers.config import ActorConfig

from experiments.bench.peers import compare, torch_side, verl_advantages
from experiments.bench.peers.compare import Batch, Check, Pair
from mgrpo_jax import critic, importance, losses

NAME = f"verl {importlib.metadata.version('verl')}"
EMPTY = "trajectories without tokens are not counted"
TWENTY = "log ρ of a token within ±20"
AGGREGATIONS = {
    "token-mean": losses.token_mean,
    "seq-mean-token-mean": losses.sequence_mean_token_mean,
    "seq-mean-token-sum": losses.sequence_mean_token_sum,
    "seq-mean-token-sum-norm": compare.sequence_mean_token_sum_norm,
}
tensor = torch_side.tensor


def checks() -> list[Check]:
  """Everything of verl that has a counterpart here."""
  value = Check(
      what="clipped_value_loss, token_mean",
      peer="compute_value_loss",
      difference="",
      pairs=_value_pairs,
      limit=compare.DOUBLE,
  )
  return [
      *verl_advantages.checks(),
      value,
      *_policy_checks(),
      *_kl_checks(),
      *_weight_checks(),
  ]


def _policy_checks() -> list[Check]:
  """Policy losses and aggregations."""
  dual = functools.partial(losses.dual_clipped_surrogate, floor=3.0)
  twenty, ten = compare.bounded(20.0), compare.bounded_mean(np.inf, 10.0)
  cispo = losses.cispo_surrogate
  forms: list[tuple[str, Callable[..., Any], str, dict[str, Any], Any]] = [
      (
          f"token_ratio, dual clip, {own.__name__}",
          core_algos.compute_policy_loss_vanilla,
          f"{TWENTY}; {EMPTY}",
          {"surrogate": dual, "aggregation": own, "mode": mode},
          twenty,
      )
      for mode, own in AGGREGATIONS.items()
  ]
  forms += [
      (
          "token_ratio, clipped, importance by token",
          core_algos.compute_policy_loss_vanilla,
          f"{TWENTY}; no loss without a dual clip: at 1e30 here",
          {"importance": importance.by_token, "floor": 1e30},
          twenty,
      ),
      (
          "geometric_ratio, mean of means",
          core_algos.compute_policy_loss_gspo,
          f"log ρ of a trajectory ≤ 10; {EMPTY}",
          {
              "ratio": losses.geometric_ratio,
              "aggregation": losses.sequence_mean_token_mean,
              "mode": "seq-mean-token-mean",
          },
          ten,
      ),
      (
          "cispo_surrogate (gradients)",
          core_algos.compute_policy_loss_cispo,
          f"{TWENTY} (drawn within); its value has the factor log π",
          {"surrogate": cispo},
          None,
      ),
  ]
  return [
      Check(
          what=what,
          peer=function.__name__,
          difference=difference,
          pairs=functools.partial(_policy_pairs, function, own, adjust),
          limit=compare.DOUBLE,
      )
      for what, function, difference, own, adjust in forms
  ]


def _kl_checks() -> list[Check]:
  """Estimators of KL; k3 is bounded twice."""
  forms = (
      ("k1", losses.kl_k1, ""),
      ("k2", losses.kl_k2, ""),
      ("low_var_kl", losses.kl_k3, "its log within ±20, then k3 ≤ 10"),
  )
  return [
      Check(
          what=own.__name__,
          peer=f"kl_penalty {kind}",
          difference=difference,
          pairs=functools.partial(_kl_pairs, kind, own),
          limit=compare.DOUBLE,
      )
      for kind, own, difference in forms
  ]


def _weight_checks() -> list[Check]:
  """Importance weights."""
  correction = rollout_corr_helper.compute_rollout_correction_weights
  rejection = rollout_corr_helper.compute_rollout_rejection_mask
  forms: list[tuple[Callable[..., Any], Any, dict[str, Any], str]] = [
      (
          importance.by_token,
          correction,
          {"rollout_is": "token", "rollout_is_threshold": compare.CAP},
          TWENTY,
      ),
      (
          importance.by_sequence,
          correction,
          {"rollout_is": "sequence", "rollout_is_threshold": compare.CAP},
          "log ρ of a trajectory within ±20",
      ),
      (
          importance.reject_sequences,
          rejection,
          {
              "rollout_rs": "seq_sum_k1",
              "rollout_rs_threshold": f"{1 / compare.CAP}_{compare.CAP}",
          },
          TWENTY,
      ),
  ]
  return [
      Check(
          what=own.__name__,
          peer=" ".join([function.__name__, next(iter(keywords.values()))]),
          difference=difference,
          pairs=functools.partial(_weight_pairs, own, function, keywords),
          limit=compare.DOUBLE,
      )
      for own, function, keywords, difference in forms
  ]


def _value_pairs(batch: Batch) -> Iterator[Pair]:
  """The critic's loss."""
  theirs = torch_side.value_and_grad(
      lambda values: core_algos.compute_value_loss(
          values,
          tensor(batch.ref),
          tensor(batch.old_values),
          tensor(batch.mask),
          0.2,
      )[0],
      batch.values,
  )
  ours = compare.aggregated(
      functools.partial(critic.clipped_value_loss, clip=0.2),
      batch,
      (batch.values, batch.old_values, batch.ref),
  )
  yield from compare.loss_pairs(theirs, ours, ours)


def _policy_pairs(
    function: Callable[..., Any],
    settings: dict[str, Any],
    adjust: Any,
    batch: Batch,
) -> Iterator[Pair]:
  """A policy loss."""
  own = {k: v for k, v in settings.items() if k not in ("mode", "floor")}
  config = ActorConfig(
      strategy="fsdp",
      rollout_n=1,
      use_dynamic_bsz=True,
      clip_ratio_low=compare.CLIP["clip_low"],
      clip_ratio_high=compare.CLIP["clip_high"],
      clip_ratio_c=settings.get("floor", 3.0),
  )
  weights = None
  if "importance" in own:
    with compare.precision(np.float64):
      told = (batch.old, batch.sampler, batch.mask)
      ratio = importance.by_token(*map(jnp.asarray, told), cap=compare.CAP)
    weights = tensor(ratio)
  if own.get("surrogate") is losses.cispo_surrogate:
    near = np.clip(batch.now, batch.old - 19, batch.old + 19)
    batch = dataclasses.replace(batch, now=near)
  spread = np.repeat(batch.advantages[:, None], batch.mask.shape[1], axis=1)
  theirs = torch_side.value_and_grad(
      lambda now, _: function(
          tensor(batch.old),
          now,
          tensor(spread),
          tensor(batch.mask),
          settings.get("mode", "token-mean"),
          config,
          weights,
      )[0],
      batch.now,
      batch.entropy,
  )
  chosen = compare.objective(**own)
  pieces = [
      compare.policy_loss(chosen, batch, weight=weight, adjust=how)
      for weight, how in ((batch.filled, adjust), (None, None))
  ]
  only = own.get("surrogate") is losses.cispo_surrogate
  yield from compare.loss_pairs(theirs, *pieces, gradients_only=only)


def _kl_pairs(
    kind: str, own: Callable[..., Any], batch: Batch
) -> Iterator[Pair]:
  """An estimator of KL, averaged over tokens."""
  theirs = torch_side.value_and_grad(
      lambda now: core_algos.agg_loss(
          core_algos.kl_penalty(now, tensor(batch.ref), kind),
          tensor(batch.mask),
          "token-mean",
      ),
      batch.now,
  )

  def bounded(now: Any, ref: Any) -> Any:
    found = own(ref - (ref - now).clip(-20, 20), ref)
    return found.clip(-10, 10)

  both = (batch.now, batch.ref)
  plain = compare.aggregated(own, batch, both)
  ours = plain
  if own is losses.kl_k3:
    ours = compare.aggregated(bounded, batch, both)
  yield from compare.loss_pairs(theirs, ours, plain)


def _weight_pairs(
    own: Callable[..., Any],
    function: Callable[..., Any],
    keywords: dict[str, Any],
    batch: Batch,
) -> Iterator[Pair]:
  """Importance weights of sampled tokens."""
  where = batch.mask > 0
  gap = np.where(where, batch.old - batch.sampler, 0.0)
  theirs, _ = function(tensor(gap), tensor(batch.mask), **keywords)
  with compare.precision(np.float64):
    plain = np.asarray(
        own(batch.old, batch.sampler, batch.mask, cap=compare.CAP)
    )
    near = gap.clip(-20, 20)
    if own is importance.by_sequence:  # bounds the sum, which we bound at 40
      total = (gap * where).sum(1, keepdims=True).clip(-20, 20)
      near = where * total / np.maximum(where.sum(1, keepdims=True), 1)
    ours = np.asarray(
        own(near, np.zeros(gap.shape), batch.mask, cap=compare.CAP)
    )
  yield Pair(
      theirs=theirs.numpy()[where],
      ours=ours[where],
      plain=plain[where],
      scale=1,
  )
