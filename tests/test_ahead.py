"""How far rollouts run ahead of training, and what may not depend on it."""

import asyncio
import functools
import random
import threading
import types

import pytest
import virtual_time
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo_jax import ahead
from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.tasks.pipeline import TaskQueue
from mgrpo_jax.testing.setup import small_setup, tasks

QUESTIONS = tasks()
PER_STEP = 2


class Fake:
  """A sampler and a learner that take random times, and what they saw."""

  def __init__(self, rng, *, total, every, staleness, fails=0.0):
    self.rng, self.total, self.every = rng, total, every
    self.queue = TaskQueue(QUESTIONS, seed=0, max_retries=2)
    self.done = self.evaluated = 0
    self.drawing = self.drawn = self.trained = 0
    self.ages, self.most_waiting, self.order = [], 0, {}
    self.fails = fails
    self.overlapped = 0.0
    self.furthest = functools.partial(
        ahead.furthest,
        max_staleness=staleness,
        evaluate_every=every,
        total=total,
    )

  def take(self, step):
    del step
    return self.queue.take(PER_STEP)

  async def draw(self, step, taken):
    assert self.drawing == 0 and self.evaluated == self.done // self.every
    self.drawing += 1
    oldest = self.done
    await asyncio.sleep(self.rng.expovariate(1.0))
    self.drawing -= 1
    self.drawn += 1
    return step, oldest, taken

  async def step(self, rollouts, step):
    found, oldest, taken = await rollouts.collect(step)
    self.most_waiting = max(self.most_waiting, rollouts.waiting)
    assert found == step
    self.ages.append(self.done - oldest)
    self.order[step] = [task.id for task in taken]
    for name in self.order[step]:  # by the step alone, as its seeds are
      if random.Random(f"{step} {name}").random() < self.fails:
        self.queue.put_back(name)
      else:
        self.queue.settle(name)
    await asyncio.sleep(self.rng.expovariate(1.0))
    self.done = step + 1
    if self.done % self.every == 0 or self.done == self.total:
      assert self.drawing == 0 or self.done == self.total
      await asyncio.sleep(self.rng.expovariate(1.0))
      self.evaluated = self.done // self.every

  async def train(self, until, start=None):
    """Trains until so many steps are done; returns what a checkpoint keeps."""
    async with ahead.Ahead(
        self.draw, take=self.take, furthest=self.furthest
    ) as rollouts:
      if start is not None:
        self.done, queue, begun = start
        self.evaluated = self.done // self.every
        self.queue.set_state(queue)
        stages = types.SimpleNamespace(name="s", steps=self.total)
        rollouts.set_state(self.done, begun, (stages,), {"s": QUESTIONS})
      while self.done < until:
        rollouts.begin(self.done)
        await self.step(rollouts, self.done)
      return self.done, self.queue.get_state(), rollouts.get_state()


CASES = {
    "seed": st.integers(0, 2**16),
    "total": st.integers(1, 12),
    "every": st.integers(1, 6),
    "staleness": st.integers(0, 4),
}


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_nothing_is_older_than_allowed_and_the_queue_is_bounded(
    seed, total, every, staleness
):
  fake = Fake(
      random.Random(seed), total=total, every=every, staleness=staleness
  )
  virtual_time.run(fake.train(total))
  assert len(fake.ages) == fake.drawn == total
  assert 0 <= min(fake.ages) and max(fake.ages) <= min(staleness, every - 1)
  assert fake.most_waiting <= staleness


@settings(max_examples=40, deadline=None)
@given(**CASES, cut=st.integers(0, 12))
def test_the_order_of_tasks_depends_on_neither_times_nor_kills(
    seed, total, every, staleness, cut
):
  """With tasks that fail and are put back; killed and resumed once."""
  make = functools.partial(
      Fake, total=total, every=every, staleness=staleness, fails=0.3
  )
  whole = make(random.Random(0))
  virtual_time.run(whole.train(total))
  cut = min(cut, total)
  first, second = make(random.Random(seed)), make(random.Random(seed + 1))
  start = virtual_time.run(first.train(cut))
  virtual_time.run(second.train(total, start))
  assert first.order | second.order == whole.order
  assert not first.order.keys() & second.order.keys()
  assert len(whole.order) == total


def test_rollouts_and_training_overlap():
  def seconds(staleness):
    fake = Fake(random.Random(0), total=9, every=99, staleness=staleness)
    fake.rng = types.SimpleNamespace(expovariate=lambda rate: 1.0)

    async def timed():
      await fake.train(9)
      return asyncio.get_running_loop().time()

    return virtual_time.run(timed())

  assert seconds(0) == 2 * 9 + 1  # the evaluation at the end
  assert seconds(1) == 1 + 9 + 1


def test_a_step_is_begun_no_further_than_the_next_evaluation():
  at = functools.partial(ahead.furthest, evaluate_every=4, total=10)
  assert [at(n, max_staleness=0) for n in range(11)] == [*range(10), 9]
  assert [at(n, max_staleness=2) for n in range(11)] == [
      *(2, 3, 3, 3),
      *(6, 7, 7, 7),
      *(9, 9, 9),
  ]


def test_what_breaks_a_rollout_ends_the_run():
  async def draw(step, taken):
    if step == 1:
      raise RuntimeError("the machine is on fire")
    return taken

  async def work():
    async with ahead.Ahead(
        draw, take=lambda step: (), furthest=lambda done: 3
    ) as rollouts:
      rollouts.begin(0)
      assert await rollouts.collect(0) == ()
      with pytest.raises(ValueError, match="step: 2, allowed: 1, the next"):
        await rollouts.collect(2)
      await rollouts.collect(1)

  with pytest.raises(RuntimeError, match="on fire"):
    asyncio.run(work())


def test_what_is_under_way_ends_with_the_block():
  ended = []

  async def draw(step, taken):
    try:
      await asyncio.sleep(60)
    finally:
      ended.append(step)

  async def work():
    async with ahead.Ahead(
        draw, take=lambda step: (), furthest=lambda done: 1
    ) as rollouts:
      rollouts.begin(0)
      await asyncio.sleep(0)
      await asyncio.sleep(0)
    return ended

  assert virtual_time.run(work()) == [0]


def test_tasks_that_are_gone_are_refused():
  setup = small_setup(seed=0, imitation_steps=1, steps=2)

  async def work():
    async with ahead.Ahead(
        None, take=None, furthest=lambda done: done
    ) as rollouts:
      rollouts.set_state(1, [["nowhere"]], setup.stages, setup.tasks)

  with pytest.raises(MismatchError, match="stage 'reinforce': no task 'now"):
    asyncio.run(work())


def test_work_beside_is_in_a_thread_and_waited_for_when_cancelled():
  go, ended = threading.Event(), []

  def slow():
    go.wait(60)
    ended.append(threading.current_thread())
    return 7

  async def work():
    task = asyncio.create_task(ahead.beside(slow))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done() and not ended
    go.set()
    with pytest.raises(asyncio.CancelledError):
      await task
    assert ended and ended[0] is not threading.main_thread()
    assert await ahead.beside(slow) == 7
    assert await ahead.inline(threading.current_thread) is (
        threading.main_thread()
    )

  asyncio.run(work())
