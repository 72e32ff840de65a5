"""The arrows of the loop, one at a time."""

import asyncio
import dataclasses
import types

import numpy as np
import pytest
from trajectories import group, random_trajectory

from mgrpo_jax import advantages, metrics, packing, rollout, store
from mgrpo_jax.comparison import alike
from mgrpo_jax.credit import Credits
from mgrpo_jax.critic import Critic
from mgrpo_jax.meter import Meter
from mgrpo_jax.packing import Credit
from mgrpo_jax.policy.load import load
from mgrpo_jax.resources import Resources
from mgrpo_jax.run import Run, open_run
from mgrpo_jax.spares import Spares
from mgrpo_jax.testing.setup import small_setup
from mgrpo_jax.types import Seating, Status

MAX_GAP = 1e-4  # nats, float32 on a CPU


def make_setup(*, loss=None, sampler=None, **method):
  """One step of reinforcement, with parts of it changed."""
  setup = small_setup(seed=0, imitation_steps=0, steps=1)
  changed = dataclasses.replace(setup.method.policy_loss, **loss or {})
  return dataclasses.replace(
      setup,
      method=dataclasses.replace(setup.method, policy_loss=changed, **method),
      sampler=dataclasses.replace(setup.sampler, **sampler or {}),
  )


def without_engines(setup):
  """A run whose engines stand still."""
  return Run(Resources(setup, store.open("memory://")))


class Recorder:
  """A learner that keeps what it is told to learn from."""

  def __init__(self, shape):
    self.shape = shape
    self.minibatches = []

  def pack(self, credits, objective):
    del objective
    return packing.pack(credits, shape=self.shape)

  def step(self, minibatches, *, objective, learning_rates):
    del objective, learning_rates
    self.minibatches += minibatches
    return types.SimpleNamespace(tokens=0)


def played(task, *, broken=()):
  """A group of three rollouts of the main agent, some of them FAILED."""
  calls = [
      random_trajectory(
          np.random.default_rng(k),
          8 + k,
          vocab_size=11,
          task_id=task.id,
          rollout=k,
          status=Status.FAILED if k in broken else Status.COMPLETED,
      )
      for k in range(3)
  ]
  return group(task, calls, num_rollouts=3)


def test_what_has_no_gradient_still_counts_in_the_denominators():
  setup = make_setup(loss={"kl": None, "kl_coefficient": 0.0}, minibatches=1)
  recorder = Recorder(setup.method.shape)
  run = without_engines(setup)
  run.resources.learners["main"] = recorder
  tasks = setup.tasks["reinforce"][:2]
  groups = [played(task) for task in tasks]
  credits = [
      Credit(trajectory=call, advantage=gain, weight=1.0)
      for one in groups
      for call, gain in zip(one.trajectories, (1.0, 0.0, -1.0), strict=True)
  ]
  run.update(
      setup.stages[1],
      0,
      groups,
      Credits(by_policy={"main": credits}, assignments={}, advantages=()),
  )
  ((batches, totals),) = recorder.minibatches
  assert sum(batch.weight.sum() for batch in batches) == 4
  sampled = sum(one.trajectory.loss_mask.sum() for one in credits)
  trained = sum(batch.loss_mask.sum() for batch in batches)
  assert (totals.trajectories, totals.tokens) == (6, sampled)
  assert trained < sampled


@pytest.mark.parametrize("broken", [(1,), (0, 2)])
def test_a_group_that_failed_in_part_is_trained_on_once_and_later(broken):
  setup = make_setup()
  run = without_engines(setup)
  stage = setup.stages[1]
  first, *_ = without_engines(setup).take(stage)
  trained = []
  for step in range(2):
    run.meter.begin()
    tasks = run.take(stage)
    fails = {first.id: broken} if step == 0 else {}
    groups = [played(task, broken=fails.get(task.id, ())) for task in tasks]
    scores = run.grade(stage, groups)
    credits = run.assign(stage, groups, scores, step)
    calls = [one.trajectory for one in credits.by_policy["main"]]
    trained.append([call.rollout for call in calls if call.task_id == first.id])
    others = {call.task_id for call in calls} - {first.id}
    assert others == {task.id for task in tasks} - {first.id}
    assert run.resources.queues["reinforce"].waiting == (step == 0)
  assert trained == [[], [0, 1, 2]]
  assert (run.meter.work.retried, run.meter.work.abandoned) == (1, 0)


def test_a_group_that_fails_for_ever_is_never_trained_on():
  setup = dataclasses.replace(make_setup(), max_retries=1)
  run = without_engines(setup)
  stage = setup.stages[1]
  task, *_ = run.take(stage)
  for _ in range(2):
    run.meter.begin()
    (graded,) = run.grade(stage, [played(task, broken=(1,))])
    assert not graded.weight.any()
  assert (run.meter.work.retried, run.meter.work.abandoned) == (1, 1)
  assert run.resources.queues["reinforce"].waiting == 1


@pytest.mark.parametrize("allowed, kept", [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_what_is_older_than_allowed_is_put_back(allowed, kept):
  """The groups' tokens are of version 0, the main agent's weights of 2."""
  setup = dataclasses.replace(make_setup(), max_staleness=allowed)
  run = without_engines(setup)
  for version in (1, 2):
    run.publish(("main",), version)
  stage = setup.stages[1]
  task, *_ = run.take(stage)
  run.meter.begin()
  (graded,) = run.grade(stage, [played(task)])
  assert graded.weight.any() == kept
  assert run.meter.values["stale"] == 1 - kept
  assert run.resources.queues["reinforce"].waiting == 1 - kept


def test_age_counts_updates_not_the_steps_between_them():
  """Of version 0, the main agent's next update being that of the fifth step."""
  run = without_engines(dataclasses.replace(make_setup(), max_staleness=1))
  run.publish(("main",), 5)
  stage = run.setup.stages[1]
  task, *_ = run.take(stage)
  run.meter.begin()
  scores = run.grade(stage, [played(task)])
  assert scores[0].weight.any() and run.meter.values["stale"] == 0
  run.assign(stage, [played(task)], scores, 5)
  values = run.meter.values
  assert values["staleness/main"] == values["staleness_mean/main"] == 1
  assert values["aged/1"] == 1.0
  run.publish(("main",), 6)
  (graded,) = run.grade(stage, [played(task)])
  assert not graded.weight.any()
  # A resumed run knows what it needs to count as far.
  assert run.host_state()["recent"]["main"] == [5, 6]


def test_what_is_drawn_apart_is_added_to_the_step():
  run = without_engines(make_setup())
  run.meter.begin()
  run.meter.work.rollouts = 3
  other = Meter(run.resources)
  other.values["seconds/rollout"] = 2.0
  other.work.rollouts, other.work.generated_tokens = 4, 9
  run.meter.add(other)
  assert run.meter.values["seconds/rollout"] == 2.0
  assert (run.meter.work.rollouts, run.meter.work.generated_tokens) == (7, 9)


def test_a_policy_that_does_not_learn_has_no_age():
  setup = make_setup()
  run = without_engines(setup)
  run.publish(("main",), 2)
  stage = dataclasses.replace(
      setup.stages[1], trained=frozenset({"researcher"})
  )
  task, *_ = run.take(stage)
  run.meter.begin()
  (graded,) = run.grade(stage, [played(task)])
  assert graded.weight.any() and run.meter.values["stale"] == 0


def test_what_spares_did_is_counted_over_all_draws_of_a_step(
    tmp_path, monkeypatch
):
  spares = Spares(count=1, patience=0.0)
  setup = make_setup(sampler={"spares": spares})
  stage = setup.stages[1]
  drawn = [(1, 2), (0, 1)]  # rescued, late of each draw

  async def run_groups(tasks, *, num_rollouts, max_concurrent, spares, **_):
    assert max_concurrent == 2 and spares.count == 1  # 9 rollouts, 4 a task
    rescued, late = drawn.pop(0)
    seating = Seating(
        origin=(0, 1, 2), rescued=rescued, late=late, surplus=spares.count
    )
    assert num_rollouts == 3
    return [dataclasses.replace(played(t), seating=seating) for t in tasks]

  monkeypatch.setattr(rollout, "run_groups", run_groups)

  async def two_draws():
    async with open_run(setup, store.open_folder(tmp_path)) as run:
      run.meter.begin()
      tasks = run.take(stage)
      await run.collect(stage, tasks, 0)
      await run.collect(stage, tasks[:1], 0)
      return run.meter.values

  values = asyncio.run(two_draws())
  assert values["rescued"] == pytest.approx(3 / 12)
  assert values["late"] == pytest.approx(7 / 12)
  assert values["surplus"] == pytest.approx(4 / 12)
  for name in ("rescued", "late", "surplus"):
    metrics.define(name)


def test_without_spares_nothing_is_said_of_them(tmp_path):
  setup = make_setup()

  async def one_draw():
    async with open_run(setup, store.open_folder(tmp_path)) as run:
      run.meter.begin()
      stage = setup.stages[1]
      groups = await run.collect(stage, run.take(stage), 0)
      return groups, run.meter.values

  groups, values = asyncio.run(one_draw())
  assert all(group.seating is None for group in groups)
  assert not {"rescued", "late", "surplus"} & values.keys()


def test_a_critic_learns_beside_the_policy(tmp_path):
  setup = make_setup()
  loss = dataclasses.replace(
      setup.method.policy_loss,
      entropy_coefficient=0.01,
      critic=Critic(coefficient=0.5, discount=1.0, trace=0.95, clip=0.2),
  )
  setup = dataclasses.replace(
      setup,
      policies={n: p.with_critic() for n, p in setup.policies.items()},
      method=dataclasses.replace(
          setup.method,
          comparison=alike(advantages.plain),
          policy_loss=loss,
      ),
  )
  stage = setup.stages[1]

  async def one_step():
    async with open_run(setup, store.open_folder(tmp_path / "store")) as run:
      run.meter.begin()
      groups = await run.collect(stage, run.take(stage), 0)
      credits = run.assign(stage, groups, run.grade(stage, groups), 0)
      dispatched = run.update(stage, 0, groups, credits)
      assert not any("flat_groups" in name for name in run.meter.values)
      run.publish(tuple(dispatched), 1)
      run.resources.read_published()
      run.resources.save_policies(tmp_path / "policies")
      head = run.resources.learners["main"].weights.value_head
      return dispatched["main"].metrics(), np.asarray(head)

  found, head = asyncio.run(one_step())
  assert found["value_loss"] > 0 and found["entropy"] > 0
  assert np.any(head)
  assert not load(tmp_path / "policies" / "main").config.value_head


def test_the_trainer_scores_at_the_samplers_temperature(tmp_path):
  setup = make_setup(sampler={"temperature": 0.7}, minibatches=1)
  stage = setup.stages[1]

  async def one_step():
    async with open_run(setup, store.open_folder(tmp_path)) as run:
      run.meter.begin()
      groups = await run.collect(stage, run.take(stage), 0)
      scores = run.grade(stage, groups)
      credits = run.assign(stage, groups, scores, 0)
      return run.update(stage, 0, groups, credits)

  found = asyncio.run(one_step())["main"].metrics()
  assert found["logprob_gap_max"] < MAX_GAP
  # Before the first update a policy is what was scored a moment ago.
  np.testing.assert_allclose(found["ratio_max"], 1.0, atol=MAX_GAP)
