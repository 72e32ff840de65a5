"""An engine over several processes, and what it says of those it loses."""

import asyncio
import concurrent.futures
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import followed
import jax
import numpy as np
import pytest

from mgrpo_jax import sharding
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sampler.follower import Follower
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.sampler.links import Crew, Link

SCRIPT = pathlib.Path(followed.__file__)


def spawn(number, address):
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(SCRIPT.parents[1]),
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  return subprocess.Popen(
      [sys.executable, SCRIPT, address, str(number)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def free_address():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def heard(process):
  """The next line that is JSON; collectives print others."""
  for line in process.stdout:
    if line.startswith("{"):
      return json.loads(line)
  raise AssertionError(f"it ended: {process.stderr.read()[-3000:]}")


def same(wanted, actual):
  """Tokens are equal, log-probabilities but for the order of sums."""
  for one, other in zip(wanted, actual, strict=True):
    for (tokens, scores), (others, found) in zip(one, other, strict=True):
      assert tokens == others
      np.testing.assert_allclose(found, scores, atol=1e-5)


def test_two_processes_draw_what_one_draws_and_notice_a_death():
  address = free_address()
  processes = [spawn(number, address) for number in (0, 1)]
  watchdog = threading.Timer(
      900, lambda: [process.kill() for process in processes]
  )
  watchdog.start()
  try:
    leader, other = processes
    told = heard(leader)
    heard(leader)  # it leads again
    assert heard(other) == {"visits": told["visits"]}
    leader.send_signal(signal.SIGKILL)
    out, err = other.communicate(timeout=300)
    assert other.returncode != 0
    # Whichever of the two is first to see it.
    fatal = "JAX distributed service detected fatal errors"
    assert "process 0 is gone" in out or fatal in err
  finally:
    watchdog.cancel()
    for process in processes:
      process.kill()
      process.communicate()
  engine = Engine(
      followed.CONFIG,
      followed.weights(0),
      0,
      mesh=followed.mesh(jax.devices()[:4]),
      **followed.SIZES,
  )
  alone = asyncio.run(followed.led(engine))
  same(alone["before"], told["before"])
  same(alone["after"], told["after"])
  assert told["middle"] == {
      "versions": [0, 1], "length": 40, "cancelled": True,
  }  # fmt: skip


def both(monkeypatch, *, version=0, **changes):
  """An engine and a follower in one process, on a device that they share.

  Nothing is exchanged between devices then, so each computes all of it.

  Returns:
    The engine, the follower made in a thread as `made()` gives it, the crew.
  """
  monkeypatch.setattr(sharding, "spans_processes", lambda mesh: True)
  mesh = followed.mesh(jax.devices()[:1])
  near, far = socket.socketpair()
  link = Link(far, peer="process 0", deadline=followed.LOST)
  crew = Crew(
      [Link(near, peer="process 1", deadline=followed.LOST)],
      deadline=followed.LOST,
  )
  pool = concurrent.futures.ThreadPoolExecutor(1)
  made = pool.submit(
      lambda: Follower(
          followed.CONFIG, followed.weights(version), 0, mesh=mesh, link=link,
          **followed.SIZES | changes,
      )  # fmt: skip
  )
  lead = functools.partial(
      Engine, followed.CONFIG, followed.weights(0), 0, mesh=mesh, crew=crew,
      **followed.SIZES,
  )  # fmt: skip
  return lead, made, pool


def test_a_follower_has_the_same_cache_bit_for_bit(monkeypatch):
  lead, made, pool = both(monkeypatch)
  engine = lead()
  follower = made.result()
  following = pool.submit(follower.follow, followed.weights)
  told = asyncio.run(followed.led(engine))
  assert following.result() == told["visits"]
  assert told["middle"]["versions"] == [0, 1]
  left, right = engine._resident._resident, follower._resident
  caches = [jax.tree.leaves(one._cache) for one in (left, right)]
  assert sum(np.abs(block).sum() for block in caches[0]) > 0
  for one, other in zip(*caches, strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"num_slots": 5}, "num_slots is 5, in process 0 4"),
        ({"decode_steps": 3}, "decode_steps is 3, in process 0 4"),
        ({"version": 1}, "weights is "),
    ],
)
def test_a_follower_of_another_kind_is_refused(monkeypatch, changes, hint):
  lead, made, _ = both(monkeypatch, **changes)
  with pytest.raises(EngineError, match=f"process 1 failed: {hint}"):
    lead()
  with pytest.raises(EngineError, match=f"cannot follow process 0: {hint}"):
    made.result()


def test_weights_that_differ_end_the_engine_and_its_follower(monkeypatch):
  lead, made, pool = both(monkeypatch)
  engine = lead()
  following = pool.submit(made.result().follow, lambda v: followed.weights(7))

  async def run():
    async with engine:
      engine.update(followed.weights(1), 1)
      await followed.answers(engine)

  with pytest.raises(EngineError, match="process 1 failed: digest is"):
    asyncio.run(run())
  with pytest.raises(EngineError, match="cannot follow process 0: digest is"):
    following.result()


def test_a_follower_learns_that_the_engine_has_failed(monkeypatch):
  lead, made, pool = both(monkeypatch)
  engine = lead()
  following = pool.submit(made.result().follow, followed.weights)

  def broken(visit, drawn):
    raise FloatingPointError("not finite")

  monkeypatch.setattr(engine._schedule, "absorb", broken)

  async def run():
    async with engine:
      await followed.answers(engine)

  with pytest.raises(EngineError, match="not finite"):
    asyncio.run(run())
  with pytest.raises(EngineError, match="process 0 failed: not finite"):
    following.result()


def test_a_crew_is_for_several_processes_and_they_need_one(monkeypatch):
  mesh = followed.mesh(jax.devices()[:1])
  make = functools.partial(
      Engine, followed.CONFIG, followed.weights(0), 0, mesh=mesh,
      **followed.SIZES,
  )  # fmt: skip
  crew = Crew([], deadline=1.0)
  with pytest.raises(ValueError, match="crew: an engine has one if, and only"):
    make(crew=crew)
  monkeypatch.setattr(sharding, "spans_processes", lambda mesh: True)
  with pytest.raises(ValueError, match="crew: an engine has one if, and only"):
    make()
  crew.close()
