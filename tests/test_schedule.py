"""What the host decides between two visits, without a device."""

import numpy as np
import pytest

from mgrpo_jax.policy import sampling as drawing
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


def news(made, visit, brought):
  """What callers are told of a visit."""
  return made.report(made.absorb(visit, brought))


def test_who_leaves_before_the_next_plan_is_forgotten_at_once():
  made = schedule()
  waiting = [request(number) for number in range(9)]
  for one in waiting:
    made.add(one)
  for one in waiting[2:]:
    one.future.over = True
    made.drop(one)
    made.drop(one)  # is counted once
  assert made.stats()["requests"] == 2
  assert made.stats()["cancelled"] == 7
  assert len(made.plan().busy) == 2


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


def various(*columns):
  """What a visit draws: the tokens of each slot, scores of their own."""
  tokens = np.full((STEPS, SLOTS), drawing.NO_TOKEN, np.int32)
  for index, column in enumerate(columns):
    tokens[: len(column), index] = column
  scores = -np.arange(tokens.size, dtype=np.float32).reshape(tokens.shape)
  return Drawn(tokens, scores, scores - 100)


def test_each_request_gets_its_own_tokens():
  made = schedule()
  made.add(stopped := request(0))
  made.add(full := request(1, limit=4))
  made.add(asked := request(2, until=lambda token: False))
  made.add(heard := request(3, on_tokens=lambda tokens, logprobs: None))
  told = news(made, made.plan(), various([1], [7], [8, 1], [5, 6]))
  assert [(n.request, n.end, n.count, n.last, n.stopped) for n in told] == [
      (stopped, 1, 1, True, True),
      (full, 1, 1, True, False),
      (asked, 2, 2, True, True),
      (heard, 2, 2, False, False),
  ]
  assert (stopped.sampled, stopped.logprobs) == ([1], [0.0])
  assert full.raw_logprobs == [-101.0]
  assert (asked.sampled, asked.logprobs) == ([8, 1], [-2.0, -6.0])
  assert heard.raw_logprobs == [-103.0, -107.0]
  assert made.stats()["generated"] == 6
  # One goes on, one waits for its caller, the others' slots are free.
  made.add(later := request(4))
  visit = made.plan()
  assert [one for _, one in visit.busy] == [later, heard]
  slots = visit.orders.slots
  assert slots.budget.tolist() == [STEPS, 0, 0, STEPS]
  assert (slots.token[3], slots.length[3]) == (6, 4)
  made.end(told[2], 2)
  taken = made.absorb(visit, various([2, 3], [], [], [9, 4]))
  made.renew(1)
  (one,) = made.report(taken)
  assert (one.request, one.end, one.count, one.visits) == (heard, 4, 2, 2)
  assert (heard.sampled, heard.versions) == ([5, 6, 9, 4], [0, 0])
  assert (later.sampled, made.stats()["generated"]) == ([2, 3], 10)


@pytest.mark.parametrize("session", [None, "s"])
def test_a_slot_is_free_before_its_request_is_told(session):
  made = schedule()
  first = [
      request(number, session=session and f"{session}{number}")
      for number in range(SLOTS)
  ]
  then = [request(number) for number in range(SLOTS, 2 * SLOTS)]
  for one in first + then:
    made.add(one)
  taken = made.absorb(made.plan(), drawn(token=1))
  visit = made.plan()
  assert [one for _, one in visit.busy] == then
  assert [one.request for one in made.report(taken)] == first
  assert [one.sampled for one in first] == SLOTS * [[1, 1]]
  assert not news(made, visit, drawn(token=2))
  assert [one.sampled for one in first] == SLOTS * [[1, 1]]
  assert [one.sampled for one in then] == SLOTS * [[2, 2]]


def test_a_session_goes_on_from_what_was_drawn():
  made = schedule()
  made.add(one := request(0, session="s"))
  assert not news(made, made.plan(), various([7, 8]))
  assert len(news(made, made.plan(), various([9, 1]))) == 1
  assert made.stats()["slots"] == {"free": SLOTS - 1, "idle": 1, "busy": 0}
  # of 3 tokens and 4 drawn the last is not in the cache
  more = np.asarray([*one.tokens, 7, 8, 9, 1, 5], np.int32)
  made.add(request(0, session="s", tokens=more))
  (call,) = made.plan().orders.prefills
  assert (call.starts[0], call.lengths[0]) == (6, 1)


def test_who_leaves_before_being_told_is_not():
  made = schedule()
  made.add(one := request(0))
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
  if ahead:
    taken = made.absorb(visit, drawn(token=3))
  if ahead == 2:
    made.report(taken)
  made.end(told, 1)
  assert one.sampled == [2] and one.versions == [0]
  if not ahead:
    taken = made.absorb(visit, drawn(token=3))
  if ahead < 2:
    assert not made.report(taken)
  assert one.sampled == [2] and len(one.logprobs) == 1
  assert made.stats()["slots"]["busy"] == 0
  if session:
    made.add(request(1))
    assert made.plan().orders.slots.budget.tolist() == [0, STEPS, 0, 0]
    more = np.asarray([*one.tokens, 2, 9, 9], np.int32)
    made.add(request(0, session="s", tokens=more))
    (call,) = made.plan().orders.prefills
    assert (call.starts[0], call.lengths[0]) == (3, 2)
