"""The trainer's compiled programs, shared by every learner of the process.

The pure functions of `update`, jitted with what does not change static: two
policies of the same sizes share their compilations. What is trained is a
transformer's weights or, with a `LoRA`, an adapter of weights called the base.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgrpo_jax import losses, objectives, optim, update
from mgrpo_jax.policy import logprobs
from mgrpo_jax.policy import lora as adapters
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.types import Prediction, TrainBatch, TrainState


@functools.partial(jax.jit, static_argnames=("optimizer", "keep"))
def begin(
    params: Any, seed: np.uint32, *, optimizer: optim.AdamW, keep: bool = False
) -> TrainState:
  """Makes a fresh train state; its arrays share nothing with the arguments.

  Args:
    params: what is trained, float32.
    seed: of the state's random key.
    optimizer: how gradients become updates.
    keep: whether the parameters are kept as a reference that moves.

  Returns:
    The state, at step 0.
  """
  params = jax.tree.map(jnp.copy, params)
  return TrainState(
      params=params,
      opt_state=optim.adamw(optimizer).init(params),
      step=jnp.zeros((), jnp.int32),
      rng=jax.random.key_data(jax.random.key(seed)),
      reference=jax.tree.map(jnp.copy, params) if keep else None,
  )


@jax.jit
def keep(state: TrainState) -> TrainState:
  """Moves a state's reference to its parameters.

  Args:
    state: with a reference.

  Returns:
    The state, which shares nothing with the argument.
  """
  copied: TrainState = jax.tree.map(jnp.copy, state)
  return dataclasses.replace(copied, reference=copied.params)


@jax.jit
def zeros(params: Any) -> update.Gradient:
  """Runs `update.zeros`.

  Args:
    params: what is trained.

  Returns:
    The gradient of no micro-batch.
  """
  return update.zeros(params)


@functools.partial(jax.jit, static_argnames="lora")
def merge(base: Any, adapter: Any, *, lora: LoRA) -> Any:
  """Runs `policy.lora.merge`.

  Args:
    base: weights, float32.
    adapter: factors.
    lora: of the adapter.

  Returns:
    Base plus adapter.
  """
  return adapters.merge(base, adapter, lora=lora)


@functools.partial(
    jax.jit, static_argnames=("lora", "config", "temperature", "most_wanted")
)
def score(
    params: Any,
    base: Any,
    batch: TrainBatch,
    *,
    lora: LoRA | None,
    config: TransformerConfig,
    temperature: float,
    most_wanted: int,
) -> Prediction:
  """Runs `update.score`.

  Args:
    params: what is trained.
    base: that an adapter adapts; None without one.
    batch: packed rows.
    lora: of the adapter, or None.
    config: sizes of the transformer.
    temperature: that was sampled with, > 0.
    most_wanted: tokens of a row that the head runs for; 0 for all.

  Returns:
    See `update.score`.
  """
  predict_fn = _predict_fn(base, lora, config, temperature, most_wanted)
  return update.score(params, batch, predict_fn=predict_fn)


@functools.partial(
    jax.jit,
    static_argnames=(
        "objective",
        "lora",
        "config",
        "temperature",
        "most_wanted",
    ),
    donate_argnames="gradient",
)
def accumulate(
    gradient: update.Gradient,
    params: Any,
    base: Any,
    batch: TrainBatch,
    totals: losses.Totals,
    *,
    objective: objectives.Objective,
    lora: LoRA | None,
    config: TransformerConfig,
    temperature: float,
    most_wanted: int,
) -> tuple[update.Gradient, objectives.Tally]:
  """Runs `update.accumulate`, in place.

  Args:
    gradient: of the micro-batches before; donated.
    params: what is trained.
    base: that an adapter adapts; None without one.
    batch: a micro-batch.
    totals: of the whole optimizer batch.
    objective: what is minimised.
    lora: of the adapter, or None.
    config: sizes of the transformer.
    temperature: that was sampled with, > 0.
    most_wanted: tokens of a row that the head runs for; 0 for all.

  Returns:
    The sum, and the micro-batch's metrics.
  """
  return update.accumulate(
      gradient,
      params,
      batch,
      totals,
      objective=objective,
      predict_fn=_predict_fn(
          base, lora, config, temperature, most_wanted, objective.needs_entropy
      ),
  )


# The parameters are not donated: the sampler and the publisher read them while
# the update runs.
@functools.partial(jax.jit, static_argnames="optimizer")
def apply(
    state: TrainState,
    gradient: update.Gradient,
    learning_rate: jax.Array,
    *,
    optimizer: optim.AdamW,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Runs `update.apply`.

  Args:
    state: before the update.
    gradient: of all micro-batches.
    learning_rate: float32 scalar.
    optimizer: how gradients become updates.

  Returns:
    See `update.apply`.
  """
  return update.apply(
      state, gradient, learning_rate, optimizer=optim.adamw(optimizer)
  )


def _predict_fn(
    base: Any,
    lora: LoRA | None,
    config: TransformerConfig,
    temperature: float,
    most_wanted: int,
    entropy: bool = False,
) -> update.PredictFn:
  """Predicts with what is trained; all tokens where 0 are wanted."""
  predict = functools.partial(
      logprobs.predict,
      config=config,
      temperature=temperature,
      most_wanted=most_wanted,
      entropy=entropy,
  )
  if lora is None:
    return predict

  def adapted(adapter: Any, *rows: Any, **asked: Any) -> Prediction:
    params = adapters.merge(base, adapter, lora=lora)
    return predict(params, *rows, **asked)

  return adapted
