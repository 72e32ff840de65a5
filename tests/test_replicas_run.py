"""Runs that samplers of other processes help: same tokens, same parameters."""

import asyncio
import contextlib
import dataclasses
import io
import threading
import time

import pytest
import replicated
from commands import SMOKE, command, refused
from delegating import delegating_setup
from tiny_run import digest
from tiny_run import train as train_here

from mgrpo_jax import store
from mgrpo_jax.report.writer import read_metrics
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.testing.setup import CONTEXT

SIZES = {"seed": 7, "imitation_steps": 1, "steps": 4}


def with_pools(setup):
  def pooled(name, engine, bucket):
    return replicated.pool(
        engine, bucket, name, slots=18, context=CONTEXT,
        vocab_size=setup.policies[name].config.vocab_size,
    )  # fmt: skip

  return dataclasses.replace(setup, pooled=pooled, whole_every=2)


@contextlib.contextmanager
def helping(directory, setup, *, seconds=0.0):
  """Replicas of all policies, in a thread.

  With `seconds` there are new ones after so many, but not before they had work:
  on a crowded machine that takes longer.
  """
  over, lives = threading.Event(), []

  async def life(name):
    bucket, policy = (
        store.open_folder(directory / "bucket"),
        setup.policies[name],
    )
    while not over.is_set():
      engine = Engine(policy.config, policy.params, 0, **setup.sampler.engine)
      async with replicated.replica(bucket, name, engine, policy, slots=18):
        began = time.monotonic()
        lives.append(name)
        while not over.is_set():
          await asyncio.sleep(0.02)
          worked = engine.stats()["generated"] > 0
          if seconds and worked and time.monotonic() > began + seconds:
            break

  async def live():
    await asyncio.gather(*(life(name) for name in setup.policies))

  thread = threading.Thread(target=lambda: asyncio.run(live()))
  thread.start()
  try:
    yield lives
  finally:
    over.set()
    thread.join()


def outcome(directory, setup):
  summary = train_here(directory, setup, config={}, stream=io.StringIO())
  rows = read_metrics(directory / "metrics.jsonl")
  return summary["tokens"], [row["reward/main"] for row in rows], rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  directory = tmp_path_factory.mktemp("alone")
  return outcome(directory, delegating_setup(**SIZES)), digest(directory)


def test_a_helped_run_ends_with_the_very_parameters(tmp_path, alone):
  setup = delegating_setup(**SIZES)
  with helping(tmp_path, setup):
    helped = outcome(tmp_path, with_pools(setup))
  (tokens, rewards, _), same = alone
  assert helped[:2] == (tokens, rewards)
  assert digest(tmp_path) == same
  for name in setup.policies:
    assert sum(row[f"replica_tokens/{name}"] for row in helped[2]) > 0
  assert max(row["replicas/main"] for row in helped[2]) == 1


def test_replicas_may_come_and_go(tmp_path, alone):
  setup = delegating_setup(**SIZES)
  with helping(tmp_path, setup, seconds=0.5) as lives:
    helped = outcome(tmp_path, with_pools(setup))
  tokens, rewards, _ = alone[0]
  assert helped[:2] == (tokens, rewards)
  assert len(lives) >= 2 * len(setup.policies)
  assert sum(row["replica_tokens/main"] for row in helped[2]) > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "--bucket: must be"),
        (("--bucket=file:///b",), "rollout.replicas: False"),
        (
            ("--bucket=file:///b", "--config.rollout.replicas=True",
             "--policy=nobody"),
            "'nobody', allowed: main, researcher",
        ),
        (
            ("--bucket=file:///b", "--config.rollout.replicas=True",
             "--listen=0.0.0.0"),
            "needs a token",
        ),
    ],
)  # fmt: skip
def test_wrong_flags_end_with_one_line(arguments, told):
  ended = command("replica", SMOKE, "--policy=main", *arguments)
  assert told in refused(ended)


def test_a_run_without_a_bucket_cannot_be_helped(tmp_path):
  result = command(
      "train",
      SMOKE,
      f"--workdir={tmp_path / 'run'}",
      "--config.rollout.replicas=True",
  )
  assert result.returncode == 2
  assert "True needs --bucket" in result.stderr


def test_a_replica_of_another_config_is_refused(tmp_path):
  from mgrpo_jax import ownership

  bucket = store.open_folder(tmp_path / "bucket")
  ownership.claim(bucket, "the-run", {"seed": 0}, jobs=False)
  one = replicated.command(
      tmp_path, f"--bucket={(tmp_path / 'bucket').as_uri()}",
      "--config.rollout.replicas=True", "--policy=main",
  )  # fmt: skip
  assert one.wait(120) == 2
  assert "with another config" in (tmp_path / "replica.log").read_text()
