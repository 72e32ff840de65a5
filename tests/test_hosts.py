"""What process 0 of a job tells the others, and that they do as it does."""

import concurrent.futures
import contextlib
import dataclasses
import json
import queue
import threading
import time

import jax
import numpy as np
import pytest
from test_learner import (
    CONFIG,
    CREDITS,
    REGULARISED,
    SHAPE,
    TEMPERATURE,
    weights,
)

from mgrpo_jax import objectives, optim, packing, publish, store
from mgrpo_jax.hosts import channel as channels
from mgrpo_jax.hosts import crew, ending
from mgrpo_jax.hosts.channel import Channel, SilentError
from mgrpo_jax.hosts.crew import Crew, DrivenError
from mgrpo_jax.hosts.driver import Driver
from mgrpo_jax.hosts.ending import driving
from mgrpo_jax.hosts.sharing import Helper
from mgrpo_jax.learner import Learner
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.types import TrainBatch

IMITATION = objectives.ImitationLoss(context_weight=0.1)
OBJECTIVES = {"imitate": IMITATION, "reinforce": REGULARISED}
ADAPTED = LoRA(rank=2, alpha=4.0, targets=("query", "down"))


class Keys:
  """The key-value store of `jax.distributed`, without any other process."""

  def __init__(self):
    self.values = {}
    self._changed = threading.Condition()

  def key_value_set(self, key, value):
    with self._changed:
      if key in self.values:
        raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already")
      self.values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self._changed:
      seconds = timeout_in_ms / 1000
      if not self._changed.wait_for(lambda: key in self.values, seconds):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
      return self.values[key]

  def key_value_delete(self, key):
    with self._changed:
      del self.values[key]


class Bounded(Keys):
  """Keys of which a wait without end fails."""

  def __init__(self, seconds):
    super().__init__()
    self._end = time.monotonic() + seconds

  def blocking_key_value_get(self, key, timeout_in_ms):
    assert time.monotonic() < self._end, "waits without end"
    return super().blocking_key_value_get(key, timeout_in_ms)


class CutOff(Keys):
  """Keys of which one operation ends in an error, before or after it."""

  def __init__(self, operation, count, error, *, done):
    super().__init__()
    self._cut = operation, count
    self._error, self._done = error, done

  def _do(self, operation, *what):
    name, count = self._cut
    self._cut = name, count - (name == operation)
    is_cut = name == operation and not count
    if not is_cut or self._done:
      found = getattr(super(), operation)(*what)
    if is_cut:
      raise self._error
    return found

  def key_value_set(self, key, value):
    self._do("key_value_set", key, value)

  def blocking_key_value_get(self, key, timeout_in_ms):
    return self._do("blocking_key_value_get", key, timeout_in_ms)


def pair(patience=600.0, keys=None):
  """The ends of a channel between two processes, and its keys."""
  keys, sent = Keys() if keys is None else keys, queue.Queue()

  def give(buffer):
    sent.put(buffer.copy())
    return buffer

  def take(buffer):
    told = sent.get(timeout=60)
    assert told.shape == buffer.shape and told.dtype == buffer.dtype
    return told

  ends = [
      Channel(
          keys,
          process=process,
          processes=2,
          patience=patience,
          broadcast=broadcast,
      )
      for process, broadcast in enumerate((give, take))
  ]
  return *ends, keys


def make(kind=Learner, *, lora=None, reference="moving", **more):
  return kind(
      CONFIG,
      weights(0),
      lora=lora,
      shape=SHAPE,
      optimizer=optim.AdamW(
          b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
      ),
      temperature=TEMPERATURE,
      reference=reference,
      seed=0,
      mesh=None,
      **more,
  )


def follow(pool, channel, learner, bucket):
  """Begins to assist with a learner; gives the future."""
  return pool.submit(
      crew.assist,
      channel,
      mesh=None,
      make=lambda: learner,
      objectives=OBJECTIVES,
      store=bucket,
  )


def train(learner, objective):
  return learner.step(
      [(learner.pack(CREDITS, objective), packing.count(CREDITS))],
      objective=objective,
      learning_rates=[1e-2],
  )


def same(one, other):
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path)


@pytest.mark.parametrize("piece", [1 << 24, 8192])
def test_an_order_comes_as_it_was_given(monkeypatch, piece):
  monkeypatch.setattr(channels, "_PIECE", piece)
  random = np.random.default_rng(0)
  arrays = [
      np.float32(3.5),
      random.normal(size=(70, 50)).astype(np.float32),
      np.zeros((0, 3), np.int32),
      random.random((9, 5)) < 0.5,
      np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
      np.full(7, -0.0, np.float32),
  ]
  first, second, _ = pair()
  first.tell("kind", {"a": [1, 2]}, arrays)
  first.tell("next")
  order = second.hear()
  assert (order.kind, order.values) == ("kind", {"a": [1, 2]})
  for given, found in zip(arrays, order.arrays, strict=True):
    assert found.dtype == given.dtype and found.shape == given.shape
    assert found.tobytes() == np.asarray(given, order="C").tobytes()
  assert second.hear().kind == "next"


def test_orders_that_all_have_taken_are_removed():
  first, second, keys = pair()
  for number in range(30):
    first.tell("kind", {"number": number})
    assert second.hear().values["number"] == number
  assert len(keys.values) <= 2 * channels._AHEAD


def test_who_takes_no_orders_is_named():
  first, _, _ = pair(patience=0.01)
  with pytest.raises(SilentError, match="process 1 .* order 0"):
    for _ in range(channels._AHEAD + 1):
      first.tell("kind")


def test_what_is_said_is_heard_once_or_by_all():
  first, second, keys = pair(patience=0.01)
  second.say("a", {"x": 1})
  assert first.listen("a", 1) == {"x": 1}
  first.say("b", {})
  for _ in range(2):
    assert second.listen("b", 0, keeps=True) == {}
  first.forget("b")
  assert not keys.values


def test_who_says_nothing_is_named():
  first, _, _ = pair(patience=0.01)
  with pytest.raises(SilentError, match="process 1 .* has not said 'a'"):
    first.listen("a", 1)
  begun = time.monotonic()
  with pytest.raises(SilentError, match="process 1"):
    first.listen("a", 1, more=600.0, limit=lambda: begun)


@pytest.mark.parametrize("lora", [None, ADAPTED])
def test_the_crew_ends_with_the_drivers_state(lora, bucket):
  first, second, _ = pair()
  driver = make(Driver, lora=lora, channel=first)
  alone, helper = make(lora=lora), make(lora=lora)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    done = follow(pool, second, helper, bucket)
    with driving(first):
      for learner in (driver, alone):
        train(learner, IMITATION)
        learner.move_reference()
        train(learner, REGULARISED)
        found = train(learner, REGULARISED).metrics()
        assert found["kl"] > 0  # the reference is older than the first of them
      assert same(driver.weights, alone.weights)
      offered = driver.offered("policies/main/v0", short=False)
      publish.publish(bucket, "main", 0, offered, keep=1, meta={})
      found = publish.read(bucket, "main", 0, like=alone.trained)
      assert same(found.params, alone.trained)
      kept = driver.whole
      train(driver, REGULARISED)
      assert not same(driver.trained, alone.trained)
      driver.take(kept)
      assert same(driver.whole, alone.whole)
      assert same(driver.trained, alone.trained)
      train(driver, REGULARISED)
    done.result(timeout=600)
  train(alone, REGULARISED)
  assert same(helper.state, driver.state)
  assert same(helper.state, alone.state)


def test_the_crew_ends_with_the_reason_of_process_0(bucket):
  first, second, _ = pair()
  with pytest.raises(OSError, match="disk"):
    with driving(first):
      raise OSError("no disk")
  with pytest.raises(DrivenError, match="process 0 ended: no disk") as caught:
    crew.assist(
        second, mesh=None, make=make, objectives=OBJECTIVES, store=bucket
    )
  assert caught.value.code == 1


def given(keys):
  """Kinds of the orders that can be heard, up to the first that is missing."""
  kinds = []
  while words := keys.values.get(f"mgrpo/orders/{len(kinds)}/words"):
    kinds.append(json.loads(words)["kind"])
  return kinds


def test_the_crew_hears_that_one_of_it_takes_no_orders():
  first, second, keys = pair(patience=0.01)
  with pytest.raises(SilentError, match="process 1 .* order 0"):
    with driving(first):
      for _ in range(channels._AHEAD + 1):
        first.tell("kind")
  assert given(keys) == ["kind"] * channels._AHEAD + [ending.FAIL]
  heard = [second.hear() for _ in given(keys)]
  assert "has not taken order 0" in heard[-1].values["reason"]


def test_the_crew_hears_that_its_end_could_not_be_told():
  first, _, keys = pair(patience=0.01)
  with pytest.raises(SilentError, match="process 1 .* order 0"):
    with driving(first):
      for _ in range(channels._AHEAD):
        first.tell("kind")
  assert given(keys) == ["kind"] * channels._AHEAD + [ending.FAIL]


@pytest.mark.parametrize(
    ("operation", "count", "done", "orders"),
    [
        ("blocking_key_value_get", 0, False, channels._AHEAD),
        ("key_value_set", 2, False, 2),
        ("key_value_set", 2, True, 3),
    ],
)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), jax.errors.JaxRuntimeError("INTERNAL: no")]
)
def test_the_crew_hears_of_what_cut_off_an_order(
    operation, count, done, orders, error
):
  first, _, keys = pair(keys=CutOff(operation, count, error, done=done))
  with pytest.raises(type(error)):
    with driving(first):
      for _ in range(channels._AHEAD + 1):
        first.tell("kind")
  assert given(keys) == ["kind"] * orders + [ending.FAIL]


class Says(Channel):
  """Cannot say what is too long; nor anything where it is cut off."""

  cut_off = False

  def say(self, topic, value):
    if self.cut_off or "problem" not in value:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too long")
    super().say(topic, value)


def test_what_cannot_be_said_is_told_in_short(bucket):
  first, second, _ = pair(patience=5.0)
  second.__class__ = Says
  with contextlib.closing(Helper(bucket, second)) as helper:
    helper.begin({"a": jax.numpy.zeros(3)}, topic="t", folder="f", short=False)
    said = first.listen("t/described", 1)
    first.say("t/write", {"write": False})
  assert said == {"problem": "JaxRuntimeError: RESOURCE_EXHAUSTED: too long"}
  helper.check()  # process 0 has heard it


def test_what_process_0_cannot_hear_ends_the_other(bucket):
  _, second, _ = pair(keys=Bounded(120))
  second.__class__, second.cut_off = Says, True
  with contextlib.closing(Helper(bucket, second)) as helper:
    helper.begin({"a": jax.numpy.zeros(3)}, topic="t", folder="f", short=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="too long"):
      end = time.monotonic() + 60
      while time.monotonic() < end:
        helper.check()
        time.sleep(0.01)
    with pytest.raises(jax.errors.JaxRuntimeError, match="too long"):
      Crew(None, OBJECTIVES, helper).run(second)  # no order comes


def test_orders_that_do_not_fit_are_refused(bucket):
  helper = Crew(make(), OBJECTIVES, Helper(bucket, pair()[1]))
  order = channels.Order(kind="dance", values={}, arrays=())
  with pytest.raises(ValueError, match="'dance'"):
    helper.obey(order)
  values = {"objective": "imitate", "rates": [1e-2], "batches": [1]}
  with pytest.raises(ValueError, match="1 batches, 0 are here"):
    helper.obey(dataclasses.replace(order, kind="step", values=values))


def test_a_batch_is_handed_over_field_by_field():
  (batch,) = make().pack(CREDITS, IMITATION)
  again = TrainBatch(*jax.tree.leaves(batch))
  for field in dataclasses.fields(TrainBatch):
    assert getattr(again, field.name) is getattr(batch, field.name)
