"""One optimizer step from the micro-batches that `packing` made.

`score` gives predictions, `accumulate` adds a micro-batch's gradient, `apply`
makes the update. Denominators are the whole batch's, so the update does not
depend on how trajectories were split, packed, ordered or sharded.

    batches = packing.pack(credits, shape=shape)
    totals = packing.count(credits)
    gradient = zeros(state.params)
    for batch in batches:
      gradient, tally = accumulate(gradient, state.params, batch, totals)
    state, metrics = apply(state, gradient, learning_rate)

Nothing here is jitted: whoever runs it binds `predict_fn`, `objective` and
`optimizer` and jits, donating what is replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mgrpo_jax import losses, numerics, sharding
from mgrpo_jax.objectives import Objective, Tally
from mgrpo_jax.types import Prediction, TrainBatch, TrainState

# (params, tokens, positions, segment_ids, *, wanted, prefix_ids) -> prediction,
# all [N, T]; that of tokens that are not wanted may be anything finite.
PredictFn = Callable[..., Prediction]


@flax.struct.dataclass
class Gradient:
  """What micro-batches add up to."""

  grads: Any  # pytree of the parameters, float32
  loss: jax.Array  # [] float32


def score(
    params: Any, batch: TrainBatch, *, predict_fn: PredictFn
) -> Prediction:
  """Computes what a policy says of a batch's tokens.

  Args:
    params: of the policy before the batch's updates, or of the reference.
    batch: packed rows.
    predict_fn: such as `policy.logprobs.predict` with its keywords.

  Returns:
    [M, L] float32; 0 outside trajectories, at their first token and at those
    that their row shares, and what `predict_fn` gives for tokens that it is
    told are not wanted.
  """
  packed = predict_fn(
      params,
      batch.tokens,
      batch.positions,
      batch.segment_ids,
      wanted=batch.sampled,
      prefix_ids=batch.prefix_ids,
  )
  return jax.tree.map(lambda values: _unpack(values, batch), packed)


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
    predict_fn: PredictFn,
) -> tuple[Gradient, Tally]:
  """Adds a micro-batch's gradient.

  Args:
    gradient: of the micro-batches before; donate it.
    params: the same for all micro-batches of an update.
    batch: a micro-batch.
    totals: of the whole optimizer batch, from `count`.
    objective: what is minimised.
    predict_fn: such as `policy.logprobs.predict` with its keywords.

  Returns:
    The sum, and the micro-batch's metrics.
  """

  def loss_fn(params: Any) -> tuple[Array, Tally]:
    predicted = score(params, batch, predict_fn=predict_fn)
    return objective(predicted, batch, totals)

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
