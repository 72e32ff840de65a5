"""One optimizer step from the micro-batches that `packing` made.

`score` gives log-probs, `accumulate` adds a micro-batch's gradient, `apply`
makes the update. Denominators are the whole batch's, so the update does not
depend on how trajectories were split, packed, ordered or sharded.

    batches = packing.pack(credits, shape=shape)
    totals = packing.count(credits)
    gradient = zeros(state.params)
    for batch in batches:
      gradient, tally = accumulate(gradient, state.params, batch, totals)
    state, metrics = apply(state, gradient, learning_rate)

Nothing here is jitted: whoever runs it binds `logprob_fn`, `objective` and
`optimizer` and jits, donating what is replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mgrpo_jax import fields, losses, numerics, sharding
from mgrpo_jax.types import TrainBatch, TrainState

# (params, tokens, positions, segment_ids, *, wanted) -> log-probs, all [N, T];
# those of tokens that are not wanted may be anything finite.
LogprobFn = Callable[..., Array]


@flax.struct.dataclass
class Gradient:
  """What micro-batches add up to."""

  grads: Any  # pytree of the parameters, float32
  loss: jax.Array  # [] float32


@flax.struct.dataclass
class Tally:
  """A micro-batch's metrics, still to be joined with the other ones'."""

  count: jax.Array  # [] float32, tokens that the sums run over
  sums: dict[str, jax.Array]  # [] float32, become means over tokens
  maxima: dict[str, jax.Array]  # [] float32


class Objective(Protocol):
  """What is minimised; `PolicyLoss` or `ImitationLoss`."""

  def __call__(
      self,
      logprobs: Float[Array, "M L"],
      batch: TrainBatch,
      totals: losses.Totals,
  ) -> tuple[Float[Array, ""], Tally]:
    """Computes a micro-batch's part of the loss, and its metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
  """M-GRPO's objective, negated (arXiv 2511.13288, Eq. 14–19).

      J = agg( c · min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) - β KL )

  Attributes:
    ratio: ρ; `losses.token_ratio`, `sequence_ratio` or `geometric_ratio`.
    aggregation: agg; one of the four of `losses`, or a partial of one.
    clip_low: ε_low, in 0..1.
    clip_high: ε_high, ≥ 0.
    kl: `losses.kl_k1`, `kl_k2` or `kl_k3` to the reference, or None.
    kl_coefficient: β, > 0; 0 where kl is None.
    importance: c, the trainer-over-sampler weight; `importance.by_token`,
      `by_sequence`, `reject_sequences`, or None for 1.
    importance_cap: its largest value, ≥ 1.

  Raises:
    ValueError: if a field is out of range, naming the field.
  """

  ratio: losses.Ratio
  aggregation: Callable[..., Array]
  clip_low: float
  clip_high: float
  kl: losses.KL | None
  kl_coefficient: float
  importance: Callable[..., Array] | None
  importance_cap: float

  def __post_init__(self) -> None:
    """Checks every number."""
    fields.check(
        "clip_low", self.clip_low, 0 <= self.clip_low <= 1, "in [0, 1]"
    )
    fields.check("clip_high", self.clip_high, self.clip_high >= 0, ">= 0")
    if self.kl is None:  # a term without a weight would cost and do nothing
      valid, allowed = self.kl_coefficient == 0, "0 where kl is none"
    else:
      valid, allowed = self.kl_coefficient > 0, "> 0 where kl is not none"
    fields.check("kl_coefficient", self.kl_coefficient, valid, allowed)
    fields.check(
        "importance_cap", self.importance_cap, self.importance_cap >= 1, ">= 1"
    )

  def __call__(
      self,
      logprobs: Float[Array, "M L"],
      batch: TrainBatch,
      totals: losses.Totals,
  ) -> tuple[Float[Array, ""], Tally]:
    """Computes a micro-batch's part of -J, and its metrics.

    Args:
      logprobs: float32, nats, of the policy being trained.
      batch: old, sampler's and, with a KL term, reference log-probs.
      totals: of the whole optimizer batch.

    Returns:
      The loss and the tally.
    """
    mask = _counted(batch)
    now = numerics.masked(logprobs, mask)
    old = numerics.masked(batch.old_logprobs, mask)
    sampler = numerics.masked(batch.sampler_logprobs, mask)
    advantages = batch.advantage[:, None] + jnp.zeros_like(mask)
    ratio = self.ratio(now, old, mask)
    objective = losses.clipped_surrogate(
        ratio, advantages, clip_low=self.clip_low, clip_high=self.clip_high
    )
    sums = {
        "ratio_mean": ratio,
        "clip_fraction": (objective < ratio * advantages).astype(jnp.float32),
        "old_kl": losses.kl_k3(old, now),
        "entropy": -now,
        "logprob_gap_mean": jnp.abs(old - sampler),
    }
    maxima = {"ratio_max": ratio, "logprob_gap_max": jnp.abs(old - sampler)}
    if self.importance is not None:
      weights = self.importance(old, sampler, mask, cap=self.importance_cap)
      whole = self.importance(old, sampler, mask, cap=jnp.inf)
      objective = objective * weights
      sums["truncated_weights"] = (weights != whole).astype(jnp.float32)
    if self.kl is not None:
      kl = self.kl(now, numerics.masked(batch.ref_logprobs, mask))
      objective = objective - self.kl_coefficient * kl
      sums["kl"] = kl
    loss = -self.aggregation(objective, mask, batch.weight, totals=totals)
    return loss, _tally(batch, sums, maxima)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImitationLoss:
  """Negative log-likelihood of demonstrations, per token of the batch.

      -Σ w (Σ_sampled log π + c Σ_other log π) / Σ w (n_sampled + c n_other)

  Attributes:
    context_weight: c, what an unsampled token (question, tool result) counts
      beside a sampled one, ≥ 0. Above 0 the policy also learns to read.

  Raises:
    ValueError: if a field is out of range, naming the field.
  """

  context_weight: float

  def __post_init__(self) -> None:
    """Checks the field."""
    valid = self.context_weight >= 0
    fields.check("context_weight", self.context_weight, valid, ">= 0")

  def __call__(
      self,
      logprobs: Float[Array, "M L"],
      batch: TrainBatch,
      totals: losses.Totals,
  ) -> tuple[Float[Array, ""], Tally]:
    """Computes a micro-batch's part of the loss, and its metrics.

    Args:
      logprobs: float32, nats, of the policy being trained.
      batch: only its masks and weights matter.
      totals: of the whole optimizer batch.

    Returns:
      The loss and the tally.
    """
    counts = batch.loss_mask + self.context_weight * batch.context_mask
    sums = numerics.masked_sum(-logprobs, counts, axis=1)
    whole = totals.tokens + self.context_weight * totals.context_tokens
    loss = numerics.divide(numerics.masked_sum(sums, batch.weight), whole)
    return loss, _tally(batch, {"nll": -logprobs}, {})


def score(
    params: Any, batch: TrainBatch, *, logprob_fn: LogprobFn
) -> Float[Array, "M L"]:
  """Computes a batch's log-probs, to become its old or reference ones.

  Args:
    params: of the policy before the batch's updates, or of the reference.
    batch: packed rows.
    logprob_fn: such as `policy.logprobs.token_logprobs` with its keywords.

  Returns:
    float32, nats; 0 outside trajectories and at their first token, and what
    `logprob_fn` gives for tokens that it is told are not wanted.
  """
  packed = logprob_fn(
      params,
      batch.tokens,
      batch.positions,
      batch.segment_ids,
      wanted=batch.sampled,
  )
  return _unpack(packed, batch)


def zeros(params: Any) -> Gradient:
  """Makes the gradient of no micro-batch.

  Args:
    params: pytree of float32.

  Returns:
    Zeros of the same shapes and shardings.
  """
  return Gradient(
      grads=jax.tree.map(jnp.zeros_like, params),
      loss=jnp.zeros((), jnp.float32),
  )


def accumulate(
    gradient: Gradient,
    params: Any,
    batch: TrainBatch,
    totals: losses.Totals,
    *,
    objective: Objective,
    logprob_fn: LogprobFn,
) -> tuple[Gradient, Tally]:
  """Adds a micro-batch's gradient.

  Args:
    gradient: of the micro-batches before; donate it.
    params: the same for all micro-batches of an update.
    batch: a micro-batch.
    totals: of the whole optimizer batch, from `count`.
    objective: what is minimised.
    logprob_fn: such as `policy.logprobs.token_logprobs` with its keywords.

  Returns:
    The sum, and the micro-batch's metrics.
  """

  def loss_fn(params: Any) -> tuple[Array, Tally]:
    logprobs = score(params, batch, logprob_fn=logprob_fn)
    return objective(logprobs, batch, totals)

  (loss, tally), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  total = Gradient(
      grads=jax.tree.map(jnp.add, gradient.grads, grads),
      loss=gradient.loss + loss,
  )
  return total, tally


def apply(
    state: TrainState,
    gradient: Gradient,
    learning_rate: Float[Array, ""],
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
  """Makes the update, unless loss or gradient is not finite.

      θ ← θ - learning_rate · optimizer(gradient)

  Args:
    state: parameters and optimizer state; donate it where nobody else reads
      the parameters.
    gradient: of all micro-batches.
    learning_rate: float32 scalar, from `optim.learning_rate`.
    optimizer: of unit learning rate, such as `optim.adamw`.

  Returns:
    The new state, or the old one unchanged with metric `nonfinite` 1; and
    `loss`, `gradient_norm`, `update_norm`, `param_norm`, `learning_rate`.
  """
  norm = numerics.tree_norm(gradient.grads)
  finite = jnp.isfinite(gradient.loss) & jnp.isfinite(norm)
  directions, opt_state = optimizer.update(
      gradient.grads, state.opt_state, state.params
  )
  updates = jax.tree.map(lambda u: -learning_rate * u, directions)
  new = dataclasses.replace(
      state,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      step=state.step + 1,
  )
  metrics = {
      "loss": gradient.loss,
      "gradient_norm": norm,
      "update_norm": jnp.where(finite, numerics.tree_norm(updates), 0.0),
      "param_norm": numerics.tree_norm(state.params),
      "learning_rate": learning_rate,
      "nonfinite": 1.0 - finite.astype(jnp.float32),
  }
  return numerics.tree_where(finite, new, state), metrics


def summarise(
    tallies: Sequence[Tally], applied: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
  """Joins the metrics of a step's micro-batches and updates, on the host.

  Args:
    tallies: of every micro-batch; at least one.
    applied: metrics of every `apply`; at least one.

  Returns:
    Means over tokens, maxima; of the updates the mean, but the sum of
    `nonfinite` and the last `learning_rate`.
  """
  fetched: list[Tally] = jax.device_get(list(tallies))
  updates: list[Mapping[str, Any]] = jax.device_get(list(applied))
  tokens = sum(float(tally.count) for tally in fetched)
  metrics = {
      name: sum(float(tally.sums[name]) for tally in fetched) / max(tokens, 1.0)
      for name in fetched[0].sums
  }
  for name in fetched[0].maxima:
    metrics[name] = max(float(tally.maxima[name]) for tally in fetched)
  for name in updates[0]:
    metrics[name] = float(np.mean([update[name] for update in updates]))
  metrics["nonfinite"] = float(sum(update["nonfinite"] for update in updates))
  metrics["learning_rate"] = float(updates[-1]["learning_rate"])
  return metrics


def _unpack(
    packed: Float[Array, "N T"], batch: TrainBatch
) -> Float[Array, "M L"]:
  """Gathers per-token values from packed rows, 0 where none is predicted."""
  packed = sharding.constrain(packed, "length", "length")
  predicted = batch.loss_mask + batch.context_mask > 0
  length = batch.loss_mask.shape[1]
  steps = jnp.arange(length, dtype=jnp.int32)[None]
  columns = jnp.where(predicted, batch.offset[:, None] + steps, 0)
  values = packed.at[batch.row[:, None], columns].get(
      out_sharding=sharding.out("batch", "length")
  )
  return jnp.where(predicted, values, 0.0)


def _counted(batch: TrainBatch) -> Float[Array, "M L"]:
  """Marks the sampled tokens that count."""
  return jnp.where(batch.weight[:, None] > 0, batch.loss_mask, 0.0)


def _tally(
    batch: TrainBatch, sums: dict[str, Array], maxima: dict[str, Array]
) -> Tally:
  """Reduces metrics [M, L] over the sampled tokens that count."""
  counted = _counted(batch)
  return Tally(
      count=jnp.sum(counted),
      sums={
          name: numerics.masked_sum(values, counted)
          for name, values in sums.items()
      },
      maxima={
          name: jnp.max(numerics.masked(values, counted))
          for name, values in maxima.items()
      },
  )
