"""What the host decides between two visits, without a device."""

import numpy as np
import pytest

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


def news(made, visit, drawing):
  """What a visit brings."""
  return made.report(made.absorb(visit, drawing))


def test_a_plan_asks_nothing_of_those_that_wait():
  made = schedule()
  waiting = [request(number) for number in range(500)]
  for one in waiting:
    made.add(one)
  visit = made.plan()
  assert [one for _, one in visit.busy] == waiting[:SLOTS]
  before = sum(one.future.asked for one in waiting[SLOTS:])
  for _ in range(3):
    assert not news(made, visit, drawn())
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
    told = news(made, visit, drawn(token=1))  # a stop token
    assert [one.request for one in told] == mine
    assert all(one.last and one.stopped for one in told)
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
  assert [n.request for n in news(made, visit, drawn(token=1))] == [other]
  assert made.plan() is None
  assert made.stats()["slots"]["free"] == SLOTS
  assert made.stats()["cancelled"] == 1


def test_a_slot_goes_on_before_its_request_is_told():
  made = schedule()
  first = [request(number) for number in range(SLOTS)]
  then = [request(number) for number in range(SLOTS, 2 * SLOTS)]
  for one in first + then:
    made.add(one)
  taken = made.absorb(made.plan(), drawn(token=1))
  visit = made.plan()
  assert [one for _, one in visit.busy] == then
  later = made.absorb(visit, drawn(token=2))
  assert [one.request for one in made.report(taken)] == first
  assert not made.report(later)
  assert [one.sampled for one in first] == SLOTS * [[1, 1]]
  assert [one.sampled for one in then] == SLOTS * [[2, 2]]


def test_a_session_keeps_its_slot_until_its_request_is_told():
  made = schedule()
  one = request(0, session="s")
  made.add(one)
  taken = made.absorb(made.plan(), drawn(token=1))
  assert made.plan() is None
  assert made.stats()["slots"] == {"free": SLOTS - 1, "idle": 0, "busy": 1}
  made.report(taken)
  assert made.stats()["slots"] == {"free": SLOTS - 1, "idle": 1, "busy": 0}
  # 3 tokens and 2 drawn, of which the last is not in the cache
  more = np.asarray([*one.tokens, 1, 1, 9], np.int32)
  made.add(request(0, session="s", tokens=more))
  (call,) = made.plan().orders.prefills
  assert (call.starts[0], call.lengths[0]) == (4, 1)


@pytest.mark.parametrize("session", [None, "s"])
def test_who_leaves_before_being_told_is_not(session):
  made = schedule()
  one = request(0, session=session)
  made.add(one)
  taken = made.absorb(made.plan(), drawn(token=1))
  one.future.over = True
  assert made.plan() is None
  assert not made.report(taken)
  assert made.stats()["slots"] == {"free": SLOTS, "idle": 0, "busy": 0}


@pytest.mark.parametrize("session", [None, "s"])
@pytest.mark.parametrize("ahead", [0, 1, 2])  # taken in, reported too
def test_what_was_drawn_beyond_a_last_token_is_dropped(session, ahead):
  made = schedule()
  one = request(0, session=session, until=lambda token: False)
  made.add(one)
  (told,) = news(made, made.plan(), drawn(token=2))
  visit = made.plan()
  taken = made.absorb(visit, drawn(token=3)) if ahead else None
  if ahead == 2:
    made.report(taken)
  made.end(told, 1)
  assert one.sampled == [2] and one.versions == [0]
  if ahead == 1:
    assert not made.report(taken)
  assert one.sampled == [2] and len(one.logprobs) == 1
  assert made.stats()["slots"]["busy"] == 0
  if session:
    more = np.asarray([*one.tokens, 2, 9, 9], np.int32)
    made.add(request(0, session="s", tokens=more))
    (call,) = made.plan().orders.prefills
    assert (call.starts[0], call.lengths[0]) == (3, 2)
