"""The thread that visits the device, one visit after the other.

It plans a visit itself as soon as the last one is over, so that the device does
not wait for the event loop, which at that moment may be with thousands of other
callers; and it tells of a visit when the device is at the next one.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from mgrpo_jax.policy.decode import Drawn
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.sampler.orders import Orders
from mgrpo_jax.sampler.schedule import News, Schedule, Taken, Visit


class Visited(Protocol):
  """What is visited: a `Resident`, or the `Lead` of several processes.

  Attributes:
    params: the weights of the visits that are begun from now on.
  """

  params: Any

  def visit(
      self, params: Any, orders: Orders, begun: Callable[[], None]
  ) -> Drawn:
    """Does what was ordered with some weights, and waits for it.

    Args:
      params: that were the attribute.
      orders: what to do.
      begun: called when the device has it all.
    """


class _Work(NamedTuple):
  """A visit to make; `future` waits for it if it is a rehearsal."""

  visit: Visit
  params: Any  # of `Visited.params`
  future: Future[None] | None


class Worker:
  """Visits a device for a schedule.

  Attributes:
    guard: held by whoever uses the schedule, in whatever thread; and by whoever
      calls `wake` or `settle`.
    seconds: that the thread was `busy` with visits, and `idle` though there
      was something to do.
  """

  def __init__(self, schedule: Schedule, resident: Visited) -> None:
    """Starts no thread yet.

    Args:
      schedule: says what to do.
      resident: does it.
    """
    self.guard = threading.Condition()
    self.seconds = {"busy": 0.0, "idle": 0.0}
    self._schedule, self._resident = schedule, resident
    self._rehearsals: collections.deque[tuple[Visit, Future[None]]] = (
        collections.deque()
    )
    self._closing = False
    self._waiting = False  # for something to do
    self._ready = 0.0  # when there was something to do, the device being free
    self._taken: Taken | None = None  # of which nobody was told yet

  def start(
      self,
      tell: Callable[[Sequence[News]], None],
      ended: Callable[[Exception | None], None],
  ) -> None:
    """Starts the thread.

    Args:
      tell: takes the news of a visit; called in the thread, at the latest
        before `ended`.
      ended: takes what the thread failed with, None if it was closed; called in
        the thread, once.
    """
    self._closing = self._waiting = False
    self._ready = time.perf_counter()
    self._tell = tell
    threading.Thread(
        target=self._work, args=(ended,), name="sampler", daemon=True
    ).start()

  def close(self) -> None:
    """Lets the thread end after the visit under way."""
    with self.guard:
      self._closing = True
      self.guard.notify_all()

  def wake(self) -> None:
    """Says that there may be something to do."""
    if self._waiting:
      self._waiting, self._ready = False, time.perf_counter()
    self.guard.notify_all()

  def rehearse(self, visit: Visit) -> Future[None]:
    """Makes a visit of which nobody is told.

    Args:
      visit: that changes nothing.

    Returns:
      Done when the visit is, with the error if it failed; may be cancelled
      until the visit begins.
    """
    future: Future[None] = Future()
    with self.guard:
      if self._closing:
        _fail(future)
        return future
      self._rehearsals.append((visit, future))
      self.wake()
    return future

  def untold(self) -> list[News]:
    """What the last visit brought, if nobody was told; then nobody else is."""
    with self.guard:
      taken, self._taken = self._taken, None
      return [] if taken is None else self._schedule.report(taken)

  def _work(self, ended: Callable[[Exception | None], None]) -> None:
    """Makes visits until it is closed or one fails; the thread's function."""
    failure: Exception | None = None
    try:
      while (work := self._next()) is not None:
        self._make(work)
    except BaseException as error:  # whatever it is, nobody may wait for ever
      failure = _ordinary(error)
    self._tell_news()
    with self.guard:
      self._closing = True
      rehearsals = list(self._rehearsals)
      self._rehearsals.clear()
    for _, future in rehearsals:
      _fail(future)
    ended(failure)

  def _next(self) -> _Work | None:
    """Waits for something to do; None when it is to end."""
    with self.guard:
      while not self._closing:
        if (work := self._planned()) is not None:
          return work
        self._tell_news()
        self._waiting = True
        self.guard.wait()
    return None

  def _planned(self) -> _Work | None:
    """The next rehearsal, else the next visit."""
    while self._rehearsals:
      visit, future = self._rehearsals.popleft()
      if future.set_running_or_notify_cancel():
        return _Work(visit, self._resident.params, future)
    planned = self._schedule.plan()
    if planned is None:
      return None
    return _Work(planned, self._resident.params, None)

  def _make(self, work: _Work) -> None:
    """Makes one visit, and tells of the one before."""
    began = time.perf_counter()
    try:
      drawn = self._resident.visit(
          work.params, work.visit.orders, self._tell_news
      )
    except BaseException as error:  # raised here, told to who waits there
      if work.future is not None:
        work.future.set_exception(_ordinary(error))
      raise
    ended = time.perf_counter()
    with self.guard:
      self.seconds["idle"] += began - self._ready
      self.seconds["busy"] += ended - began
      self._ready = ended
      if work.future is not None:
        work.future.set_result(None)
      else:
        self._taken = self._schedule.absorb(work.visit, drawn)

  def _tell_news(self) -> None:
    """Tells what the last visit brought, once."""
    if news := self.untold():
      self._tell(news)


def _ordinary(error: BaseException) -> Exception:
  """An error, or one in its place that every future takes and no task is."""
  if isinstance(error, Exception) and not isinstance(error, StopIteration):
    return error
  told = EngineError(f"a visit raised {error!r}")
  told.__cause__ = error
  return told


def _fail(future: Future[None]) -> None:
  """Tells who waits for a rehearsal that there will be none."""
  if future.set_running_or_notify_cancel():
    future.set_exception(EngineError("the engine has ended"))
