"""The optimizer: AdamW behind a gradient-norm limit, and its learning rate.

The learning rate is no part of the transformation: it is computed on the host
and passed to `update.apply`, so stages of different rates share one program.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import optax

from mgrpo_jax import fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """How the learning rate moves over the updates of a stage.

  Attributes:
    peak: highest learning rate, > 0.
    warmup_steps: updates of linear rise to the peak, ≥ 0.
    decay_steps: updates after the warm-up over which a cosine falls to
      `final_fraction` of the peak; 0 keeps the peak for ever.
    final_fraction: of the peak, in 0..1.

  Raises:
    ValueError: if a field is out of range, naming the field.
  """

  peak: float
  warmup_steps: int
  decay_steps: int
  final_fraction: float

  def __post_init__(self) -> None:
    """Checks every field."""
    fields.check("peak", self.peak, 0 < self.peak < math.inf, "> 0")
    fields.check(
        "warmup_steps", self.warmup_steps, self.warmup_steps >= 0, ">= 0"
    )
    fields.check("decay_steps", self.decay_steps, self.decay_steps >= 0, ">= 0")
    within = 0 <= self.final_fraction <= 1
    fields.check("final_fraction", self.final_fraction, within, "in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
  """How gradients become update directions.

  Attributes:
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to the root of the second moment, > 0.
    weight_decay: of matrices, per update and unit of learning rate, ≥ 0.
    clip_norm: global gradient norm above which gradients are scaled down to
      it, > 0.

  Raises:
    ValueError: if a field is out of range, naming the field.
  """

  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float

  def __post_init__(self) -> None:
    """Checks every field."""
    fields.check("b1", self.b1, 0 <= self.b1 < 1, "in [0, 1)")
    fields.check("b2", self.b2, 0 <= self.b2 < 1, "in [0, 1)")
    fields.check("eps", self.eps, 0 < self.eps < math.inf, "> 0")
    decays = 0 <= self.weight_decay < math.inf
    fields.check("weight_decay", self.weight_decay, decays, ">= 0")
    fields.check("clip_norm", self.clip_norm, self.clip_norm > 0, "> 0")


def learning_rate(schedule: Schedule, step: int) -> float:
  """Computes the learning rate of an update.

      step < W:  peak · (step + 1) / W
      after:     peak · (f + (1 - f) (1 + cos(π min(1, (step - W) / S))) / 2)

  Args:
    schedule: peak, warm-up W, decay S (0: none) and final fraction f.
    step: updates applied in the stage before this one, ≥ 0.

  Returns:
    The learning rate, > 0 unless it has decayed to nothing.
  """
  if step < schedule.warmup_steps:
    return schedule.peak * (step + 1) / schedule.warmup_steps
  if not schedule.decay_steps:
    return schedule.peak
  progress = min(1.0, (step - schedule.warmup_steps) / schedule.decay_steps)
  cosine = (1 + math.cos(math.pi * progress)) / 2
  final = schedule.final_fraction
  return schedule.peak * (final + (1 - final) * cosine)


def adamw(config: AdamW) -> optax.GradientTransformation:
  """Builds AdamW (Loshchilov & Hutter, arXiv 1711.05101) of unit rate.

      g ← g · min(1, clip_norm / |g|)
      u = m̂ / (√v̂ + eps) + weight_decay · θ,      to be applied as θ - rate · u

  Args:
    config: the numbers.

  Returns:
    The transformation from gradients to u; weight decay acts on parameters of
    two or more dimensions, so not on norm scales and biases.
  """
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
      optax.add_decayed_weights(config.weight_decay, mask=_matrices),
  )


def _matrices(params: Any) -> Any:
  """Marks parameters of two or more dimensions that are no biases."""

  def decays(path: tuple[Any, ...], param: Any) -> bool:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return param.ndim >= 2 and not name.endswith("bias")

  return jax.tree.map_with_path(decays, params)
