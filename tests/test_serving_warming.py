"""A server that is ready compiles nothing more."""

import asyncio
import json
import threading

import jax
import pytest
from served import HELLO, engine, saying, serve, speaker

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import device
from mgrpo_jax.sampler.engine import EngineError
from mgrpo_jax.serving import warming
from mgrpo_jax.serving.limits import Gate

SIZES = {"num_slots": 6, "decode_steps": 3, "prefill_buckets": (16, 64, 128)}
PROGRAMS = len(SIZES["prefill_buckets"]) + 2
_COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
  """Programs that XLA was given since the test began, whoever wanted them."""
  seen = []

  def listen(event, duration, **_):
    if event == _COMPILED:
      seen.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


def test_the_first_requests_compile_nothing(compiled):
  made, gate, lines = engine(**SIZES), Gate(9), []
  before = sum(device.compilations().values())

  async def run():
    async with made:
      await warming.warm_up(
          gate, {"tiny": made}, deadline=60, tell=lines.append
      )
      ready = len(compiled), sum(device.compilations().values())
      assert ready[1] - before == PROGRAMS <= ready[0]
      sampling = Sampling(temperature=1.0, max_new_tokens=7, stop_ids=())
      # every bucket, several pieces, equal prompts that are copied
      await asyncio.gather(*(
          made.generate(range(4, 4 + length), sampling, seed)
          for length in (2, 17, 65, 140) for seed in (1, 2)
      ))  # fmt: skip
      assert made.stats()["copied"] == 4
      assert (len(compiled), sum(device.compilations().values())) == ready

  asyncio.run(run())
  assert not gate.warming
  assert [line.split(",")[:2] for line in lines[:-1]] == [
      ["warm-up: tiny", f" {done} of {PROGRAMS} programs"]
      for done in range(1, PROGRAMS + 1)
  ]
  assert lines[-1].startswith(f"warm-up: {PROGRAMS} programs compiled in ")


def test_warming_up_changes_nothing():
  sampling = Sampling(temperature=1.0, max_new_tokens=40, stop_ids=())

  async def run(warm):
    async with engine() as made:
      first = asyncio.create_task(made.generate([5, 6, 7], sampling, 3))
      kept = await made.generate([9] * 40, sampling, 4, session="a")
      if warm:
        await made.warm_up(lambda done, total: None)
      stream = [9] * 40 + kept.tokens.tolist() + [8]
      before = made.stats()["prefilled"]
      second = await made.generate(stream, sampling, 5, session="a")
      assert made.stats()["prefilled"] - before == 1
      return [
          one.logprobs.tolist() for one in (await first, kept, second)
      ]  # fmt: skip

  assert asyncio.run(run(warm=True)) == asyncio.run(run(warm=False))


def test_who_comes_too_early_is_told_to_wait():
  with serve(speaker(saying("x"))) as served:
    served.service.gate.warming = True
    status, headers, body = served.ask("GET", "/readyz")
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "warming_up"
    assert served.ask("GET", "/healthz")[0] == 200
    body = {"model": "tiny", "messages": HELLO}
    assert served.ask("POST", "/v1/chat/completions", body)[0] == 503
    served.service.gate.warming = False
    assert served.ask("GET", "/readyz")[0] == 200
    assert served.complete()["choices"][0]["message"]["content"] == "x"


def test_a_warm_up_takes_no_longer_than_it_may(monkeypatch):
  waits, decode = threading.Event(), device.decode

  def slow(*args, **kwargs):
    assert waits.wait(20)
    return decode(*args, **kwargs)

  monkeypatch.setattr(device, "decode", slow)
  gate = Gate(9)

  async def run():
    async with engine() as made:
      try:
        await warming.warm_up(
            gate, {"tiny": made}, deadline=0.1, tell=lambda line: None
        )
      finally:
        waits.set()

  with pytest.raises(TimeoutError, match="0.1 s and got to: nothing"):
    asyncio.run(run())
  assert gate.warming


def test_a_device_that_fails_is_not_ready(monkeypatch):
  def broken(*args, **kwargs):
    raise MemoryError("no room")

  monkeypatch.setattr(device, "prefill", broken)
  gate, lines = Gate(9), []

  async def run():
    async with engine() as made:
      with pytest.raises(EngineError, match="no room"):
        await warming.warm_up(
            gate, {"tiny": made}, deadline=60, tell=lines.append
        )
      with pytest.raises(EngineError, match="no room"):
        await made.generate(
            [5], Sampling(temperature=0, max_new_tokens=1, stop_ids=()), 0
        )

  asyncio.run(run())
  assert gate.warming and len(lines) == 1  # the program before it


def test_an_engine_that_does_not_run_cannot_warm_up():
  with pytest.raises(EngineError, match="not running"):
    asyncio.run(engine().warm_up(lambda done, total: None))
