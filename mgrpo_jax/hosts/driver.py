"""Process 0's learner, which has the others of its job do what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mgrpo_jax import losses, objectives
from mgrpo_jax.hosts import crew, spread
from mgrpo_jax.hosts.channel import Channel
from mgrpo_jax.hosts.sharing import Shared
from mgrpo_jax.learner import Learner, Step
from mgrpo_jax.packing import Credit
from mgrpo_jax.types import TrainBatch, TrainState


class Driver(Learner):
  """A learner over the devices of several processes.

  What it gives (`trained`, `whole`, `merged`) lies on this host's CPU, all of
  it; what it is given may lie there.
  """

  def __init__(self, *args: Any, channel: Channel, **kwargs: Any) -> None:
    """Puts this host's part on its devices, as the others do meanwhile.

    Args:
      *args: of `Learner`.
      channel: to the other processes.
      **kwargs: of `Learner`.
    """
    with channel.order(crew.MEET):
      channel.meet(kwargs["mesh"])
      super().__init__(*args, **kwargs)
    self._channel = channel
    self._gathered: Any = None  # `trained`, until it changes
    self._offers = 0

  @property
  def trained(self) -> Any:
    """What is trained, as it is now."""
    if self._gathered is None:
      with self._channel.order(crew.GATHER, {"what": "params"}):
        self._gathered = spread.gather(self.state.params)
    return self._gathered

  @property
  def whole(self) -> TrainState:
    """The train state."""
    with self._channel.order(crew.GATHER, {"what": "state"}):
      return spread.gather(self.state)

  def offered(self, folder: str, *, short: bool) -> Shared:
    """Gives what is trained to be published, each process its own part."""
    topic, self._offers = f"publish/{self._offers}", self._offers + 1
    with self._channel.order(
        crew.PUBLISH, {"topic": topic, "folder": folder, "short": short}
    ):
      return Shared(
          self.state.params, channel=self._channel, topic=topic, short=short
      )

  def take(self, state: TrainState) -> None:
    """Continues from a state."""
    with self._channel.order(crew.TAKE, arrays=jax.tree.leaves(state)):
      self._gathered = None
      super().take(state)

  def merged(self, trained: Any) -> Any:
    """Gives the transformer's weights; see `Learner.merged`."""
    if self.lora is None:
      return trained
    arrays = jax.tree.leaves(trained)
    with self._channel.order(crew.MERGE, arrays=arrays):
      return crew.merge(self, arrays)

  def move_reference(self) -> None:
    """Compares with the weights as they are now, from now on."""
    with self._channel.order(crew.MOVE):
      super().move_reference()

  def pack(
      self, credits: Sequence[Credit], objective: objectives.Objective
  ) -> tuple[TrainBatch, ...]:
    """Packs trajectories; see `Learner.pack`."""
    batches = super().pack(credits, objective)
    if isinstance(objective, objectives.ImitationLoss):
      for batch in batches:
        self._channel.tell(*_batch_order(batch, score=False))
    return batches

  def step(
      self,
      minibatches: Sequence[tuple[tuple[TrainBatch, ...], losses.Totals]],
      *,
      objective: objectives.Objective,
      learning_rates: Sequence[float],
  ) -> Step:
    """Makes one update for each minibatch; see `Learner.step`."""
    imitates = isinstance(objective, objectives.ImitationLoss)
    totals = jax.tree.leaves([totals for _, totals in minibatches])
    with self._channel.order(
        crew.STEP,
        {
            "objective": "imitate" if imitates else "reinforce",
            "rates": list(learning_rates),
            "batches": [len(batches) for batches, _ in minibatches],
        },
        totals,
    ):
      self._gathered = None
      return super().step(
          minibatches, objective=objective, learning_rates=learning_rates
      )

  def scored(self, batch: TrainBatch) -> TrainBatch:
    """Fills in what the trainer says of a batch before its updates."""
    with self._channel.order(*_batch_order(batch, score=True)):
      return super().scored(batch)


def _batch_order(
    batch: TrainBatch, *, score: bool
) -> tuple[str, dict[str, bool], list[np.ndarray]]:
  """The order that hands a batch to the others."""
  arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(batch)]
  return crew.BATCH, {"score": score}, arrays
