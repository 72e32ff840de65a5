"""The stream of tasks: order, epochs, positions that can be stored."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.tasks import pipeline
from mgrpo_jax.types import Task


def make(count):
  return [
      Task(
          id=f"t{i}",
          question="?",
          answers=("x",),
          stage="easy" if i % 3 else "hard",
          hops=1,
          evidence=(),
          meta={"kind": f"{1 + i % 2}hop:a", "family": "ab"[i % 4 // 2]},
      )
      for i in range(count)
  ]


def test_every_epoch_holds_every_task_once_in_a_new_order():
  tasks = make(40)
  stream = pipeline.TaskStream(tasks, seed=5)
  first, second = stream.take(40), stream.take(40)
  assert {t.id for t in first} == {t.id for t in second}
  assert {t.id for t in first} == {t.id for t in tasks}
  assert first != second and list(first) != tasks
  assert stream.size == 40


def test_the_seed_decides_the_order():
  tasks = make(40)
  one, same, other = (
      pipeline.TaskStream(tasks, seed=seed).take(90) for seed in (5, 5, 6)
  )
  assert one == same and one != other


@settings(max_examples=6, deadline=None)
@given(size=st.integers(9, 40), before=st.integers(0, 60))
def test_a_stored_position_continues_exactly(size, before):
  stream = pipeline.TaskStream(make(size), seed=1)
  stream.take(before)
  state = json.loads(json.dumps(stream.get_state()))
  expected = stream.take(25)
  resumed = pipeline.TaskStream(make(size), seed=1)
  resumed.take(3)
  resumed.set_state(state)
  assert resumed.take(25) == expected
  assert [next(resumed) for _ in range(2)] == [next(stream) for _ in range(2)]


def test_a_position_of_another_stream_is_refused():
  state = pipeline.TaskStream(make(5), seed=1).get_state()
  for other in (
      pipeline.TaskStream(make(6), seed=1),
      pipeline.TaskStream(make(5), seed=2),
  ):
    with pytest.raises(MismatchError, match="other tasks or another seed"):
      other.set_state(state)
  with pytest.raises(ValueError, match="keys"):
    pipeline.TaskStream(make(5), seed=1).set_state({"grain": {}})


def test_impossible_streams_are_refused():
  with pytest.raises(ValueError, match="at least one"):
    pipeline.TaskStream([], seed=0)
  with pytest.raises(ValueError, match="'t1' occurs twice"):
    pipeline.TaskStream([*make(3), make(2)[1]], seed=0)
  with pytest.raises(ValueError, match="seed"):
    pipeline.TaskStream(make(3), seed=-1)


def test_what_is_put_back_comes_first_and_survives_a_restart():
  queue = pipeline.TaskQueue(make(5), seed=1, max_retries=1)
  order = [task.id for task in pipeline.TaskStream(make(5), seed=1).take(5)]
  assert [t.id for t in queue.take(3)] == order[:3]
  assert queue.put_back(order[2])
  assert queue.put_back(order[0])
  assert queue.waiting == 2
  state = json.loads(json.dumps(queue.get_state()))
  for one in (queue, pipeline.TaskQueue(make(5), seed=1, max_retries=1)):
    one.set_state(state)
    taken = [t.id for t in (*one.take(1), *one.take(3))]
    assert taken == [order[2], order[0], *order[3:]]
    assert one.waiting == 0
    assert not one.put_back(order[2])  # a second time is too often
    assert one.put_back(order[3])
    assert one.waiting == 1


def test_only_failures_in_a_row_count():
  queue = pipeline.TaskQueue(make(1), seed=1, max_retries=1)
  (task,) = queue.take(1)
  for _ in range(3):  # once in every epoch
    assert queue.put_back(task.id)
    queue.settle(task.id)  # asked again, it went well
  assert queue.put_back(task.id)
  assert not queue.put_back(task.id)
  assert queue.put_back(task.id)  # in a later epoch


def test_select():
  def ids(stages=(), kinds=(), families=()):
    kept = pipeline.select(
        make(12), stages=stages, kinds=kinds, families=families
    )
    return [task.id for task in kept]

  assert len(ids()) == 12
  assert ids(stages=("hard",)) == ["t0", "t3", "t6", "t9"]
  assert ids(stages=("hard",), kinds=("2hop", "9hop")) == ["t3", "t9"]
  assert ids(families=("b",)) == ["t2", "t3", "t6", "t7", "t10", "t11"]
  assert ids(families=("b", "c"), stages=("hard",)) == ["t3", "t6"]
  with pytest.raises(ValueError, match=r"'7hop'.*\['1hop', '2hop'\]"):
    ids(kinds=("7hop",))
  with pytest.raises(ValueError, match=r"'z'.*families \['a', 'b'\]"):
    ids(families=("z",))
