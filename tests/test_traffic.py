"""Many agent calls at once on a real engine: nothing is lost or left behind."""

import asyncio
import dataclasses
import functools

import jax
import numpy as np
import pytest

from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.agents.protocol import Action, answer
from mgrpo_jax.policy import params
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.generate import complete, replaying
from mgrpo_jax.testing.sizes import tiny_config
from mgrpo_jax.testing.team import (
    chat_of,
    environment,
    small_team,
    small_tools,
    tokenizer,
)
from mgrpo_jax.testing.traffic import Traffic, Trouble

TEAM = small_team(max_turns=4, max_context=150, max_new_tokens=30)
CHAT = chat_of(COMPACT, TEAM)
ACTIONS = {
    "main": (
        Action(kind="call", name="researcher", arguments={"request": "Peru"}),
        Action(kind="call", name="researcher", arguments={"request": "Chad"}),
        answer("Lima"),
    ),
    "researcher": (
        Action(kind="tool", name="search", arguments={"query": "Peru"}),
        Action(kind="tool", name="calculate", arguments={"expression": "1+1"}),
        answer("Lima"),
    ),
}
NUM = 120  # rollouts at once
BRIEF = 8  # tokens a turn that are really sampled
TROUBLE = Trouble(
    tool_seconds=0.01,
    tool_breaks=0.15,
    tool_hangs=0.15,
    turn_breaks=0.12,
    leaves=0.2,
    leave_seconds=0.3,
)


def make():
  config = tiny_config(vocab_size=tokenizer(TEAM).vocab_size)
  return Engine(
      config,
      jax.jit(params.init, static_argnums=1)(jax.random.key(0), config),
      0,
      num_slots=24,
      context=160,
      block=32,
      prefill_tokens=256,
      prefill_buckets=(32, 128),
      decode_steps=8,
      decode_rows=2,
  )


def speaking(engine, role):
  """Samples from the engine, then says what a script drew instead.

  The engine has all the work, and a stream that is never what it cached; what
  is said makes calls and runs tools, as noise would not.
  """

  async def generate(tokens, sampling, seed, *, session):
    brief = dataclasses.replace(sampling, max_new_tokens=BRIEF)
    await engine.generate(tokens, brief, seed, session=session)
    rng = np.random.default_rng(seed)
    action = ACTIONS[role][rng.integers(len(ACTIONS[role]))]
    ids = CHAT.write(COMPACT.render(action))
    return complete(ids, sampling, seed=seed, version=0)

  return generate


def world(engine) -> Environment:
  return environment(
      {role: speaking(engine, role) for role in ACTIONS},
      team=TEAM,
      protocol=COMPACT,
      tools={
          name: dataclasses.replace(tool, deadline=1.0)
          for name, tool in small_tools().items()
      },
      turn_deadline=120.0,
      release=engine.release,
  )


async def settled(engine):
  for _ in range(400):
    stats = engine.stats()
    if stats["slots"]["free"] == 24 and stats["requests"] == 0:
      return stats
    await asyncio.sleep(0.01)
  raise AssertionError(engine.stats())


@functools.cache
def after(number):
  """Traffic of so many rollouts, and the engine's statistics at the end."""

  async def run():
    async with make() as engine:
      traffic = Traffic(world(engine), TROUBLE, seed=1)
      await traffic.send([corpus.task()] * number, seed=0)
      return traffic, await settled(engine)

  return asyncio.run(run())


def test_nothing_is_lost_and_no_slot_is_left():
  traffic, stats = after(NUM)
  assert traffic.losses() == []
  assert traffic.rollouts.total() == NUM
  assert traffic.requests["asked"] > 2 * NUM
  assert stats["cancelled"] > 0


def test_every_kind_of_trouble_was_met():
  """Else the test above would say little."""
  traffic, stats = after(NUM)
  counters = traffic.environment.counters
  for name in ("COMPLETED", "FAILED", "TRUNCATED", "cancelled"):
    assert traffic.rollouts[name] > 0, name
  for name in ("answered", "broken", "cancelled"):
    assert traffic.requests[name] > 0, name
  for name in ("retries", "failed", "tool_timeouts"):
    assert counters[name] > 0, name
  assert stats["evictions"] > 0  # more sessions than slots


def test_losses_are_seen():
  done = replaying([CHAT.write(COMPACT.render(answer("Lima")))])
  calm = environment(dict.fromkeys(ACTIONS, done), team=TEAM, protocol=COMPACT)
  traffic = Traffic(calm, TROUBLE, seed=0)
  assert traffic.losses() == []
  traffic.requests["asked"] += 1
  assert traffic.losses() == ["1 turns asked for, 0 ended"]
  traffic.environment.counters["calls"] += 1
  assert "1 calls begun, 0 ended" in traffic.losses()
  with traffic.environment.activity.waiting("t", 0, ("main",), "tool 'x'"):
    assert "1 calls wait" in traffic.losses()


def test_time_is_busy_idle_or_nobodys():
  async def run():
    async with make() as engine:
      loop = asyncio.get_running_loop()
      began = loop.time()
      await Traffic(world(engine), TROUBLE, seed=1).send(
          [corpus.task()] * 20, seed=0
      )
      spent, seconds = loop.time() - began, engine.stats()["seconds"]
      assert 0 < seconds["busy"] and 0 < seconds["idle"]
      assert sum(seconds.values()) <= spent * 1.01
      await asyncio.sleep(0.3)  # nothing to do
      assert engine.stats()["seconds"] == pytest.approx(seconds, abs=0.1)

  asyncio.run(run())
