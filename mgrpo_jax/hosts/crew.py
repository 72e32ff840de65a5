"""The other processes of a job: they do to their parts what process 0 does.

They keep nothing of their own: no run directory, no journal, no sampler. Who is
started again is given all of it by process 0. Into the bucket they write their
chunks of versions, when process 0 says so.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mgrpo_jax import losses, objectives
from mgrpo_jax.hosts import spread
from mgrpo_jax.hosts.channel import Channel, Order
from mgrpo_jax.hosts.ending import END, FAIL
from mgrpo_jax.hosts.sharing import Helper
from mgrpo_jax.learner import Learner
from mgrpo_jax.store import Store
from mgrpo_jax.types import TrainBatch

MEET = "meet"  # before anything else
BATCH = "batch"  # score: whether old log-probs are to be filled in
STEP = "step"  # objective, rates, batches of each minibatch; totals
GATHER = "gather"  # what: params or state
TAKE = "take"  # the state's arrays
MERGE = "merge"  # the adapter's arrays
PUBLISH = "publish"  # topic, folder, short
MOVE = "move"


class DrivenError(RuntimeError):
  """Process 0 ended in an error; says in which.

  Attributes:
    code: with which it ended, as shells count.
  """

  def __init__(self, reason: str, code: int) -> None:
    """Says so."""
    super().__init__(f"process 0 ended: {reason}")
    self.code = code


def assist(
    channel: Channel,
    *,
    mesh: jax.sharding.Mesh | None,
    make: Callable[[], Learner],
    objectives: Mapping[str, objectives.Objective],
    store: Store,
    check: Callable[[], None] = lambda: None,
) -> None:
  """Does this process's part of what process 0 does, from begin to end.

  Args:
    channel: from process 0.
    mesh: of the learner.
    make: makes it, as process 0 makes its own.
    objectives: `imitate` and `reinforce`.
    store: where weights are published.
    check: called again and again while process 0 orders nothing; raises what
      is to end this.

  Raises:
    DrivenError: process 0 ended in an error.
    SilentError: the others have not come.
  """
  if _heard(channel, check).kind == MEET:
    channel.meet(mesh)
    with contextlib.closing(Helper(store, channel)) as helper:
      Crew(make(), objectives, helper).run(channel, check)


class Crew:
  """Carries out process 0's orders on this process's devices."""

  def __init__(
      self,
      learner: Learner,
      objectives: Mapping[str, objectives.Objective],
      helper: Helper,
  ) -> None:
    """Starts with no batch.

    Args:
      learner: made as process 0 made its own.
      objectives: `imitate` and `reinforce`.
      helper: writes this process's part of what is published.
    """
    self._helper = helper
    self._learner = learner
    self._objectives = objectives
    self._batches: collections.deque[TrainBatch] = collections.deque()

  def run(
      self, channel: Channel, check: Callable[[], None] = lambda: None
  ) -> None:
    """Carries out orders until the run is over.

    Args:
      channel: from process 0.
      check: see `assist`.

    Raises:
      DrivenError: process 0 ended in an error.
    """

    def look() -> None:
      check()
      self._helper.check()

    while (order := _heard(channel, look)).kind != END:
      self.obey(order)

  def obey(self, order: Order) -> None:
    """Carries out one order.

    Args:
      order: none of MEET, END and FAIL.

    Raises:
      ValueError: there is no such order, or it speaks of other batches than
        were handed over.
    """
    learner = self._learner
    if order.kind == BATCH:
      self._batches.append(self._batch(order))
    elif order.kind == STEP:
      self._step(order)
    elif order.kind == GATHER:
      whole = learner.state
      spread.gather(whole if order.values["what"] == "state" else whole.params)
    elif order.kind == TAKE:
      learner.take(_like(learner.state, order.arrays))
    elif order.kind == MERGE:
      merge(learner, order.arrays)
    elif order.kind == PUBLISH:
      self._helper.begin(learner.state.params, **order.values)
    elif order.kind == MOVE:
      learner.move_reference()
    else:
      raise ValueError(f"order: {order.kind!r} is none that is known here")

  def _batch(self, order: Order) -> TrainBatch:
    """A batch that was handed over, scored if it shall be."""
    arrays: Any = order.arrays
    batch = TrainBatch(*arrays)
    return self._learner.scored(batch) if order.values["score"] else batch

  def _step(self, order: Order) -> None:
    """Makes the updates of a step."""
    counts = order.values["batches"]
    if sum(counts) != len(self._batches):
      raise ValueError(
          f"a step of {sum(counts)} batches, {len(self._batches)} are here"
      )
    totals = iter(order.arrays)
    self._learner.step(
        [
            (
                tuple(self._batches.popleft() for _ in range(count)),
                losses.Totals(next(totals), next(totals), next(totals)),
            )
            for count in counts
        ],
        objective=self._objectives[order.values["objective"]],
        learning_rates=order.values["rates"],
    )


def _heard(channel: Channel, check: Callable[[], None]) -> Order:
  """The next order; raises DrivenError where it is that process 0 failed."""
  order = channel.hear(check)
  if order.kind == FAIL:
    raise DrivenError(order.values["reason"], order.values["code"])
  return order


def merge(learner: Learner, adapter: Sequence[np.ndarray]) -> Any:
  """Merges an adapter that lies on the hosts; every process does.

  Args:
    learner: whose base it adapts.
    adapter: its arrays, in the tree's order.

  Returns:
    The transformer's weights, on this host's CPU.
  """
  like = learner.state.params
  places = jax.tree.map(lambda leaf: leaf.sharding, like)
  placed = spread.put(_like(like, adapter), places)
  return spread.gather(Learner.merged(learner, placed))


def _like(tree: Any, arrays: Sequence[np.ndarray]) -> Any:
  """Arrays as a tree like another one."""
  return jax.tree.unflatten(jax.tree.structure(tree), arrays)
