"""One policy in training: its state, and the compiled programs that move it.

This is where the pure functions of `update` are jitted and their buffers
donated. Policies of one configuration share the compiled programs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgrpo_jax import losses, optim, packing, sharding, update
from mgrpo_jax.packing import BatchShape, Credit
from mgrpo_jax.policy import logprobs
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import param_specs
from mgrpo_jax.types import TrainBatch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """An optimizer batch that was dispatched; its metrics are still to come.

  Attributes:
    tallies: of every micro-batch, on the device.
    applied: metrics of every update, on the device.
    batches: what was trained on, kept until the metrics are known to be good.
    tokens: sampled tokens that were trained on.
  """

  tallies: tuple[update.Tally, ...]
  applied: tuple[Mapping[str, jax.Array], ...]
  batches: tuple[TrainBatch, ...]
  tokens: int

  def metrics(self) -> dict[str, float]:
    """Waits for the device and joins the metrics; empty if nothing ran."""
    if not self.applied:
      return {}
    return update.summarise(self.tallies, self.applied)


class Learner:
  """Owns the train state of one policy."""

  def __init__(
      self,
      config: TransformerConfig,
      params: Any,
      *,
      shape: BatchShape,
      optimizer: optim.AdamW,
      temperature: float,
      needs_reference: bool,
      seed: int,
      mesh: jax.sharding.Mesh | None,
  ) -> None:
    """Puts the parameters on the device with a fresh optimizer.

    Args:
      config: sizes of the transformer.
      params: weights to begin with.
      shape: of every micro-batch.
      optimizer: how gradients become updates.
      temperature: of the distribution that was sampled from, > 0.
      needs_reference: whether the loss compares with the first weights.
      seed: of the state's random key, in [0, 2**32).
      mesh: of `sharding.make_mesh`, None for the default device.

    Raises:
      ValueError: if the mesh does not divide the parameters, naming one.
    """
    self.config = config
    self._mesh = mesh
    self._shape = shape
    self._optimizer = optimizer
    self._temperature = temperature
    if mesh is not None:
      at_rest = sharding.params_shardings(param_specs(config), mesh)
      params = jax.device_put(params, at_rest)
    with self._on_mesh():
      self.state: TrainState = _begin(
          params, np.uint32(seed), optimizer=optimizer
      )
    self._reference: Any = None
    if needs_reference:  # on a mesh it stays in its shards
      self._reference = jax.device_get(params) if mesh is None else params

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """Sets the mesh, if there is one, for what is traced or run inside."""
    if self._mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)

  def _placed(self, batch: TrainBatch) -> TrainBatch:
    """Splits a batch over the mesh, if there is one."""
    if self._mesh is None:
      return batch
    return jax.device_put(batch, sharding.batch_shardings(batch, self._mesh))

  def pack(
      self, credits: Sequence[Credit], objective: update.Objective
  ) -> tuple[TrainBatch, ...]:
    """Packs trajectories; fills in old and reference log-probs if needed.

    Args:
      credits: what to train on.
      objective: what will be minimised; imitation compares with nothing.

    Returns:
      Micro-batches, still on the host but for the log-probs.
    """
    batches = packing.pack(credits, shape=self._shape)
    if isinstance(objective, update.ImitationLoss):
      return batches
    with self._on_mesh():
      return tuple(self._scored(batch) for batch in batches)

  def _scored(self, batch: TrainBatch) -> TrainBatch:
    """Replaces the sampler's log-probs by the trainer's own."""
    static = {
        "config": self.config,
        "temperature": self._temperature,
        "most_wanted": self._shape.most_wanted,
    }
    placed = self._placed(batch)
    old = _score(self.state.params, placed, **static)
    batch = dataclasses.replace(batch, old_logprobs=old)
    if self._reference is None:
      return batch
    reference = _score(self._reference, placed, **static)
    return dataclasses.replace(batch, ref_logprobs=reference)

  def step(
      self,
      minibatches: Sequence[tuple[tuple[TrainBatch, ...], losses.Totals]],
      *,
      objective: update.Objective,
      learning_rates: Sequence[float],
  ) -> Step:
    """Makes one update for each minibatch, without waiting for the device.

    Args:
      minibatches: micro-batches and the denominators of all of them.
      objective: what is minimised; hashable.
      learning_rates: one for each minibatch, > 0.

    Returns:
      What was dispatched.
    """
    imitates = isinstance(objective, update.ImitationLoss)
    tallies: list[update.Tally] = []
    applied: list[Mapping[str, jax.Array]] = []
    with self._on_mesh():
      for (batches, totals), rate in zip(
          minibatches, learning_rates, strict=True
      ):
        if not batches:
          continue
        gradient = _zeros(self.state.params)
        for batch in batches:
          gradient, tally = _accumulate(
              gradient,
              self.state.params,
              self._placed(batch),
              totals,
              objective=objective,
              config=self.config,
              temperature=self._temperature,
              most_wanted=0 if imitates else self._shape.most_wanted,
          )
          tallies.append(tally)
        self.state, metrics = _apply(
            self.state,
            gradient,
            np.float32(rate),
            optimizer=self._optimizer,
        )
        applied.append(metrics)
    batches = tuple(batch for part, _ in minibatches for batch in part)
    return Step(
        tallies=tuple(tallies),
        applied=tuple(applied),
        batches=batches,
        tokens=int(sum(np.sum(batch.loss_mask) for batch in batches)),
    )


@functools.partial(jax.jit, static_argnames="optimizer")
def _begin(
    params: Any, seed: np.uint32, *, optimizer: optim.AdamW
) -> TrainState:
  """A fresh train state; its arrays share nothing with the arguments."""
  params = jax.tree.map(jnp.copy, params)
  return TrainState(
      params=params,
      opt_state=optim.adamw(optimizer).init(params),
      step=jnp.zeros((), jnp.int32),
      rng=jax.random.key_data(jax.random.key(seed)),
  )


@jax.jit
def _zeros(params: Any) -> update.Gradient:
  """The gradient of no micro-batch."""
  return update.zeros(params)


@functools.partial(
    jax.jit, static_argnames=("config", "temperature", "most_wanted")
)
def _score(
    params: Any,
    batch: TrainBatch,
    *,
    config: TransformerConfig,
    temperature: float,
    most_wanted: int,
) -> jax.Array:
  """See `update.score`."""
  logprob_fn = _logprob_fn(config, temperature, most_wanted)
  return update.score(params, batch, logprob_fn=logprob_fn)


@functools.partial(
    jax.jit,
    static_argnames=("objective", "config", "temperature", "most_wanted"),
    donate_argnames="gradient",
)
def _accumulate(
    gradient: update.Gradient,
    params: Any,
    batch: TrainBatch,
    totals: losses.Totals,
    *,
    objective: update.Objective,
    config: TransformerConfig,
    temperature: float,
    most_wanted: int,
) -> tuple[update.Gradient, update.Tally]:
  """See `update.accumulate`."""
  return update.accumulate(
      gradient,
      params,
      batch,
      totals,
      objective=objective,
      logprob_fn=_logprob_fn(config, temperature, most_wanted),
  )


# The parameters are not donated: the sampler and the publisher read them while
# the update runs.
@functools.partial(jax.jit, static_argnames="optimizer")
def _apply(
    state: TrainState,
    gradient: update.Gradient,
    learning_rate: jax.Array,
    *,
    optimizer: optim.AdamW,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """See `update.apply`."""
  return update.apply(
      state, gradient, learning_rate, optimizer=optim.adamw(optimizer)
  )


def _logprob_fn(
    config: TransformerConfig, temperature: float, most_wanted: int
) -> update.LogprobFn:
  """Log-probs under one configuration; of all tokens where 0 are wanted."""
  return functools.partial(
      logprobs.token_logprobs,
      config=config,
      temperature=temperature,
      most_wanted=most_wanted,
  )
