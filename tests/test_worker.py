"""Who is told what of a visit, and when."""

import asyncio
import threading

import pytest

from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.sampler.schedule import Visit
from mgrpo_jax.sampler.worker import Worker


class Script:
  """A schedule of numbered visits, whose news are their numbers."""

  def __init__(self, visits):
    self.left = list(range(visits))

  def plan(self):
    return Visit(orders=self.left.pop(0), busy=[]) if self.left else None

  def absorb(self, visit, drawn):
    return [visit.orders] if drawn else []

  def report(self, taken):
    return taken


class Device:
  """Notes what happens, and fails in some visits."""

  params = None

  def __init__(self, *, before=None, after=None, silent=(), error=RuntimeError):
    self.log, self._before, self._after = [], before, after
    self._silent, self._error = silent, error

  def visit(self, params, orders, begun):
    if orders == self._before:
      raise self._error("it cannot begin")
    begun()
    self.log.append(f"visit {orders}")
    if orders == self._after:
      raise self._error("it broke")
    return orders not in self._silent


def played(device, visits):
  """What happened until it was told of all, then of its end."""
  worker = Worker(Script(visits), device)
  ended, last, over = [], threading.Event(), threading.Event()

  def tell(news):
    device.log.append(f"told {news[0]}")
    if news[0] == visits - 1:
      last.set()

  def end(failure):
    ended.append(failure)
    last.set()
    over.set()

  worker.start(tell, end)
  assert last.wait(60)
  worker.close()
  assert over.wait(60)
  assert len(ended) == 1
  return ended[0]


def test_callers_are_told_of_a_visit_when_the_next_has_begun():
  device = Device()
  assert played(device, 3) is None
  assert device.log == [
      "visit 0",
      "told 0",
      "visit 1",
      "told 1",
      "visit 2",
      "told 2",  # for there is no next
  ]


def test_a_visit_that_brought_nothing_is_not_told_of():
  device = Device(silent={1})
  assert played(device, 3) is None
  assert [line for line in device.log if "told" in line] == ["told 0", "told 2"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_visit_brought_is_told_though_the_next_fails(when):
  device = Device(**{when: 1})
  assert isinstance(played(device, 3), RuntimeError)
  assert [line for line in device.log if "told" in line] == ["told 0"]


@pytest.mark.parametrize(
    "error", [SystemExit, asyncio.CancelledError, StopIteration]
)
def test_whatever_ends_the_thread_is_told(error):
  failure = played(Device(before=1, error=error), 3)
  assert isinstance(failure, EngineError) and error.__name__ in str(failure)


def test_a_rehearsal_learns_whatever_ends_the_thread():
  worker = Worker(Script(0), Device(before="it", error=SystemExit))
  over = threading.Event()
  worker.start(print, lambda failure: over.set())
  rehearsal = worker.rehearse(Visit(orders="it", busy=[]))
  assert isinstance(rehearsal.exception(60), EngineError)
  assert over.wait(60)


def test_a_worker_that_is_closed_tells_before_it_ends():
  worker, log = None, []
  over = threading.Event()

  class Closing(Device):

    def visit(self, params, orders, begun):
      worker.close()
      return super().visit(params, orders, begun)

  worker = Worker(Script(2), Closing())
  worker.start(log.append, lambda failure: (log.append(failure), over.set()))
  assert over.wait(60)
  assert log == [[0], None]


def test_whoever_uses_the_schedule_holds_the_guard():
  free, last = [], threading.Event()

  def may_be_taken():
    """Whether another thread could use the schedule at this moment."""

    def look():
      free.append(worker.guard.acquire(blocking=False))
      if free[-1]:
        worker.guard.release()

    other = threading.Thread(target=look)
    other.start()
    other.join()

  class Watched(Script):

    def plan(self):
      may_be_taken()
      return super().plan()

    def absorb(self, visit, drawn):
      may_be_taken()
      return super().absorb(visit, drawn)

    def report(self, taken):
      may_be_taken()
      return super().report(taken)

  worker = Worker(Watched(2), Device())
  worker.start(
      lambda news: last.set() if news == [1] else None, lambda failure: None
  )
  assert last.wait(60)
  worker.close()
  assert len(free) >= 7 and not any(free)
