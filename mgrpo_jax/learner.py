"""One policy in training: its state, and where it lives."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgrpo_jax import (
    losses,
    objectives,
    optim,
    packing,
    prefixes,
    sharding,
    trainer,
    update,
)
from mgrpo_jax.hosts import spread
from mgrpo_jax.minibatches import shape_for
from mgrpo_jax.packing import BatchShape, Credit
from mgrpo_jax.policy import lora as adapters
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.policy.params import param_specs
from mgrpo_jax.types import Reference, TrainBatch, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """An optimizer batch that was dispatched; its metrics are still to come.

  Attributes:
    tallies: of every micro-batch, on the device.
    applied: metrics of every update, on the device.
    batches: what was trained on, kept until the metrics are known to be good.
    tokens: sampled tokens that were trained on.
  """

  tallies: tuple[objectives.Tally, ...]
  applied: tuple[Mapping[str, jax.Array], ...]
  batches: tuple[TrainBatch, ...]
  tokens: int

  def metrics(self) -> dict[str, float]:
    """Waits for the device and joins the metrics; empty if nothing ran."""
    if not self.applied:
      return {}
    found = update.summarise(self.tallies, self.applied)
    if any(batch.prefix_ids is not None for batch in self.batches):
      found["shared_tokens"] = prefixes.shared_fraction(self.batches)
    return found


class Learner:
  """Owns the train state of one policy: its weights', or its adapter's.

  With an adapter the weights to begin with, its base, stay as they are.
  """

  def __init__(
      self,
      config: TransformerConfig,
      params: Any,
      *,
      lora: LoRA | None,
      shape: BatchShape,
      optimizer: optim.AdamW,
      temperature: float,
      reference: Reference,
      seed: int,
      mesh: jax.sharding.Mesh | None,
  ) -> None:
    """Puts the parameters on the device with a fresh optimizer.

    Args:
      config: sizes of the transformer.
      params: weights to begin with. On a mesh the learner takes them: where it
        does not read them again, the arrays that rest there are deleted.
      lora: the adapter that is trained; None to train the weights.
      shape: of every micro-batch.
      optimizer: how gradients become updates.
      temperature: of the distribution that was sampled from, > 0.
      reference: what the loss compares with.
      seed: of the state's random key and of the adapter, in [0, 2**32).
      mesh: of `sharding.make_mesh`, None for the default device.

    Raises:
      ValueError: if the mesh does not divide the parameters, naming one, or
        rows are to share what the transformer cannot.
    """
    if shape.least_shared and config.shares_nothing:
      raise ValueError(
          f"shape.least_shared must be 0, got {shape.least_shared}:"
          f" {config.shares_nothing}"
      )
    self.config = config
    self.lora = lora
    self._mesh = mesh
    self._shape = shape
    self._optimizer = optimizer
    self._temperature = temperature
    given = params
    if mesh is not None:
      at_rest = sharding.params_shardings(param_specs(config), mesh)
      params = spread.put(params, at_rest)
    with self._on_mesh():
      trained: Any = params
      self._base: Any = None
      if lora is not None:
        self._base = jax.tree.map(jnp.asarray, params)
        key = jax.random.fold_in(jax.random.key(seed), 1)
        trained = adapters.init(key, config, lora)
        if mesh is not None:
          resting = sharding.params_shardings(self.specs, mesh)
          trained = spread.put(trained, resting)
      self.state: TrainState = trainer.begin(
          trained,
          np.uint32(seed),
          optimizer=optimizer,
          keep=reference == "moving",
      )
    self._first: Any = None
    if reference == "first" and lora is not None:
      self._first = self._base  # an adapter begins as no change
    elif reference == "first":  # on a mesh it stays in its shards
      self._first = jax.device_get(params) if mesh is None else params
    elif mesh is not None and lora is None:
      _delete(given, mesh)

  @property
  def specs(self) -> Any:
    """`ParamSpec`s of what is trained, published and checkpointed."""
    if self.lora is None:
      return param_specs(self.config)
    return adapters.adapter_specs(self.config, self.lora)

  @property
  def weights(self) -> Any:
    """The transformer's weights as they are now."""
    return self.merged(self.trained)

  @property
  def trained(self) -> Any:
    """What is trained, as it is now."""
    return self.state.params

  def offered(self, folder: str, *, short: bool) -> Any:
    """Gives what is trained to be published.

    Args:
      folder: of the version in the store.
      short: whether float32 is rounded to bfloat16.

    Returns:
      Arrays, or an `Offer` of what other processes have.
    """
    del folder, short  # whoever publishes arrays knows that, too
    return self.trained

  @property
  def whole(self) -> TrainState:
    """The train state, which a checkpoint keeps."""
    return self.state

  def take(self, state: TrainState) -> None:
    """Continues from a state.

    Args:
      state: like `whole`.
    """
    if spread.is_spread(self._mesh):
      places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
      state = spread.put(state, places)
    self.state = state

  def merged(self, trained: Any) -> Any:
    """Gives the transformer's weights, whatever it is that is trained.

    Args:
      trained: parameters like `state.params`.

    Returns:
      The same where weights are trained, else base plus adapter.
    """
    if self.lora is None:
      return trained
    with self._on_mesh():
      return trainer.merge(self._base, trained, lora=self.lora)

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """Sets the mesh, if there is one, for what is traced or run inside."""
    if self._mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)

  def _placed(self, batch: TrainBatch) -> TrainBatch:
    """Splits a batch over the mesh, if there is one."""
    if self._mesh is None:
      return batch
    return spread.put(batch, sharding.batch_shardings(batch, self._mesh))

  def pack(
      self, credits: Sequence[Credit], objective: objectives.Objective
  ) -> tuple[TrainBatch, ...]:
    """Packs trajectories; fills in old and reference log-probs if needed.

    Args:
      credits: what to train on.
      objective: what will be minimised; imitation compares with nothing.

    Returns:
      Micro-batches, still on the host but for the log-probs.
    """
    shape = shape_for(self._shape, objective)
    batches = packing.pack(credits, shape=shape)
    if isinstance(objective, objectives.ImitationLoss):
      return batches
    return tuple(self.scored(batch) for batch in batches)

  def move_reference(self) -> None:
    """Compares with the weights as they are now, from now on."""
    with self._on_mesh():
      self.state = trainer.keep(self.state)

  def scored(self, batch: TrainBatch) -> TrainBatch:
    """Fills in what the trainer says of a batch before its updates.

    Args:
      batch: packed.

    Returns:
      The batch; its log-probs are on the device.
    """
    with self._on_mesh():
      found = self._scored(batch)
    return spread.everywhere(found)

  def _scored(self, batch: TrainBatch) -> TrainBatch:
    """Fills in log-probs; the mesh is set."""
    static: dict[str, Any] = {
        "config": self.config,
        "temperature": self._temperature,
        "most_wanted": self._shape.most_wanted,
    }
    placed = self._placed(batch)
    state, adapted = self.state, (self._base, placed)
    old = trainer.score(state.params, *adapted, lora=self.lora, **static)
    batch = dataclasses.replace(batch, old_logprobs=old.logprobs)
    if old.values is not None:
      batch = dataclasses.replace(batch, old_values=old.values)
    if state.reference is not None:
      kept = trainer.score(state.reference, *adapted, lora=self.lora, **static)
    elif self._first is not None:
      kept = trainer.score(self._first, None, placed, lora=None, **static)
    else:
      return batch
    return dataclasses.replace(batch, ref_logprobs=kept.logprobs)

  def step(
      self,
      minibatches: Sequence[tuple[tuple[TrainBatch, ...], losses.Totals]],
      *,
      objective: objectives.Objective,
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
    imitates = isinstance(objective, objectives.ImitationLoss)
    tallies: list[objectives.Tally] = []
    applied: list[Mapping[str, jax.Array]] = []
    with self._on_mesh():
      for (batches, totals), rate in zip(
          minibatches, learning_rates, strict=True
      ):
        if not batches:
          continue
        gradient = trainer.zeros(self.state.params)
        for batch in batches:
          gradient, tally = trainer.accumulate(
              gradient,
              self.state.params,
              self._base,
              self._placed(batch),
              totals,
              objective=objective,
              lora=self.lora,
              config=self.config,
              temperature=self._temperature,
              most_wanted=0 if imitates else self._shape.most_wanted,
          )
          tallies.append(tally)
        self.state, metrics = trainer.apply(
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


def _delete(params: Any, mesh: jax.sharding.Mesh) -> None:
  """Frees the arrays that were loaded straight into shards of a mesh."""
  devices = set(mesh.devices.flat)
  for leaf in jax.tree.leaves(params):
    if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
      leaf.delete()
