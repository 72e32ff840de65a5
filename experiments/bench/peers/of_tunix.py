"""Tunix: `tunix.rl.algo_core` and `tunix.rl.common`, in float32."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core, common

from experiments.bench.peers import compare, of_ours
from experiments.bench.peers.compare import Batch, Check, Numbers, Pair
from mgrpo_jax import advantages, critic, importance, losses

NAME = f"Tunix {importlib.metadata.version('google-tunix')}"
SINGLE = np.float32
EMPTY = "trajectories without tokens are not counted"
TWENTY = "log ρ of a token within ±20"
AGGREGATIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "token-mean": (losses.token_mean, ""),
    "sequence-mean-token-mean": (losses.sequence_mean_token_mean, EMPTY),
    "seq-mean-token-sum": (losses.sequence_mean_token_sum, EMPTY),
    "sequence-mean-token-scale": (compare.sequence_mean_token_sum_norm, EMPTY),
    "sequence-mean-token-sum-norm": (
        losses.sequence_mean_token_sum,
        f"{EMPTY}; divides by trajectories, not by a length",
    ),
}


def checks() -> list[Check]:
  """Everything of Tunix that has a counterpart here."""
  core = "algo_core."
  found = [
      Check(
          what="per_task",
          peer=core + "compute_advantages",
          difference="n-1; ε 1e-6 on the deviation; a lone member is NaN",
          pairs=_group_pairs,
          limit=compare.SINGLE,
      ),
      Check(
          what="per_task, equal rewards",
          peer=core + "compute_advantages",
          difference="rounding of the mean over ε",
          pairs=_equal_pairs,
      ),
      Check(
          what="leave_one_out",
          peer=core + "compute_rloo_advantages",
          difference="",
          pairs=functools.partial(
              _plain_pairs,
              algo_core.compute_rloo_advantages,
              advantages.leave_one_out,
          ),
          limit=compare.SINGLE,
      ),
      Check(
          what="mean_only",
          peer=core + "compute_drgrpo_advantages",
          difference="",
          pairs=functools.partial(
              _plain_pairs,
              algo_core.compute_drgrpo_advantages,
              advantages.mean_only,
          ),
          limit=compare.SINGLE,
      ),
      Check(
          what="generalised_advantages",
          peer=core + "compute_gae_advantages",
          difference="whitened over the batch (n-1, ε 1e-8 on the variance)",
          pairs=_critic_pairs,
          limit=compare.SINGLE,
      ),
      Check(
          what="clipped_value_loss, token_mean",
          peer=core + "ppo_value_loss_fn",
          difference="ε 1e-8 on the tokens",
          pairs=_value_pairs,
          limit=compare.SINGLE,
      ),
      *(_kl_check(kind) for kind in ("kl", "mse_kl", "low_var_kl")),
  ]
  for mode, (ours, difference) in AGGREGATIONS.items():
    found.append(
        Check(
            what=ours.__name__,
            peer=f"common.aggregate_loss {mode}",
            difference=difference,
            pairs=functools.partial(_aggregate_pairs, mode, ours),
            limit=compare.SINGLE,
        )
    )
  return [*found, *_policy_checks()]


def _policy_checks() -> list[Check]:
  """The whole loss, in the forms that it has here and there."""
  dual = functools.partial(losses.dual_clipped_surrogate, floor=3.0)
  mean = losses.sequence_mean_token_mean
  forms: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
      ("token_ratio, clipped, token_mean", TWENTY, {}, {}),
      (
          "token_ratio, dual clip, mean of means",
          f"{TWENTY}; {EMPTY}",
          {"surrogate": dual, "aggregation": mean},
          {"epsilon_c": 3.0, "loss_agg_mode": "sequence-mean-token-mean"},
      ),
      (
          "geometric_ratio, mean of means",
          f"log ρ of a trajectory ≤ 10, {TWENTY} first; {EMPTY}",
          {"ratio": losses.geometric_ratio, "aggregation": mean},
          {
              "loss_algo": "gspo-token",
              "loss_agg_mode": "sequence-mean-token-mean",
          },
      ),
      (
          "token_ratio with k3, importance by token",
          f"{TWENTY} (drawn within)",
          {
              "kl": losses.kl_k3,
              "kl_coefficient": 0.1,
              "importance": importance.by_token,
          },
          {"beta": 0.1, "weighted": True},
      ),
  ]
  found = [
      Check(
          what=what,
          peer="algo_core.grpo_loss_fn",
          difference=difference,
          pairs=functools.partial(
              _grpo_pairs, compare.objective(**ours), there
          ),
          limit=compare.SINGLE,
      )
      for what, difference, ours, there in forms
  ]
  ppo = compare.objective(surrogate=dual, entropy_coefficient=0.01)
  return [
      *found,
      Check(
          what="dual clip, entropy bonus",
          peer="algo_core.ppo_policy_loss_fn",
          difference="ε 1e-8 on the tokens; log ρ not bounded",
          pairs=functools.partial(_ppo_pairs, ppo),
          limit=compare.SINGLE,
      ),
  ]


def _grouped(function: Callable[..., Any], batch: Batch) -> Numbers:
  """Calls one of their group advantages, [B, K]."""
  rewards = np.asarray(batch.rewards, SINGLE)
  with np.errstate(all="ignore"):
    found = function(rewards.reshape(-1), rewards.shape[1])
  return np.asarray(found).reshape(rewards.shape)


def _group_pairs(batch: Batch) -> Iterator[Pair]:
  """GRPO's advantages, of groups with spread."""
  ones = np.ones(batch.rewards.shape)
  kept = of_ours.spread(batch.rewards, ones)
  plain = of_ours.advantages(advantages.per_task, batch.rewards, ones)
  ours = of_ours.rescaled(plain, batch.rewards, ones, epsilon=1e-6)
  if not kept.any():
    return
  theirs = _grouped(algo_core.compute_advantages, batch)
  yield Pair(theirs=theirs[kept], ours=ours[kept], plain=plain[kept], scale=1)


def _equal_pairs(batch: Batch) -> Iterator[Pair]:
  """GRPO's advantages of groups of equal rewards; ours are 0."""
  for members in range(2, 17):
    rewards = np.full(members, batch.rewards[0, 0], SINGLE)
    theirs = algo_core.compute_advantages(rewards, members)
    nothing = np.zeros(members)
    yield Pair(theirs=theirs, ours=nothing, plain=nothing, scale=1)


def _plain_pairs(
    function: Callable[..., Any], own: Callable[..., Any], batch: Batch
) -> Iterator[Pair]:
  """Advantages in units of reward, which agree as they are."""
  ours = of_ours.advantages(own, batch.rewards, np.ones(batch.rewards.shape))
  theirs = _grouped(function, batch)
  scale = float(np.abs(batch.rewards).max())
  yield Pair(theirs=theirs, ours=ours, plain=ours, scale=scale)


def _critic_pairs(batch: Batch) -> Iterator[Pair]:
  """Generalised advantages, before and after whitening."""
  rewards = np.asarray(batch.advantages, SINGLE)
  arrays = (of_ours.at_last_token(batch, rewards), batch.old_values, batch.mask)
  white, returns = algo_core.compute_gae_advantages(
      *(jnp.asarray(array, SINGLE) for array in arrays), 0.97, 0.9
  )
  ours = of_ours.token_advantages(batch, rewards, discount=0.97, trace=0.9)
  where = batch.mask > 0
  theirs = np.asarray(returns)[where] - batch.old_values[where]
  yield Pair(theirs=theirs, ours=ours[where], plain=ours[where], scale=1)
  if where.sum() > 1:
    yield Pair(
        theirs=np.asarray(white)[where],
        ours=of_ours.whitened(ours, batch.mask)[where],
        plain=ours[where],
        scale=1,
    )


def _value_pairs(batch: Batch) -> Iterator[Pair]:
  """The critic's loss; their value function answers what was drawn."""
  returns = batch.ref
  example = types.SimpleNamespace(
      prompt_ids=None,
      completion_ids=batch.mask,
      completion_mask=jnp.asarray(batch.mask, SINGLE),
      old_values=jnp.asarray(batch.old_values, SINGLE),
      returns=jnp.asarray(returns, SINGLE),
  )

  def loss(values: jax.Array) -> jax.Array:
    said = jnp.pad(values, ((0, 0), (0, 1)))
    with mock.patch.object(common, "compute_score", return_value=said):
      return algo_core.ppo_value_loss_fn(nnx.Module(), example, 0.2, 0, 0)[0]

  theirs = jax.value_and_grad(loss)(jnp.asarray(batch.values, SINGLE))
  ours = compare.aggregated(
      functools.partial(critic.clipped_value_loss, clip=0.2),
      batch,
      (batch.values, batch.old_values, returns),
      dtype=SINGLE,
  )
  yield from compare.loss_pairs(theirs, ours, ours)


def _kl_check(kind: str) -> Check:
  """One estimator of KL."""
  own = {"kl": losses.kl_k1, "mse_kl": losses.kl_k2, "low_var_kl": losses.kl_k3}

  def pairs(batch: Batch) -> Iterator[Pair]:
    def loss(now: jax.Array) -> jax.Array:
      found = common.compute_kl_divergence(
          now, jnp.asarray(batch.ref, SINGLE), kind
      )
      return common.aggregate_loss(
          found, jnp.asarray(batch.mask, SINGLE), "token-mean"
      )

    theirs = jax.value_and_grad(loss)(jnp.asarray(batch.now, SINGLE))
    ours = compare.aggregated(
        own[kind], batch, (batch.now, batch.ref), dtype=SINGLE
    )
    mine = ours
    if kind == "low_var_kl":  # what cancels there is compared in nats
      yield Pair(theirs=theirs[0], ours=ours[0], plain=ours[0], scale=1)
      mine = (np.asarray(theirs[0]), *ours[1:])
    yield from compare.loss_pairs(theirs, mine, ours)

  return Check(
      what=own[kind].__name__,
      peer=f"common.compute_kl_divergence {kind}",
      difference="exp(x) - 1 - x cancels near 0" if kind[0] == "l" else "",
      pairs=pairs,
      limit=compare.SINGLE,
  )


def _aggregate_pairs(
    mode: str, own: Callable[..., Any], batch: Batch
) -> Iterator[Pair]:
  """One aggregation of numbers of either sign."""

  def loss(values: jax.Array) -> jax.Array:
    return common.aggregate_loss(values, jnp.asarray(batch.mask, SINGLE), mode)

  theirs = jax.value_and_grad(loss)(jnp.asarray(batch.values, SINGLE))
  pieces = [
      compare.aggregated(
          lambda values: values,
          batch,
          (batch.values,),
          aggregate=own,
          weight=weight,
          dtype=SINGLE,
      )
      for weight in (batch.filled, None)
  ]
  yield from compare.loss_pairs(theirs, *pieces)


def _call(loss: Callable[..., Any], batch: Batch, **settings: Any) -> Any:
  """Their loss and gradients; the model says the log-probs of the batch."""
  single = {
      name: jnp.asarray(getattr(batch, name), SINGLE)
      for name in ("mask", "old", "ref", "sampler")
  }
  weights = importance.by_token(
      single["old"], single["sampler"], single["mask"], cap=compare.CAP
  )
  gains = jnp.asarray(batch.advantages, SINGLE)
  if settings.pop("broadcast", False):
    gains = gains[:, None]
  example = common.TrainExample(
      prompt_ids=None,
      prompt_mask=None,
      completion_ids=None,
      completion_mask=single["mask"],
      advantages=gains,
      ref_per_token_logps=single["ref"] if settings["beta"] else None,
      old_per_token_logps=single["old"],
      sampler_is_weights=weights if settings.pop("weighted", False) else None,
  )
  config = types.SimpleNamespace(**settings)

  def total(now: jax.Array, entropy: jax.Array) -> jax.Array:
    with (
        mock.patch.object(
            common, "compute_per_token_logps", return_value=(now, entropy)
        ),
        mock.patch.object(
            algo_core, "compute_entropy_from_logits", return_value=entropy
        ),
    ):
      return loss(nnx.Module(), example, config, 0, 0)[0]

  value, slopes = jax.value_and_grad(total, argnums=(0, 1))(
      jnp.asarray(batch.now, SINGLE), jnp.asarray(batch.entropy, SINGLE)
  )
  return value, *slopes


def _grpo_pairs(
    ours: Any, settings: dict[str, Any], batch: Batch
) -> Iterator[Pair]:
  """The loss of GRPO and GSPO."""
  config = {
      "beta": 0.0,
      "epsilon": compare.CLIP["clip_low"],
      "epsilon_high": compare.CLIP["clip_high"],
      "epsilon_c": None,
      "loss_algo": "grpo",
      "loss_agg_mode": "token-mean",
      "temperature": 1.0,
      "kl_loss_mode": "low_var_kl",
      "kl_clamp_value": None,
      **settings,
  }
  whole_rows = config["loss_algo"] != "grpo"
  adjust: compare.Adjust | None = (
      compare.bounded_mean(20.0, 10.0) if whole_rows else compare.bounded(20.0)
  )
  if config["beta"]:
    # Their KL sees log-probs that are not bounded: draw none that would be.
    batch, adjust = _within(batch, 20.0), None
  theirs = _call(algo_core.grpo_loss_fn, batch, **config)
  pieces = [
      compare.policy_loss(ours, batch, weight=weight, adjust=how, dtype=SINGLE)
      for weight, how in ((batch.filled, adjust), (None, None))
  ]
  yield from compare.loss_pairs(theirs, *pieces)


def _within(batch: Batch, limit: float) -> Batch:
  """The batch with log-ratios that no bound touches."""
  near = np.clip(batch.now, batch.old - limit + 1, batch.old + limit - 1)
  return dataclasses.replace(
      batch, now=np.asarray(near, SINGLE).astype(np.float64)
  )


def _ppo_pairs(ours: Any, batch: Batch) -> Iterator[Pair]:
  """The loss of PPO, whose advantages have a column for every token."""
  theirs = _call(
      algo_core.ppo_policy_loss_fn,
      batch,
      broadcast=True,
      beta=0.0,
      epsilon_low=compare.CLIP["clip_low"],
      epsilon_high=compare.CLIP["clip_high"],
      epsilon_c=3.0,
      entropy_coef=0.01,
      kl_coef=0.0,
  )
  plain = compare.policy_loss(ours, batch, dtype=SINGLE)
  yield from compare.loss_pairs(theirs, plain, plain)
