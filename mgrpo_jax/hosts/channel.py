"""Orders: what process 0 of a job has the others run with it.

An order is a kind, some JSON values and some arrays. Its words lie in the key-
value store of `jax.distributed`, where the others wait for them without keeping
a device busy; then the arrays are broadcast over the devices of all. Orders
come in the order in which they were given, and process 0 is at most a few ahead
of who is slowest.

Beside the orders, threads of one process may say something to those of another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from mgrpo_jax.hosts import meeting, signals

_ROOT = "mgrpo/orders"
_AHEAD = 8  # orders that were given and not yet taken
_LOOK = 1.0  # seconds of one look, between which signals are heard
_PIECE = 16 << 20  # bytes of a broadcast, at most
_LEAST = 4096  # bytes of a broadcast: few sizes, so few compilations


class SilentError(RuntimeError):
  """A process of this job takes no orders any more; says which."""


class KeyValues(Protocol):
  """What is needed of the client of `jax.distributed`."""

  def key_value_set(self, key: str, value: str) -> None:
    """Writes a key that is not there yet."""

  def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
    """Waits for a key; raises `JaxRuntimeError` where it does not come."""

  def key_value_delete(self, key: str) -> None:
    """Removes a key."""

  def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
    """Waits until all processes do; raises `JaxRuntimeError`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """What is to be done.

  Attributes:
    kind: of the order, which says what its parts mean.
    values: JSON.
    arrays: NumPy arrays, C-contiguous.
  """

  kind: str
  values: Mapping[str, Any]
  arrays: tuple[np.ndarray, ...]


class Channel:
  """Hands orders from process 0 of a job to its others.

  Attributes:
    process: number of this one.
    others: numbers of all but process 0.
    patience: seconds that process 0 waits for another to take an order.
  """

  def __init__(
      self,
      client: KeyValues,
      *,
      process: int,
      processes: int,
      patience: float,
      broadcast: Callable[[np.ndarray], np.ndarray],
  ) -> None:
    """Starts at the first order.

    Args:
      client: of `jax.distributed`, new with every start of the job.
      process: number of this one.
      processes: of the job, >= 2.
      patience: seconds that process 0 waits for another to take an order.
      broadcast: gives every process what process 0 gave; called by all with
        arrays of one shape.
    """
    self._client = client
    self.process = process
    self.others = range(1, processes)
    self.patience = patience
    self._broadcast = broadcast
    self._number = 0

  def meet(self, mesh: jax.sharding.Mesh | None) -> None:
    """Waits for all processes before their first program together.

    Args:
      mesh: of the programs; None where each has one of its own.

    Raises:
      SilentError: another process has not come in time.
    """
    if mesh is not None:
      meeting.meet(mesh, self._wait)
      self._wait("broadcast")
      self._broadcast(np.zeros(1, np.uint32))

  @contextlib.contextmanager
  def order(
      self,
      kind: str,
      values: Mapping[str, Any] | None = None,
      arrays: Sequence[Any] = (),
  ) -> Iterator[None]:
    """Gives an order; for process 0, which does the same in the body.

    Signals to end are heeded when that is done: the others would wait in a
    program that this process does not run.

    Args:
      kind: of the order.
      values: JSON.
      arrays: all of each on this host.

    Yields:
      Nothing.

    Raises:
      SilentError: another process has not taken an earlier one in time.
    """
    if self._number >= _AHEAD:
      self._forget(self._number - _AHEAD)
    with signals.held():
      self._give(kind, values or {}, arrays)
      yield

  def tell(
      self,
      kind: str,
      values: Mapping[str, Any] | None = None,
      arrays: Sequence[Any] = (),
  ) -> None:
    """Gives an order of which this process has no part; see `order`."""
    with self.order(kind, values, arrays):
      pass

  def tell_last(self, kind: str, values: Mapping[str, Any]) -> None:
    """Gives a last order, also after an error cut off the one before.

    It waits for nobody. It is not heard where that one was cut off among its
    arrays: who takes those waits for the rest, until `jax.distributed` misses
    this process (`silence` of `join`).

    Args:
      kind: of the order.
      values: JSON.
    """
    with signals.held():
      self._give(kind, values, (), last=True)

  def hear(self, check: Callable[[], None] = lambda: None) -> Order:
    """Waits for the next order; for every other process.

    The wait ends with process 0, whose end `jax.distributed` notices.

    Args:
      check: called before each look; raises what is to end the wait.

    Returns:
      The order.
    """
    number, self._number = self._number, self._number + 1
    text = None
    while text is None:
      check()
      text = self._look(_order(number))
    self._client.key_value_set(_taken(number, self.process), "1")
    words = json.loads(text)
    arrays = [np.empty(shape, kind) for shape, kind in words["arrays"]]
    self._share(arrays, source=False)
    return Order(
        kind=words["kind"], values=words["values"], arrays=tuple(arrays)
    )

  def say(self, topic: str, value: Mapping[str, Any]) -> None:
    """Says something to who listens, once a topic; any thread may.

    Args:
      topic: what it is about, another one each time.
      value: JSON.
    """
    self._client.key_value_set(_said(topic, self.process), json.dumps(value))

  def listen(
      self,
      topic: str,
      process: int,
      *,
      more: float = 0.0,
      limit: Callable[[], float] = lambda: math.inf,
      keeps: bool = False,
  ) -> Any:
    """Waits for what a process says; any thread may.

    Args:
      topic: what it is about.
      process: who says it.
      more: seconds beyond this channel's patience that it may take.
      limit: when to give up at the latest, by `time.monotonic`; asked again
        and again.
      keeps: for others that listen, too; else the word is removed.

    Returns:
      What was said.

    Raises:
      SilentError: it does not say it in time.
    """
    key, begun = _said(topic, process), time.monotonic()
    while (text := self._look(key)) is None:
      now = time.monotonic()
      if now >= min(begun + self.patience + more, limit()):
        raise SilentError(
            f"process {process} of this job has not said {topic!r} within"
            f" {now - begun:.0f} s"
        )
    if not keeps:
      self._client.key_value_delete(key)
    return json.loads(text)

  def forget(self, topic: str) -> None:
    """Removes what this process said, when all have heard it."""
    self._client.key_value_delete(_said(topic, self.process))

  def _give(
      self,
      kind: str,
      values: Mapping[str, Any],
      arrays: Sequence[Any],
      *,
      last: bool = False,
  ) -> None:
    """Writes the next order, whose number counts once it is there."""
    given = [np.asarray(array, order="C") for array in arrays]
    words = {
        "kind": kind,
        "values": dict(values),
        "arrays": [[list(one.shape), one.dtype.name] for one in given],
    }
    text = json.dumps(words)
    try:
      self._client.key_value_set(_order(self._number), text)
    except jax.errors.JaxRuntimeError as error:
      if not last or "ALREADY_EXISTS" not in str(error):
        raise
      self._number += 1  # an error came when the one before was written
      self._client.key_value_set(_order(self._number), text)
    self._number += 1
    self._share(given, source=True)

  def _wait(self, name: str) -> None:
    """Waits until all processes wait under the same name."""
    try:
      milliseconds = round(self.patience * 1000)
      self._client.wait_at_barrier(f"mgrpo/{name}", milliseconds)
    except jax.errors.JaxRuntimeError as error:
      raise SilentError(
          f"not all processes of this job came within {self.patience:g} s:"
          f" {str(error).splitlines()[0]}"
      ) from error

  def _look(self, key: str) -> str | None:
    """Waits a moment for a key."""
    try:
      return self._client.blocking_key_value_get(key, round(_LOOK * 1000))
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
    return None

  def _forget(self, number: int) -> None:
    """Waits until all have taken an order, and removes it."""
    end = time.monotonic() + self.patience
    for process in self.others:
      while self._look(_taken(number, process)) is None:
        if time.monotonic() >= end:
          raise SilentError(
              f"process {process} of this job has not taken order {number}"
              f" within {self.patience:g} s"
          )
      self._client.key_value_delete(_taken(number, process))
    self._client.key_value_delete(_order(number))

  def _share(self, arrays: Sequence[np.ndarray], *, source: bool) -> None:
    """Broadcasts arrays into arrays of the same shapes."""
    flat = [array.reshape(-1).view(np.uint8) for array in arrays]
    for piece in _pieces([one.nbytes for one in flat]):
      room = _padded(sum(end - start for _, start, end in piece))
      buffer = np.zeros(room, np.uint8)
      at = 0
      if source:
        for number, start, end in piece:
          buffer[at : at + end - start] = flat[number][start:end]
          at += end - start
      told = self._broadcast(buffer.view(np.uint32)).view(np.uint8)
      if not source:
        for number, start, end in piece:
          flat[number][start:end] = told[at : at + end - start]
          at += end - start


def _pieces(sizes: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
  """Cuts arrays laid end to end: which one, from which byte, to which."""
  piece: list[tuple[int, int, int]] = []
  room = _PIECE
  for number, size in enumerate(sizes):
    start = 0
    while start < size:
      taken = min(room, size - start)
      piece.append((number, start, start + taken))
      start, room = start + taken, room - taken
      if not room:
        yield piece
        piece, room = [], _PIECE
  if piece:
    yield piece


def _padded(size: int) -> int:
  """The next power of two."""
  return max(_LEAST, 1 << (size - 1).bit_length())


def _order(number: int) -> str:
  """Where an order lies."""
  return f"{_ROOT}/{number}/words"


def _taken(number: int, process: int) -> str:
  """Where a process says that it has an order."""
  return f"{_ROOT}/{number}/taken/{process}"


def _said(topic: str, process: int) -> str:
  """Where a process says something."""
  return f"mgrpo/said/{topic}/{process}"
