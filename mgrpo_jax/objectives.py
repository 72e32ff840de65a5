"""What is minimised: M-GRPO's objective, or the likelihood of demonstrations.

An objective sees one micro-batch and the denominators of the whole optimizer
batch; its parts stand in `losses`, `importance` and `critic`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgrpo_jax import critic, fields, losses, numerics
from mgrpo_jax.critic import Critic
from mgrpo_jax.types import Prediction, TrainBatch


@flax.struct.dataclass
class Tally:
  """A micro-batch's metrics, still to be joined with the other ones'."""

  count: jax.Array  # [] float32, tokens that the sums run over
  sums: dict[str, jax.Array]  # [] float32, become means over tokens
  maxima: dict[str, jax.Array]  # [] float32


class Objective(Protocol):
  """What is minimised; `PolicyLoss` or `ImitationLoss`."""

  @property
  def needs_entropy(self) -> bool:
    """Whether predictions must come with entropies."""

  @property
  def reads_context(self) -> bool:
    """Whether it reads what is predicted of tokens that nobody sampled."""

  def __call__(
      self,
      predicted: Prediction,
      batch: TrainBatch,
      totals: losses.Totals,
  ) -> tuple[Float[Array, ""], Tally]:
    """Computes a micro-batch's part of the loss, and its metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
  """M-GRPO's objective, negated (arXiv 2511.13288, Eq. 14–19).

      J = agg( c · min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) - β KL + η H )

  With a critic, A is what it makes of the trajectories' rewards, and its error
  is minimised beside.

  Attributes:
    ratio: ρ; `losses.token_ratio`, `sequence_ratio` or `geometric_ratio`.
    aggregation: agg; `losses.token_mean`, `sequence_mean_token_mean`,
      `sequence_mean_token_sum`, or a partial of `sequence_mean_token_sum_norm`.
    clip_low: ε_low, in 0..1.
    clip_high: ε_high, ≥ 0.
    kl: `losses.kl_k1`, `kl_k2` or `kl_k3` to the reference, or None.
    kl_coefficient: β, > 0; 0 where kl is None.
    importance: c, the trainer-over-sampler weight; `importance.by_token`,
      `by_sequence`, `reject_sequences`, or None for 1.
    importance_cap: its largest value, ≥ 1.
    surrogate: min(…); `losses.clipped_surrogate`, `cispo_surrogate`, or a
      partial of `dual_clipped_surrogate`.
    entropy_coefficient: η, ≥ 0; H is exact, over the whole vocabulary.
    critic: how a value head takes part, or None.

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
  surrogate: Callable[..., Array]
  entropy_coefficient: float
  critic: Critic | None

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
    bonus = self.entropy_coefficient
    fields.check("entropy_coefficient", bonus, 0 <= bonus < math.inf, ">= 0")

  @property
  def needs_entropy(self) -> bool:
    """Whether predictions must come with entropies."""
    return self.entropy_coefficient > 0

  @property
  def reads_context(self) -> bool:
    """Whether it reads what is predicted of unsampled tokens: never."""
    return False

  @property
  def only_advantage(self) -> bool:
    """Whether a trajectory of advantage 0 has no gradient."""
    return self.kl is None and self.critic is None and not self.needs_entropy

  def __call__(
      self,
      predicted: Prediction,
      batch: TrainBatch,
      totals: losses.Totals,
  ) -> tuple[Float[Array, ""], Tally]:
    """Computes a micro-batch's part of -J, and its metrics.

    Args:
      predicted: [M, L], by the policy being trained; with entropies where
        they have a coefficient, with values where there is a critic.
      batch: old, sampler's and, with a KL term, reference log-probs.
      totals: of the whole optimizer batch.

    Returns:
      The loss and the tally.
    """
    mask = _counted(batch)
    now = numerics.masked(predicted.logprobs, mask)
    old = numerics.masked(batch.old_logprobs, mask)
    sampler = numerics.masked(batch.sampler_logprobs, mask)
    advantages = self._advantages(batch, mask)
    ratio = self.ratio(now, old, mask)
    plain = ratio * advantages
    objective = self.surrogate(
        ratio, advantages, clip_low=self.clip_low, clip_high=self.clip_high
    )
    sums = {
        "ratio_mean": ratio,
        "clip_fraction": (objective != plain).astype(jnp.float32),
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
    if self.needs_entropy:
      entropy = numerics.masked(predicted.entropy, mask)
      objective = objective + self.entropy_coefficient * entropy
      sums["entropy"] = entropy
    loss = -self.aggregation(objective, mask, batch.weight, totals=totals)
    if self.critic is not None:
      old_values = numerics.masked(batch.old_values, mask)
      error = critic.clipped_value_loss(
          numerics.masked(predicted.values, mask),
          old_values,
          advantages + old_values,
          clip=self.critic.clip,
      )
      sums["value_loss"] = error
      error = losses.token_mean(error, mask, batch.weight, totals=totals)
      loss = loss + self.critic.coefficient * error
    return loss, _tally(batch, sums, maxima)

  def _advantages(
      self, batch: TrainBatch, mask: Float[Array, "M L"]
  ) -> Float[Array, "M L"]:
    """One for each trajectory, or with a critic one for each token."""
    if self.critic is None:
      return batch.advantage[:, None] + jnp.zeros_like(mask)
    return critic.generalised_advantages(
        batch.advantage,
        batch.old_values,
        mask,
        discount=self.critic.discount,
        trace=self.critic.trace,
    )


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

  @property
  def needs_entropy(self) -> bool:
    """Whether predictions must come with entropies: never."""
    return False

  @property
  def reads_context(self) -> bool:
    """Whether it reads what is predicted of tokens that nobody sampled."""
    return self.context_weight > 0

  def __call__(
      self,
      predicted: Prediction,
      batch: TrainBatch,
      totals: losses.Totals,
  ) -> tuple[Float[Array, ""], Tally]:
    """Computes a micro-batch's part of the loss, and its metrics.

    Args:
      predicted: [M, L], by the policy being trained.
      batch: only its masks and weights matter.
      totals: of the whole optimizer batch.

    Returns:
      The loss and the tally.
    """
    logprobs = predicted.logprobs
    counts = batch.loss_mask + self.context_weight * batch.context_mask
    sums = numerics.masked_sum(-logprobs, counts, axis=1)
    whole = totals.tokens + self.context_weight * totals.context_tokens
    loss = numerics.divide(numerics.masked_sum(sums, batch.weight), whole)
    return loss, _tally(batch, {"nll": -logprobs}, {})


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
