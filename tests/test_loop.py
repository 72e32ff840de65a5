"""Whole runs in miniature."""

import asyncio
import dataclasses
import io
import json
import re
import shutil
import time

import jax
import numpy as np
import pytest
import tiny_run

from mgrpo_jax import metrics, publish, store, workdir
from mgrpo_jax.agents.errors import InfrastructureError
from mgrpo_jax.agents.watchdog import StuckError
from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.journal import NonFiniteError
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.report import records
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.run import Run, open_run
from mgrpo_jax.sampler import device
from mgrpo_jax.testing.setup import small_setup
from mgrpo_jax.work import Budget, Work

MAX_GAP = 1e-4  # nats, float32 on a CPU
UPDATE = 0.05  # seconds, at least


def small(**changes):
  steps = {"imitation_steps": 1, "steps": 3} | {
      key: changes.pop(key)
      for key in ("imitation_steps", "steps")
      if key in changes
  }
  return dataclasses.replace(
      small_setup(seed=changes.pop("seed", 0), **steps), **changes
  )


def train(directory, setup):
  """Runs a setup; returns the summary."""
  return tiny_run.train(
      directory, setup, config={"seed": setup.seed}, stream=io.StringIO()
  )


def weights(policy):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(policy.params)]


def equal(one, other):
  return all(map(np.array_equal, weights(one), weights(other)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  directory = tmp_path_factory.mktemp("run") / "run"
  setup = small(whole_every=2)
  update = Run.update

  def slowly(*args):
    time.sleep(UPDATE)
    return update(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Run, "update", slowly)
    return directory, setup, train(directory, setup)


def test_the_run_directory_is_complete(finished):
  directory, _, summary = finished
  names = {path.name for path in directory.iterdir()}
  assert names >= {
      "config.json",
      "metrics.jsonl",
      "tensorboard",
      "rollouts",
      "checkpoints",
      "bucket",
      "policies",
      "summary.json",
  }
  assert json.loads((directory / "summary.json").read_text()) == summary
  assert summary["steps"] == 4
  for moment in ("before", "after"):
    assert summary["eval"][moment]["n"] == 3
    assert len(summary["eval"][moment]["ci95"]) == 2
  assert summary["tokens"]["trained"] > 0
  assert summary["tokens"]["generated"] > 0
  assert summary["peak_rss_bytes"] > 2**20


def test_both_policies_moved_and_what_is_published_is_what_is_saved(finished):
  directory, setup, _ = finished
  bucket = store.open_folder(directory / "bucket")
  for name, before in setup.policies.items():
    saved = load(directory / "policies" / name)
    read = publish.read(bucket, name, "latest", like=before.params)
    assert not equal(before, saved)
    assert all(
        map(np.array_equal, weights(saved), jax.tree.leaves(read.params))
    )
    assert read.version.number == 4
    manifests = [
        bucket.get(f"policies/{name}/v{number}/manifest.json")
        for number in publish.versions(bucket, name)
    ]
    assert {json.loads(one)["format"] for one in manifests} == {5, 6}


def test_sampler_and_trainer_agree_on_every_step(finished):
  directory, _, _ = finished
  rows = read_metrics(directory / "metrics.jsonl")
  assert all(row["evicted/main"] == 0 for row in rows)
  gaps = [
      value
      for row in rows
      for name, value in row.items()
      if name.startswith("logprob_gap_max/")
  ]
  assert len(gaps) >= 3
  assert max(gaps) < MAX_GAP


def test_sessions_that_lost_their_cache_are_counted_by_step(tmp_path):
  setup = small()
  engine = dict(setup.sampler.engine) | {"num_slots": 2}
  sampler = dataclasses.replace(setup.sampler, engine=engine)
  setup = dataclasses.replace(setup, sampler=sampler)
  sampling = Sampling(temperature=1.0, max_new_tokens=2, stop_ids=())

  async def work():
    async with open_run(setup, store.open_folder(tmp_path)) as run:
      sample = run.resources.engines["main"].generate
      run.meter.begin()
      for session in ("a", "b", "c"):  # c takes the slot of a
        await sample([1, 2, 3], sampling, 0, session=session)
      yield run.meter.totals(1.0)
      run.meter.begin()
      await sample([4], sampling, 0, session="c")
      yield run.meter.totals(1.0)

  async def collect():
    return [values async for values in work()]

  first, second = asyncio.run(collect())
  names = ("evicted/main", "mismatched/main", "evicted/researcher")
  assert [first[name] for name in names] == [1, 0, 0]
  assert [second[name] for name in names] == [0, 1, 0]


def test_every_phase_of_a_step_is_timed(finished):
  directory, _, _ = finished
  for row in read_metrics(directory / "metrics.jsonl"):
    phases = ("wait", "reward", "align", "update", "publish")
    assert 0 < sum(row[f"seconds/{p}"] for p in phases) <= row["seconds/step"]
    assert row["seconds/update"] >= UPDATE


def test_every_update_has_its_own_learning_rate(finished):
  directory, setup, _ = finished
  rows = read_metrics(directory / "metrics.jsonl")
  last = [row["learning_rate/main"] for row in rows]  # of two updates a step
  warmup, peak = setup.method.warmup_steps, setup.stages[0].learning_rate
  assert (warmup, setup.method.minibatches) == (2, 2)
  np.testing.assert_allclose(last, [peak] * len(rows), rtol=1e-6)


def test_evaluations_are_counted_apart(finished):
  directory, setup, summary = finished
  rows = read_metrics(directory / "metrics.jsonl")
  for before, row in zip([None, *rows], rows, strict=False):
    sampled, trained = row["generated_tokens"], row["trained_tokens"]
    if before:
      sampled -= before["generated_tokens"]
      trained -= before["trained_tokens"]
    np.testing.assert_allclose(
        row["tokens_per_second/step"] * row["seconds/step"], sampled + trained
    )
  assert rows[0]["generated_tokens"] == 0  # of a demonstration
  assert rows[0]["evaluation_tokens"] > 0  # before the first step
  assert summary["tokens"]["evaluated"] > rows[-1]["evaluation_tokens"]


def test_demonstrations_that_cannot_be_given_are_counted(tmp_path):
  setup = small(imitation_steps=2, steps=0)
  demonstrate = setup.demonstrate["imitate"]
  lost = []

  async def sometimes(task, seed):
    if len(lost) < 2:
      lost.append(task.id)
      return None
    return await demonstrate(task, seed)

  changed = setup.demonstrate | {"imitate": sometimes}
  train(tmp_path / "run", dataclasses.replace(setup, demonstrate=changed))
  rows = read_metrics(tmp_path / "run/metrics.jsonl")
  assert [row["lost"] for row in rows] == [2, 2]
  assert [row["rollouts"] for row in rows] == [1, 4]


def test_a_checkpoint_over_other_tasks_is_refused(finished, tmp_path):
  directory, setup, _ = finished
  shutil.copytree(directory, tmp_path / "run")
  tasks = {name: part[1:] for name, part in setup.tasks.items()}
  with pytest.raises(
      MismatchError, match="checkpoint 3 in .*: stage 'imitate': .*other tasks"
  ):
    train(tmp_path / "run", dataclasses.replace(setup, tasks=tasks))


def test_another_policy_to_begin_with_is_refused(finished, tmp_path):
  directory, setup, _ = finished
  shutil.copytree(directory, tmp_path / "run")
  other = small_setup(seed=0, imitation_steps=1, steps=3).policies["main"]
  params = jax.tree.map(lambda leaf: leaf + 1, other.params)
  other = dataclasses.replace(other, params=params)
  policies = dict(setup.policies) | {"main": other}
  changed = dataclasses.replace(setup, policies=policies)
  with pytest.raises(MismatchError, match="checkpoint 3 .*'main' .*: weights"):
    train(tmp_path / "run", changed)

  async def read():
    bucket = store.open_folder(directory / "bucket")
    async with open_run(changed, bucket) as run:
      run.resources.read_published()

  with pytest.raises(MismatchError, match="^policy 'main' .*: weights$"):
    asyncio.run(read())


def test_another_run_of_the_same_shapes_compiles_nothing(finished, tmp_path):
  del finished
  with metrics.count_compilations() as compiled:
    train(tmp_path / "again", small(seed=5))
  assert compiled.count == 0


def test_the_last_version_is_published_whatever_the_rhythm(tmp_path):
  setup = small(imitation_steps=1, steps=1, publish_every=5)
  train(tmp_path / "run", setup)
  bucket = store.open_folder(tmp_path / "run/bucket")
  for name in setup.policies:
    assert publish.versions(bucket, name) == [0, 2]
    assert publish.latest(bucket, name).number == 2


@pytest.mark.parametrize("name", ["trained", "generated"])
def test_a_budget_ends_a_run_after_the_step_that_reaches_it(
    finished, tmp_path, name
):
  whole, setup, _ = finished
  rows = read_metrics(whole / "metrics.jsonl")
  limit = int(rows[1][f"{name}_tokens"])  # of two steps
  spent = {"trained_tokens": 0, "generated_tokens": 0}
  budget = Budget(**spent | {f"{name}_tokens": limit})
  setup = dataclasses.replace(setup, budget=budget, publish_every=9)
  summary = train(tmp_path / "run", setup)
  assert summary["steps"] == 2
  assert summary["tokens"][name] == limit
  found = read_metrics(tmp_path / "run/metrics.jsonl")
  assert [row[f"{name}_tokens"] for row in found] == [
      row[f"{name}_tokens"] for row in rows[:2]
  ]
  assert "accuracy/dev" in found[-1]  # the last step is looked at
  bucket = store.open_folder(tmp_path / "run/bucket")
  assert publish.versions(bucket, "main") == [0, 2]  # and published

  before = (tmp_path / "run/metrics.jsonl").read_bytes()
  assert train(tmp_path / "run", setup)["steps"] == 2
  assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_run_that_was_interrupted_keeps_to_its_budget(finished, tmp_path):
  whole, setup, summary = finished
  limit = read_metrics(whole / "metrics.jsonl")[2]["trained_tokens"]
  budget = Budget(trained_tokens=int(limit), generated_tokens=0)
  tasks = setup.stages[0], dataclasses.replace(setup.stages[1], steps=1)
  first = dataclasses.replace(setup, budget=budget, stages=tasks)
  assert train(tmp_path / "run", first)["steps"] == 2
  resumed = dataclasses.replace(setup, budget=budget)
  found = train(tmp_path / "run", resumed)
  assert found["steps"] == 3 < summary["steps"]
  assert found["tokens"]["trained"] == limit


def test_a_budget_of_nothing_is_never_spent():
  work = Work(trained_tokens=5, generated_tokens=7)
  for trained, generated, spent in (
      (0, 0, False),
      (5, 0, True),
      (6, 0, False),
      (6, 7, True),
      (0, 8, False),
  ):
    budget = Budget(trained_tokens=trained, generated_tokens=generated)
    assert budget.spent(work) == spent
  with pytest.raises(ValueError, match="generated_tokens must be >= 0, got -1"):
    Budget(trained_tokens=0, generated_tokens=-1)


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1])
def test_every_seed_works(tmp_path, seed):
  summary = train(tmp_path / "run", small(seed=seed, steps=1))
  assert summary["steps"] == 2


def test_versions_of_a_policy_that_is_not_trained_stay_in_the_store(tmp_path):
  setup = small(imitation_steps=2, steps=3, publish_every=2)
  easy, hard = setup.stages
  hard = dataclasses.replace(hard, trained=frozenset({"main"}))
  easy = dataclasses.replace(easy, steps=1)
  setup = dataclasses.replace(setup, stages=(easy, hard), keep_versions=9)
  train(tmp_path / "run", setup)
  bucket = store.open_folder(tmp_path / "run/bucket")
  assert publish.versions(bucket, "main") == [0, 2, 4]
  # Trained in the first step only, published when that is next due.
  assert publish.versions(bucket, "researcher") == [0, 1, 4]

  async def read(version):
    async with open_run(setup, bucket) as run:
      return run.resources.read_published(version)

  assert asyncio.run(read(2)) == []
  with pytest.raises(publish.NoVersionError, match=r"no version 3.*\[0, 1, 2"):
    asyncio.run(read(3))


def test_a_damaged_lease_is_counted_once_and_stops_nothing(tmp_path):
  with workdir.hold(tmp_path / "run", {"seed": 0}) as held:
    lease = held.bucket / "policies/main/leases/v1/reader"
  lease.parent.mkdir(parents=True)
  lease.write_text("{")
  train(tmp_path / "run", small(steps=2))
  *_, last = read_metrics(tmp_path / "run/metrics.jsonl")
  assert last["corrupt_records"] == 1


def test_a_frozen_policy_stays_as_it_is(tmp_path):
  setup = small()
  stages = tuple(
      dataclasses.replace(stage, trained=frozenset({"main"}))
      for stage in setup.stages
  )
  setup = dataclasses.replace(setup, stages=stages)
  train(tmp_path / "run", setup)
  for name, before in setup.policies.items():
    after = load(tmp_path / "run" / "policies" / name)
    assert equal(before, after) == (name == "researcher")


def test_a_task_that_a_machine_failed_on_is_asked_again(tmp_path):
  broken = set()
  setup = small(imitation_steps=0, steps=4)

  def actor(name, engine):
    made = setup.actor(name, engine)

    async def speak(moment):
      key = moment.request
      if moment.sampling.temperature > 0 and not broken:
        broken.add(key)
      if key in broken and len(seen) < setup.sampler.max_attempts * 3:
        seen.append(key)
        raise InfrastructureError("the machine is on fire")
      return await made.speak(moment)

    return dataclasses.replace(made, speak=speak)

  seen = []
  train(tmp_path / "run", dataclasses.replace(setup, actor=actor))
  (question,) = broken
  steps = []
  for number, path in records.list_steps(tmp_path / "run/rollouts").items():
    for group in records.read_step(path).groups:
      if group["task"]["question"] == question:
        steps.append((number, group))
  (first, failed), (second, repeated), *_ = steps
  assert second == first + 1
  assert {t["status"] for t in failed["trajectories"]} == {"FAILED"}
  assert all(t["rewards"] == {} for t in failed["trajectories"])
  assert all(t["advantage"] is None for t in failed["trajectories"])
  assert "FAILED" not in {t["status"] for t in repeated["trajectories"]}
  stored = (tmp_path / "run/checkpoints/3/record/metadata").read_text()
  queue = json.loads(stored)["host"]["run"]["tasks"]["reinforce"]
  assert queue["retries"] == {}  # it went well, so what failed is forgotten


def test_a_run_that_stands_still_says_why_and_ends(tmp_path):
  setup = small()
  setup = dataclasses.replace(
      setup,
      sampler=dataclasses.replace(setup.sampler, watchdog=0.2, deadline=1.0),
  )

  def actor(name, engine):
    async def hang(moment):
      await asyncio.sleep(60)

    return dataclasses.replace(setup.actor(name, engine), speak=hang)

  told = io.StringIO()
  waits = r"main 0 in turn 0 waits for policy 'main' since \d s"
  with pytest.raises(StuckError, match=rf"longer than 1 s .*: .*{waits}"):
    tiny_run.train(
        tmp_path / "run",
        dataclasses.replace(setup, actor=actor),
        config={"seed": setup.seed},
        stream=told,
    )
  assert re.search(rf"nothing new for 0\.2 s: .*{waits}", told.getvalue())


def test_what_samples_is_compiled_before_anything_is_asked(tmp_path):
  setup, told, counted = small(steps=1), io.StringIO(), []

  def actor(name, engine):
    made = setup.actor(name, engine)

    async def speak(moment):
      counted.append((dict(device.compilations()), told.getvalue()))
      return await made.speak(moment)

    return dataclasses.replace(made, speak=speak)

  tiny_run.train(
      tmp_path / "run",
      dataclasses.replace(setup, actor=actor),
      config={"seed": setup.seed},
      stream=told,
  )
  assert counted[0][0] == device.compilations()  # no turn compiled anything
  for name in setup.policies:
    assert f"warm-up: {name}, 1 of " in counted[0][1]


def broken_ratio(logprobs, old_logprobs, mask):
  return (logprobs - old_logprobs) * np.nan * mask


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(tmp_path):
  setup = small()
  loss = dataclasses.replace(setup.method.policy_loss, ratio=broken_ratio)
  method = dataclasses.replace(setup.method, policy_loss=loss)
  with (
      jax.debug_nans(False),
      pytest.raises(NonFiniteError, match="not finite"),
  ):
    train(tmp_path / "run", dataclasses.replace(setup, method=method))
  kept, *_ = (tmp_path / "run/nonfinite").iterdir()
  with np.load(kept) as arrays:
    assert arrays["0/tokens"].dtype == np.int32
