"""What the host decides between two visits, without a device."""

import numpy as np

from mgrpo_jax.policy.decode import Drawn
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.schedule import Schedule
from mgrpo_jax.sampler.slots import Request

SLOTS, STEPS = 4, 2


class Future:
  """Says how often it was asked whether it is done."""

  def __init__(self):
    self.asked, self.over = 0, False

  def done(self):
    self.asked += 1
    return self.over


def schedule():
  return Schedule(
      0, num_slots=SLOTS, context=64, prefill_tokens=32, prefill_buckets=(8,),
      decode_steps=STEPS,
  )  # fmt: skip


def request(number, **fields):
  sampling = Sampling(temperature=1.0, max_new_tokens=9, stop_ids=(1,))
  return Request(
      **{
          "tokens": np.asarray([5, 6, 7 + number], np.int32), "limit": 12,
          "sampling": sampling, "seed": (0, number), "session": None,
          "tenant": "", "future": Future(),
      } | fields
  )  # fmt: skip


def drawn(token=2):
  """What a visit draws in all slots."""
  shape = STEPS, SLOTS
  zeros = np.zeros(shape, np.float32)
  return Drawn(np.full(shape, token, np.int32), zeros, zeros)


def test_a_plan_asks_nothing_of_those_that_wait():
  made = schedule()
  waiting = [request(number) for number in range(500)]
  for one in waiting:
    made.add(one)
  visit = made.plan()
  assert [one for _, one in visit.busy] == waiting[:SLOTS]
  before = sum(one.future.asked for one in waiting[SLOTS:])
  for _ in range(3):
    assert not made.absorb(visit, drawn())
    visit = made.plan()
  # only the next one in the queue
  assert sum(one.future.asked for one in waiting[SLOTS:]) - before <= 3
  assert made.stats()["requests"] == 500 - SLOTS


def test_slots_go_on_in_order_as_they_become_free():
  made = schedule()
  waiting = [request(number) for number in range(3 * SLOTS)]
  for one in waiting:
    made.add(one)
  for round_ in range(3):
    visit = made.plan()
    mine = waiting[round_ * SLOTS :][:SLOTS]
    assert [one for _, one in visit.busy] == mine
    news = made.absorb(visit, drawn(token=1))  # a stop token
    assert [one.request for one in news] == mine
    assert all(one.last and one.stopped for one in news)
  assert made.plan() is None
  assert made.stats()["slots"] == {"free": SLOTS, "idle": 0, "busy": 0}


def test_who_leaves_the_queue_is_not_served():
  made = schedule()
  waiting = [request(number) for number in range(SLOTS + 3)]
  for one in waiting:
    made.add(one)
  visit = made.plan()
  left = waiting[SLOTS + 1]
  left.future.over = True
  made.drop(left)
  assert (made.stats()["requests"], made.stats()["cancelled"]) == (2, 1)
  made.drop(left)
  assert made.stats()["cancelled"] == 1
  made.absorb(visit, drawn(token=1))
  assert [one for _, one in made.plan().busy] == [
      waiting[SLOTS], waiting[SLOTS + 2]
  ]  # fmt: skip


def test_what_was_cancelled_while_it_was_sampled_is_told_to_nobody():
  made = schedule()
  one, other = request(0), request(1)
  made.add(one), made.add(other)
  visit = made.plan()
  one.future.over = True
  assert [n.request for n in made.absorb(visit, drawn(token=1))] == [other]
  assert made.plan() is None
  assert made.stats()["slots"]["free"] == SLOTS
  assert made.stats()["cancelled"] == 1
