"""Signals to end are heeded when what others take part in is done."""

import concurrent.futures
import signal
import threading

import pytest
from test_hosts import (
    IMITATION,
    OBJECTIVES,
    Bounded,
    follow,
    make,
    pair,
    same,
    train,
)

from mgrpo_jax import store
from mgrpo_jax.hosts import signals
from mgrpo_jax.hosts.crew import DrivenError
from mgrpo_jax.hosts.driver import Driver
from mgrpo_jax.hosts.ending import driving


@pytest.fixture(autouse=True)
def heeded():
  """As in a process that no shell has put beside itself."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_a_signal_is_heeded_when_the_body_is_over():
  done = []
  with pytest.raises(KeyboardInterrupt):
    with signals.held() as came:
      signal.raise_signal(signal.SIGINT)
      done.append(list(came))
  assert done == [[signal.SIGINT]]
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_is_heeded_where_the_body_fails():
  with pytest.raises(KeyboardInterrupt) as caught:
    with signals.held():
      signal.raise_signal(signal.SIGINT)
      raise OSError("a fault")
  assert isinstance(caught.value.__context__, OSError)


@pytest.mark.parametrize(
    "came",
    [
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_of_several_one_is_heeded(came):
  heeded = []
  signal.signal(signal.SIGINT, lambda number, _: heeded.append(number))
  before = signal.signal(
      signal.SIGTERM, lambda number, _: heeded.append(number)
  )
  try:
    with signals.held():
      for number in came:
        signal.raise_signal(number)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert heeded == [signal.SIGTERM]


def test_none_is_heeded_by_who_clears_them():
  with signals.held() as came:
    signal.raise_signal(signal.SIGINT)
    came.clear()


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_the_change_of_handlers_is_heeded(monkeypatch, told):
  """SIGTERM raises SIGINT, as commands have it."""
  before = signal.signal(
      signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT)
  )
  straight, changes = signal.signal, []

  def change(number, handler):
    found = straight(number, handler)
    changes.append(number)
    if len(changes) == 3:  # the first that is put back
      signal.raise_signal(told)
    return found

  try:
    with pytest.raises(KeyboardInterrupt):
      with signals.held():
        monkeypatch.setattr(signal, "signal", change)
        changes.extend([0, 0])
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "note" not in repr(signal.getsignal(signal.SIGTERM))
  finally:
    straight(signal.SIGTERM, before)


def test_what_is_ignored_stays_so():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with signals.held() as came:
    signal.raise_signal(signal.SIGINT)
  assert not came


def test_threads_hold_no_signal():
  """Python lets none of them set a handler; none is disturbed either."""
  found = []

  def work():
    with signals.unheld(), signals.held() as came:
      found.append(came)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [[]]


class Told(Bounded):
  """This process is told to end as soon as it has written an order."""

  def __init__(self, count):
    super().__init__(60.0)
    self.left = count

  def key_value_set(self, key, value):
    super().key_value_set(key, value)
    if key.endswith("words"):
      self.left -= 1
      if not self.left:
        signal.raise_signal(signal.SIGINT)


class Early(Bounded):
  """This process is told to end before it writes an order."""

  def key_value_set(self, key, value):
    if key.endswith("words"):
      signal.raise_signal(signal.SIGINT)
    super().key_value_set(key, value)


def test_the_last_order_is_given_where_a_signal_comes_as_well():
  first, second, _ = pair(keys=Early(60.0))
  with pytest.raises(KeyboardInterrupt):
    with driving(first):
      raise OSError("no disk")
  assert second.hear().values["reason"] == "no disk"


def everything(channel):
  """One order of each kind, and the learner after each of them."""
  driver = make(Driver, channel=channel)
  yield driver
  train(driver, IMITATION)
  yield driver
  driver.move_reference()
  train(driver, OBJECTIVES["reinforce"])
  driver.take(driver.whole)
  assert driver.trained is not None
  driver.offered("policies/main/v0", short=False)
  yield driver


@pytest.mark.parametrize("count", range(1, 12))
def test_an_order_is_carried_out_by_all_or_by_none(tmp_path, count):
  first, second, _ = pair(keys=Told(count))
  helper = make()
  learners = []  # the driver, once it is made
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    done = follow(pool, second, helper, store.open_folder(tmp_path))
    with pytest.raises(KeyboardInterrupt):
      with driving(first):
        for learner in everything(first):
          learners.append(learner)
        signal.raise_signal(signal.SIGINT)  # at the latest
    with pytest.raises(DrivenError):
      done.result(timeout=600)
  if learners:
    assert same(helper.state, learners[0].state)
