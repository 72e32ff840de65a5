"""Groups that teach nothing are drawn again within their step."""

import asyncio
import dataclasses

import numpy as np
import pytest
from test_run import make_setup, played, without_engines
from trajectories import group

from mgrpo_jax import rewards, rollout, store
from mgrpo_jax.agents.call import turn_seed
from mgrpo_jax.run import open_run

STEP = 4


def alike(task):
  """A group whose rollouts are one and the same, number apart."""
  first, *_ = played(task).trajectories
  calls = [dataclasses.replace(first, rollout=k) for k in range(3)]
  return group(task, calls, num_rollouts=3)


def failed(task):
  """A group that a machine failed on."""
  return played(task, broken=(1,))


@pytest.fixture
def rolled_out(monkeypatch):
  """Draws in place of rollouts: give each, by place, what makes its groups.

  Returns:
    The draws that are left, and of those made the tasks and the seed.
  """
  left, made = [], []

  async def run_groups(tasks, *, seed, **_):
    made.append(([task.id for task in tasks], seed))
    return [make(t) for make, t in zip(left.pop(0), tasks, strict=True)]

  monkeypatch.setattr(rollout, "run_groups", run_groups)
  return left, made


def step(setup, stage):
  """Arrows 1 to 3 of a step, then what is drawn again.

  Returns:
    The run; groups and scores before, and after.
  """
  run = without_engines(setup)

  async def work():
    groups = await run.collect(stage, run.take(stage), STEP)
    scores = run.grade(stage, groups)
    return (groups, scores), await run.resample(stage, groups, scores, STEP)

  return run, *asyncio.run(work())


def order(setup, count):
  """Ids of a stage's first tasks, as its queue has them."""
  queue = without_engines(setup).resources.queues["reinforce"]
  return [task.id for task in queue.take(count)]


def test_flat_groups_are_replaced_by_the_next_tasks_of_the_queue(rolled_out):
  left, made = rolled_out
  left += [[alike, played, alike], [alike, played], [played], []]
  setup = dataclasses.replace(make_setup(), resample=3)
  run, before, after = step(setup, setup.stages[1])
  ids = order(setup, 6)
  assert [tasks for tasks, _ in made] == [ids[:3], ids[3:5], ids[5:]]
  groups, scores = after
  assert [one.task.id for one in groups] == [ids[5], ids[1], ids[4]]
  assert groups[1] is before[0][1] and scores[1] is before[1][1]
  method = setup.method
  for one, graded in zip(groups, scores, strict=True):
    expected = rewards.score(
        one, weights=method.reward_weights, rules=method.rules
    )
    assert np.array_equal(graded.total, expected.total)
    assert np.ptp(graded.total) > 0
  assert run.meter.values["replaced"] == 2.0
  assert run.meter.work.rollouts == 18  # of six groups, those drawn again too


def test_every_draw_of_a_step_has_seeds_of_its_own(rolled_out):
  left, made = rolled_out
  left += [[alike] * 3] * 3
  setup = dataclasses.replace(make_setup(), resample=2)
  _, before, after = step(setup, setup.stages[1])
  seeds = [seed for _, seed in made]
  assert len(set(seeds)) == 3
  assert seeds[0] == turn_seed(setup.seed, "step", STEP)  # as without a second
  assert after == before


def test_what_failed_again_goes_back_to_the_queue(rolled_out):
  left, _ = rolled_out
  left += [[played, played, alike], [failed]]
  setup = dataclasses.replace(make_setup(), resample=1)
  run, before, (groups, scores) = step(setup, setup.stages[1])
  assert groups[2] is before[0][2] and scores[2] is before[1][2]
  assert run.meter.values["replaced"] == 0.0
  queue = run.resources.queues["reinforce"]
  assert queue.waiting == run.meter.work.retried == 1
  assert queue.take(1)[0].id == order(setup, 4)[3]


@pytest.mark.parametrize("resample, stage", [(0, 1), (2, 0)])
def test_nothing_is_drawn_again_unasked_or_of_demonstrations(
    rolled_out, resample, stage
):
  left, made = rolled_out
  left += [[alike] * 3]
  setup = dataclasses.replace(make_setup(), resample=resample)
  run, before, after = step(setup, setup.stages[stage])
  assert after == before
  assert len(made) == stage  # the expert rolls nothing out
  assert "replaced" not in run.meter.values


def test_a_task_that_comes_again_within_a_step_is_rolled_out_anew(tmp_path):
  """All rewards are equal, and the stage has only as many tasks as a step."""
  setup = make_setup()
  method = setup.method
  flat = {
      role: dataclasses.replace(weights, correct=0.0, expert=0.0)
      for role, weights in method.reward_weights.items()
  }
  setup = dataclasses.replace(
      setup,
      method=dataclasses.replace(method, reward_weights=flat),
      tasks={name: tasks[:3] for name, tasks in setup.tasks.items()},
      resample=1,
  )
  stage = setup.stages[1]
  drawn = []

  async def work():
    async with open_run(setup, store.open_folder(tmp_path)) as run:
      collect = run.collect

      async def collected(*arguments, **named):
        drawn.append(await collect(*arguments, **named))
        return drawn[-1]

      run.collect = collected
      groups = await run.collect(stage, run.take(stage), 0)
      scores = run.grade(stage, groups)
      return await run.resample(stage, groups, scores, 0)

  groups, _ = asyncio.run(work())
  first, again = (
      {
          (one.task.id, t.rollout): t.tokens.tolist()
          for one in groups
          for t in one.trajectories
          if t.role == "main"
      }
      for groups in drawn
  )
  assert groups == drawn[0]  # none of the others taught more
  assert first.keys() == again.keys() and len(first) == 9
  assert all(first[key] != again[key] for key in first)
