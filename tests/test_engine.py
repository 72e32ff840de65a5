"""The engine under traffic: same bits, no leaks, nobody waits for ever."""

import asyncio
import dataclasses
import functools
import threading
import time

import jax
import numpy as np
import pytest
from compiled import needs_compiler

from mgrpo_jax.policy import logprobs, params
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.policy.native import streams
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import device
from mgrpo_jax.sampler import engine as engine_module
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.testing.sizes import tiny_config

CONTEXT = 64
STOP = 3
CONFIG = tiny_config(num_heads=4, num_kv_heads=2, head_dim=4)
NATIVE = dataclasses.replace(
    CONFIG,
    execution=Execution(kernels="tiled", decode_attention=streams.ATTENTION),
)
either = pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="xla"),
        pytest.param(NATIVE, id="native", marks=needs_compiler),
    ],
)


@functools.cache
def weights(seed=0, config=CONFIG):
  init = jax.jit(params.init, static_argnums=1)
  # large enough that what a token attends to matters
  return jax.tree.map(
      lambda x: 2 * np.asarray(x), init(jax.random.key(seed), config)
  )


def make(num_slots=8, version=0, config=CONFIG, **sizes):
  return Engine(
      config, weights(0, config), version, num_slots=num_slots, context=CONTEXT,
      **{"block": 16, "prefill_tokens": 32, "prefill_buckets": (4, 16),
         "decode_steps": 4, "decode_rows": min(3, num_slots)}
      | sizes,
  )  # fmt: skip


def draw(limit=10, temperature=1.0, stop_ids=(STOP,), **filters):
  return Sampling(
      temperature=temperature, max_new_tokens=limit, stop_ids=stop_ids,
      **filters,
  )  # fmt: skip


def prompt(seed, length):
  return np.random.default_rng(seed).integers(4, 61, length).tolist()


async def converse(engine, number, turns=3, pause=None):
  """Turns of one agent, with tool results between: all it was told."""
  rng = np.random.default_rng(number)
  tokens = rng.integers(4, 61, rng.integers(1, 20)).tolist()
  told = []
  for turn in range(turns):
    completion = await engine.generate(
        tokens, draw(int(rng.integers(1, 10))), 1000 * number + turn,
        session=str(number),
    )  # fmt: skip
    told.append((completion.tokens.tolist(), completion.logprobs.tolist()))
    tokens = tokens + told[-1][0]
    tokens += rng.integers(4, 61, rng.integers(1, 8)).tolist()
    if pause is not None:
      await asyncio.sleep(pause.random() * 0.01)
  engine.release(str(number))
  return told


@functools.cache
def alone(number, config=CONFIG):
  """What a conversation yields when nothing else goes on."""

  async def run():
    async with make(config=config) as engine:
      return await converse(engine, number)

  return asyncio.run(run())


def everything_is_free(engine):
  stats = engine.stats()
  num_slots = sum(stats["slots"].values())
  return stats["slots"]["free"] == num_slots and stats["requests"] == 0


async def settled(engine):
  """Waits until cancelled requests have left their slots."""
  for _ in range(200):
    if everything_is_free(engine):
      return
    await asyncio.sleep(0.01)
  raise AssertionError(engine.stats())


def test_logprobs_are_the_trainers():
  async def run():
    async with make() as engine:
      stream, mask, got = prompt(0, 21), [0] * 21, [0.0] * 21
      for turn in range(3):
        completion = await engine.generate(
            stream, draw(temperature=0.7), turn, session="a"
        )
        tool = prompt(turn + 1, 5)
        stream = stream + completion.tokens.tolist() + tool
        mask += [1] * len(completion.tokens) + [0] * 5
        got += completion.logprobs.tolist() + [0.0] * 5
      return stream, np.asarray(mask, bool), np.asarray(got)

  stream, mask, got = asyncio.run(run())
  tokens = np.zeros((1, CONTEXT + 16), np.int32)
  tokens[0, : len(stream)] = stream
  segments = (np.arange(CONTEXT + 16) < len(stream)).astype(np.int32)[None]
  score = jax.jit(
      logprobs.token_logprobs, static_argnames=("config", "temperature")
  )
  expected = np.asarray(
      score(
          weights(), tokens, np.arange(CONTEXT + 16, dtype=np.int32)[None],
          segments, config=CONFIG, temperature=0.7,
      )  # fmt: skip
  )[0, : len(stream)]
  assert mask.sum() > 10
  np.testing.assert_allclose(got[mask], expected[mask], atol=1e-4)


@either
@pytest.mark.parametrize("seed", range(3))
def test_traffic_changes_no_bit(seed, config):
  rng = np.random.default_rng(seed)

  async def observe(engine, results, number):
    await asyncio.sleep(rng.random() * 0.05)
    results[number] = await converse(engine, number, pause=rng)

  async def disturb(engine, numbers):
    for number in numbers:
      task = asyncio.create_task(converse(engine, number, pause=rng))
      await asyncio.sleep(rng.random() * 0.01)
      task.cancel()  # whether it is waiting, being sampled, or done
      await asyncio.gather(task, return_exceptions=True)
      engine.release(str(number))

  async def run():
    results = {}
    async with make(config=config) as engine:
      jobs = [observe(engine, results, number) for number in (1, 2, 3)]
      jobs += [
          disturb(engine, range(first, first + 4))
          for first in range(100, 150, 10)
      ]
      await asyncio.gather(*(jobs[i] for i in rng.permutation(len(jobs))))
      await settled(engine)
      stats = engine.stats()
    assert stats["evictions"] == 0 and stats["cancelled"] > 0
    return results

  expected = {number: alone(number, config) for number in (1, 2, 3)}
  assert asyncio.run(run()) == expected


def test_sessions_change_at_most_the_last_place():
  """Turn by turn and all at once: the same to float tolerance."""

  async def run():
    async with make() as engine:
      told = await converse(engine, 5)
      rng = np.random.default_rng(5)
      tokens = rng.integers(4, 61, rng.integers(1, 20)).tolist()
      for turn, (sampled, expected) in enumerate(told):
        completion = await engine.generate(
            tokens, draw(int(rng.integers(1, 10))), 5000 + turn
        )
        assert completion.tokens.tolist() == sampled
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        tokens = (
            tokens + sampled + rng.integers(4, 61, rng.integers(1, 8)).tolist()
        )

  asyncio.run(run())


def test_equal_prompts_are_prefilled_once():
  async def run():
    async with make() as engine:
      shared = await asyncio.gather(
          *(engine.generate(prompt(1, 30), draw(), seed) for seed in range(6))
      )
      stats = engine.stats()
      assert (stats["prefilled"], stats["copied"]) == (29, 5)
    single = []
    for seed in range(6):
      async with make() as engine:
        single.append(await engine.generate(prompt(1, 30), draw(), seed))
    for one, other in zip(shared, single, strict=True):
      assert one.tokens.tolist() == other.tokens.tolist()
      assert one.logprobs.tolist() == other.logprobs.tolist()
    assert len({tuple(one.tokens.tolist()) for one in shared}) > 1

  asyncio.run(run())


def test_a_slot_that_was_used_again_is_not_copied():
  async def run():
    async with make(num_slots=2) as engine:
      first = await engine.generate(prompt(1, 30), draw(), 0)
      await asyncio.gather(
          *(engine.generate(prompt(n, 30), draw(), 0) for n in (2, 3))
      )
      again = await engine.generate(prompt(1, 30), draw(), 0)
      assert engine.stats()["copied"] == 0
      assert again.logprobs.tolist() == first.logprobs.tolist()
      pair = await asyncio.gather(
          *(engine.generate(prompt(4, 30), draw(), 0) for _ in range(2))
      )
      assert engine.stats()["copied"] == 1
      assert pair[0].logprobs.tolist() == pair[1].logprobs.tolist()

  asyncio.run(run())


MIXED = [
    draw(20, 1.0, ()),
    draw(20, 0.7, (), top_k=5),
    draw(20, 1.3, (), top_p=0.6),
    draw(20, 1.0, (), min_p=0.1),
    draw(20, 0.0, ()),
    draw(20, 1.0, (), top_k=9, top_p=0.9, min_p=0.01),
]


def told(completion):
  return (
      completion.tokens.tolist(),
      completion.logprobs.tolist(),
      completion.raw_logprobs.tolist(),
  )


@functools.cache
def each_alone(decode_rows, config=CONFIG):
  async def run():
    single = []
    for number, sampling in enumerate(MIXED):
      async with make(decode_rows=decode_rows, config=config) as engine:
        single.append(
            told(await engine.generate(prompt(number, 9), sampling, number))
        )
    return single

  return asyncio.run(run())


@either
@pytest.mark.parametrize("decode_rows", [0, 3])
@pytest.mark.parametrize("cancelled", [False, True])
def test_same_seed_same_tokens_however_neighbours_are_drawn(
    decode_rows, cancelled, config
):
  async def run():
    async with make(decode_rows=decode_rows, config=config) as engine:
      loop = asyncio.get_running_loop()
      others = [
          loop.create_task(engine.generate(prompt(90 + n, 5), draw(50), n))
          for n in range(2 * cancelled)
      ]
      crowd = [
          loop.create_task(engine.generate(prompt(n, 9), sampling, n))
          for n, sampling in enumerate(MIXED)
      ]
      while cancelled and engine.stats()["visits"] < 2:
        await asyncio.sleep(0)
      for other in others:
        other.cancel()
      together = [told(one) for one in await asyncio.gather(*crowd)]
      await settled(engine)
      return together

  assert asyncio.run(run()) == each_alone(decode_rows, config)


def test_raw_logprobs_are_the_models_own():
  for sampling, (_, logp, raw) in zip(MIXED, each_alone(3), strict=True):
    plain = sampling.temperature in (0, 1) and sampling == draw(
        20, sampling.temperature, ()
    )
    assert (logp == raw) == plain
  tokens, _, raw = each_alone(3)[2]
  stream = np.asarray(prompt(2, 9) + tokens, np.int32)[None]
  score = jax.jit(
      logprobs.token_logprobs, static_argnames=("config", "temperature")
  )
  expected = score(
      weights(), stream, np.arange(stream.shape[1], dtype=np.int32)[None],
      np.ones_like(stream), config=CONFIG, temperature=1.0,
  )  # fmt: skip
  np.testing.assert_allclose(raw, np.asarray(expected)[0, 9:], atol=1e-4)


def test_who_waits_is_served_when_a_caller_has_named_the_last_token():
  """All slots wait for their callers then, and so does the worker."""

  async def run():
    async with make(num_slots=2) as engine:
      served = [
          engine.generate(
              prompt(n, 9), draw(4, stop_ids=()), n, until=lambda _: False
          )
          for n in range(7)
      ]
      return await asyncio.wait_for(asyncio.gather(*served), 60)

  assert [len(one.tokens) for one in asyncio.run(run())] == [4] * 7


@pytest.mark.parametrize("decode_steps", [1, 4, 7])
def test_a_caller_may_name_the_last_token(decode_steps):
  async def run():
    async with make(decode_steps=decode_steps) as engine:
      free = await engine.generate(prompt(2, 9), draw(12, stop_ids=()), 0)
      heard, shown = [], []

      def until(token):
        heard.append(token)
        return len(heard) == 6

      cut = await engine.generate(
          prompt(2, 9), draw(12, stop_ids=()), 0, session="a", until=until,
          on_tokens=lambda tokens, _: shown.extend(tokens),
      )  # fmt: skip
      assert cut.finish == "stop"
      assert cut.tokens.tolist() == free.tokens[:6].tolist() == heard == shown
      assert cut.logprobs.tolist() == free.logprobs[:6].tolist()
      # The session goes on from there, as if nothing had been drawn beyond.
      stream = prompt(2, 9) + cut.tokens.tolist() + [5, 6]
      before = engine.stats()["prefilled"]
      on = await engine.generate(stream, draw(stop_ids=()), 1, session="a")
      assert engine.stats()["prefilled"] - before == 2
      assert engine.stats()["mismatches"] == 0
    async with make(decode_steps=decode_steps) as engine:
      limit = draw(6, stop_ids=())
      await engine.generate(prompt(2, 9), limit, 0, session="a")
      same = await engine.generate(stream, draw(stop_ids=()), 1, session="a")
    assert told(on) == told(same)

  asyncio.run(run())


def test_a_caller_may_name_the_last_token_late():
  """The device has drawn more, or all that was asked for, by then."""

  async def run(seconds):
    async with make(decode_steps=2) as engine:
      heard = []

      def until(token):
        heard.append(token)
        time.sleep(seconds)
        return len(heard) == 5

      cut = await engine.generate(
          prompt(2, 9), draw(12, stop_ids=()), 0, session="a", until=until
      )
      assert len(heard) == 5
      stream = prompt(2, 9) + cut.tokens.tolist() + [5, 6]
      on = await engine.generate(stream, draw(stop_ids=()), 1, session="a")
      assert engine.stats()["mismatches"] == 0
      drawn = engine.stats()["generated"]
      await settled_but_for(engine, "a")
    return told(cut), cut.version_max, told(on), drawn

  prompt_told, late_told = asyncio.run(run(0.0)), asyncio.run(run(0.05))
  assert late_told[:3] == prompt_told[:3]
  assert late_told[3] > 5 + len(late_told[2][0]) + 1  # it went on meanwhile


async def settled_but_for(engine, session):
  engine.release(session)
  await settled(engine)


def test_the_device_does_not_wait_for_callers():
  async def run():
    visits = []

    def dawdle(tokens, logprobs):
      if not visits:
        before = engine.stats()["visits"]
        time.sleep(0.5)  # the whole event loop
        visits.append(engine.stats()["visits"] - before)

    async with make() as engine:
      await engine.generate(prompt(1, 5), draw(), 0)  # compiled
      await engine.generate(
          prompt(1, 5), draw(50, stop_ids=()), 0, on_tokens=dawdle
      )
      assert visits[0] > 5
      await settled(engine)

  asyncio.run(run())


def test_a_device_that_never_comes_back_is_left(monkeypatch):
  forever = threading.Event()

  async def run():
    engine = make()
    with pytest.raises(EngineError, match="not come back from a visit"):
      async with engine:
        await engine.generate(prompt(1, 5), draw(), 0)
        monkeypatch.setattr(device, "decode", lambda *_, **__: forever.wait())
        waiting = asyncio.create_task(engine.generate(prompt(1, 5), draw(), 0))
        await asyncio.sleep(0.05)
    with pytest.raises(EngineError, match="not come back"):
      await waiting
    with pytest.raises(EngineError, match="not come back"):
      await engine.generate(prompt(1, 5), draw(), 0)
    with pytest.raises(EngineError, match="not come back"):
      await engine.__aenter__()

  monkeypatch.setattr(engine_module, "_CLOSING", 0.1)
  try:
    asyncio.run(run())
  finally:
    forever.set()


@pytest.mark.parametrize("limit", [3, 9], ids=["drawn", "named"])
def test_what_was_drawn_before_the_device_hung_is_told(monkeypatch, limit):
  hung, forever = threading.Event(), threading.Event()
  visits, decode = [], device.decode

  def hang_in_third(*arguments, **options):
    visits.append(len(visits))
    if len(visits) == 3:  # of the second nobody was told yet
      hung.set()
      forever.wait()
    return decode(*arguments, **options)

  def asked(engine):
    heard = []
    return engine.generate(
        prompt(1, 5), draw(limit, stop_ids=()), 0,
        until=None if limit == 3 else lambda _: heard.append(0) or heard[2:],
    )  # fmt: skip

  async def run():
    engine = make(decode_steps=2)
    with pytest.raises(EngineError, match="not come back from a visit"):
      async with engine:
        expected = await asked(engine)
        await settled(engine)
        monkeypatch.setattr(device, "decode", hang_in_third)
        more = engine.generate(prompt(2, 9), draw(20, stop_ids=()), 0)
        both = asyncio.gather(asked(engine), more, return_exceptions=True)
        assert await asyncio.to_thread(hung.wait, 60)
    told, lost = await asyncio.wait_for(both, 60)
    assert len(expected.tokens) == 3
    assert told.tokens.tolist() == expected.tokens.tolist()
    assert told.logprobs.tolist() == expected.logprobs.tolist()
    assert "not come back" in str(lost)
    assert everything_is_free(engine)

  monkeypatch.setattr(engine_module, "_CLOSING", 0.1)
  try:
    asyncio.run(run())
  finally:
    forever.set()


def test_an_engine_left_in_haste_is_not_entered_again(monkeypatch):
  forever = threading.Event()

  async def run():
    engine = await make().__aenter__()
    await engine.generate(prompt(1, 5), draw(), 0)
    monkeypatch.setattr(device, "decode", lambda *_, **__: forever.wait())
    waiting = asyncio.create_task(engine.generate(prompt(1, 5), draw(), 0))
    await asyncio.sleep(0.05)
    leaving = asyncio.create_task(engine.__aexit__(None, None, None))
    await asyncio.sleep(0.05)
    leaving.cancel()  # as by a second Ctrl-C
    with pytest.raises(asyncio.CancelledError):
      await leaving
    with pytest.raises(EngineError, match="not come back"):
      await waiting
    with pytest.raises(EngineError, match="not come back"):
      await engine.__aenter__()

  try:
    asyncio.run(run())
  finally:
    forever.set()


def test_completions_say_why_they_ended():
  async def run():
    async with make() as engine:
      free = await engine.generate(prompt(2, 9), draw(12, stop_ids=()), 0)
      assert (free.finish, len(free.tokens)) == ("length", 12)
      assert (free.version_min, free.version_max) == (0, 0)
      stop = int(free.tokens[6])
      first = free.tokens.tolist().index(stop)
      stopped = await engine.generate(
          prompt(2, 9), draw(12, stop_ids=(60, stop)), 0
      )
      assert stopped.finish == "stop"
      assert stopped.tokens.tolist() == free.tokens[: first + 1].tolist()
      assert stopped.logprobs.tolist() == free.logprobs[: first + 1].tolist()
      assert stopped.tokens.dtype == np.int32
      assert stopped.logprobs.dtype == np.float32
      for length in (CONTEXT - 1, CONTEXT - 5, CONTEXT - 12):
        full = await engine.generate(
            prompt(3, length), draw(12, stop_ids=()), 0
        )
        assert full.finish == "context"
        assert len(full.tokens) == CONTEXT - length
      none = await engine.generate(prompt(3, CONTEXT), draw(), 0)
      assert (none.finish, len(none.tokens)) == ("context", 0)
      await settled(engine)

  asyncio.run(run())


@pytest.mark.parametrize(
    "tokens, seed, message",
    [
        ([5] * (CONTEXT + 1), 0, "1 to 64"),
        ([], 0, "1 to 64"),
        ([[5]], 0, "shape"),
        ([61], 0, "0..60"),
        ([-1], 0, "0..60"),
        ([2**40], 0, "0..60"),
        ([5], -1, "seed"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(tokens, seed, message):
  async def run():
    async with make() as engine:
      with pytest.raises(ValueError, match=message):
        await engine.generate(tokens, draw(), seed)
      assert engine.stats()["visits"] == 0

  asyncio.run(run())


@pytest.mark.parametrize(
    "name",
    [
        "num_slots",
        "block",
        "prefill_tokens",
        "prefill_buckets",
        "decode_steps",
    ],
)
def test_sizes_are_positive(name):
  value = (0, 4) if name == "prefill_buckets" else 0
  with pytest.raises(ValueError, match=name):
    make(**{name: value})


def test_a_session_has_one_request_at_a_time():
  async def run():
    async with make() as engine:
      first = asyncio.create_task(
          engine.generate(prompt(1, 5), draw(), 0, session="a")
      )
      await asyncio.sleep(0)
      with pytest.raises(ValueError, match="under way"):
        await engine.generate(prompt(1, 5), draw(), 0, session="a")
      await first

  asyncio.run(run())


@pytest.mark.parametrize("seed", range(3))
def test_random_cancellations_leak_no_slot(seed):
  rng = np.random.default_rng(seed)

  async def run():
    async with make(num_slots=2) as engine:
      for _ in range(2):
        tasks = [
            asyncio.create_task(converse(engine, number, pause=rng))
            for number in range(20)
        ]
        for index in rng.permutation(20)[:14]:
          await asyncio.sleep(rng.random() * 0.02)
          tasks[index].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(
            isinstance(result, list | asyncio.CancelledError)
            for result in results
        )
        for number in range(20):
          engine.release(str(number))
        await settled(engine)
      # and every slot can still be used
      await asyncio.gather(
          *(engine.generate(prompt(i, 9), draw(), i) for i in range(9))
      )
      await settled(engine)

  asyncio.run(run())


@pytest.mark.parametrize("waiting", [False, True])
def test_a_session_may_be_released_before_its_request_ends(waiting):
  async def run():
    async with make(num_slots=2) as engine:
      others = [
          asyncio.create_task(
              engine.generate(prompt(2, 5), draw(20, stop_ids=()), seed)
          )
          for seed in range(2 * waiting)
      ]
      await asyncio.sleep(0)
      task = asyncio.create_task(
          engine.generate(prompt(1, 5), draw(), 0, session="a")
      )
      await asyncio.sleep(0.001)
      engine.release("a")
      await asyncio.gather(task, *others)
      await settled(engine)

  asyncio.run(run())


def test_waiting_requests_are_served_in_order():
  async def run():
    order = []

    async def ask(engine, number):
      await engine.generate(prompt(number, 5), draw(5, stop_ids=()), number)
      order.append(number)

    async with make(num_slots=2) as engine:
      await asyncio.gather(*(ask(engine, number) for number in range(6)))
    assert order == list(range(6))

  asyncio.run(run())


def test_idle_sessions_are_evicted_longest_idle_first():
  async def run():
    async with make(num_slots=2) as engine:
      streams = {}
      for name in ("a", "b"):
        told = await engine.generate(prompt(1, 9), draw(), 0, session=name)
        streams[name] = prompt(1, 9) + told.tokens.tolist() + [5, 6]
      await engine.generate(prompt(2, 9), draw(), 0, session="c")
      assert engine.stats()["evictions"] == 1
      before = engine.stats()["prefilled"]
      kept = await engine.generate(streams["b"], draw(), 1, session="b")
      assert engine.stats()["prefilled"] - before == 2
      again = await engine.generate(streams["a"], draw(), 1, session="a")
      assert engine.stats()["evictions"] == 2
      assert again.tokens.tolist() == kept.tokens.tolist()
      np.testing.assert_allclose(again.logprobs, kept.logprobs, atol=1e-4)

  asyncio.run(run())


def test_a_session_that_was_rewritten_is_prefilled_from_there_on():
  long, short = prompt(2, 30), prompt(2, 30)[:11] + [5, 6]

  async def run():
    async with make() as engine:
      await engine.generate(prompt(1, 9), draw(), 0, session="a")
      other = await engine.generate(long, draw(), 7, session="a")
      before = engine.stats()["prefilled"]
      shorter = await engine.generate(short, draw(), 7, session="a")
      assert engine.stats()["prefilled"] - before == 1
      assert engine.stats()["mismatches"] == 2
    async with make() as engine:
      fresh = await engine.generate(long, draw(), 7)
      assert other.logprobs.tolist() == fresh.logprobs.tolist()
      fresh = await engine.generate(short, draw(), 7)
      assert shorter.tokens.tolist() == fresh.tokens.tolist()
      np.testing.assert_allclose(shorter.logprobs, fresh.logprobs, atol=1e-5)

  asyncio.run(run())


def test_new_weights_are_swapped_between_visits():
  async def run():
    async with make() as engine:
      told = await engine.generate(prompt(1, 9), draw(), 0, session="a")
      stream = prompt(1, 9) + told.tokens.tolist() + [5, 6]
      long = asyncio.create_task(
          engine.generate(prompt(3, 9), draw(40, stop_ids=()), 0, session="b")
      )
      while engine.stats()["visits"] < 4:
        await asyncio.sleep(0)
      engine.update(weights(1), 5)
      across = await long
      assert (across.version_min, across.version_max) == (0, 5)
      before = engine.stats()["prefilled"]
      after = await engine.generate(stream, draw(), 1, session="a")
      assert (after.version_min, after.version_max) == (5, 5)
      assert engine.stats()["prefilled"] - before == len(stream) - 1
      # a session that lived through the swap does not keep old cache either
      before = engine.stats()["prefilled"]
      stream_b = prompt(3, 9) + across.tokens.tolist()
      await engine.generate(stream_b, draw(), 1, session="b")
      assert engine.stats()["prefilled"] - before == len(stream_b) - 1
    fresh = Engine(
        CONFIG, weights(1), 5, num_slots=8, context=CONTEXT, block=16,
        prefill_tokens=32, prefill_buckets=(4, 16), decode_steps=4,
        decode_rows=3,
    )  # fmt: skip
    async with fresh:
      expected = await fresh.generate(stream, draw(), 1)
    assert after.tokens.tolist() == expected.tokens.tolist()
    assert after.logprobs.tolist() == expected.logprobs.tolist()

  asyncio.run(run())


def test_other_weights_of_the_same_number_leave_no_cache():
  async def run():
    async with make() as engine:
      long = asyncio.create_task(
          engine.generate(prompt(3, 9), draw(40, stop_ids=()), 0, session="b")
      )
      while engine.stats()["visits"] < 4:
        await asyncio.sleep(0)
      engine.update(weights(1), 0)
      stream = prompt(3, 9) + (await long).tokens.tolist()
      before = engine.stats()["prefilled"]
      await engine.generate(stream, draw(), 1, session="b")
      assert engine.stats()["prefilled"] - before == len(stream) - 1

  asyncio.run(run())


def test_a_failing_device_reaches_everyone(monkeypatch):
  def broken(*args, **kwargs):
    raise MemoryError("no room")

  async def run():
    async with make(num_slots=2) as engine:
      await engine.generate(prompt(1, 5), draw(), 0, session="idle")
      monkeypatch.setattr(device, "decode", broken)
      results = await asyncio.wait_for(
          asyncio.gather(
              *(engine.generate(prompt(i, 5), draw(), i) for i in range(5)),
              return_exceptions=True,
          ),
          timeout=60,
      )
      assert all(isinstance(result, EngineError) for result in results)
      assert all("no room" in str(result) for result in results)
      with pytest.raises(EngineError, match="no room"):
        await engine.generate(prompt(1, 5), draw(), 0)

  asyncio.run(run())


@pytest.mark.parametrize("decode_steps", [1, 4])
def test_listeners_hear_every_token_and_change_none(decode_steps):
  async def run():
    heard = {seed: ([], []) for seed in range(3)}

    def listen(seed):
      def hear(tokens, logprobs):
        assert 1 <= len(tokens) == len(logprobs) <= decode_steps
        heard[seed][0].extend(tokens)
        heard[seed][1].extend(logprobs)

      return hear

    async with make(decode_steps=decode_steps) as engine:
      told = await asyncio.gather(
          *(
              engine.generate(prompt(1, 9), draw(), s, on_tokens=listen(s))
              for s in heard
          )
      )
      deaf = await engine.generate(prompt(1, 9), draw(), 1)
      everything = [
          (one.tokens.tolist(), one.logprobs.tolist()) for one in told
      ]
      assert everything == list(heard.values())
      assert deaf.tokens.tolist() == heard[1][0]
      await settled(engine)

  asyncio.run(run())


def test_listeners_may_cancel_their_call():
  async def run():
    async with make(num_slots=2) as engine:
      heard = []

      def hear(tokens, logprobs):
        heard.extend(tokens)
        task.cancel()

      task = asyncio.create_task(
          engine.generate(
              prompt(1, 5), draw(40, stop_ids=()), 0, on_tokens=hear
          )
      )
      with pytest.raises(asyncio.CancelledError):
        await task
      assert len(heard) == 4
      await settled(engine)
      assert engine.stats()["cancelled"] == 1

  asyncio.run(run())


@pytest.mark.parametrize("listener", ["on_tokens", "until"])
@pytest.mark.parametrize(
    ("mine", "seen"),
    [
        (KeyError, KeyError),
        (asyncio.CancelledError, RuntimeError),
        (StopIteration, RuntimeError),
        (GeneratorExit, RuntimeError),
    ],
)
def test_listeners_that_fail_fail_alone(listener, mine, seen):
  async def run():
    def fail(*drawn):
      raise mine("mine")

    async with make(num_slots=2) as engine:
      bad, good = await asyncio.gather(
          engine.generate(prompt(1, 5), draw(), 0, **{listener: fail}),
          engine.generate(prompt(2, 5), draw(), 0),
          return_exceptions=True,
      )
      assert isinstance(bad, seen) and len(good.tokens)
      await settled(engine)

  asyncio.run(run())


@pytest.mark.parametrize("field", ["logprobs", "raw_logprobs"])
def test_log_probabilities_that_are_not_finite_stop_the_engine(
    monkeypatch, field
):
  decode = device.decode

  def spoilt(*args, **kwargs):
    cache, drawn = decode(*args, **kwargs)
    nan = np.full_like(drawn.logprobs, np.nan)
    return cache, dataclasses.replace(drawn, **{field: nan})

  async def run():
    async with make() as engine:
      engine.update(weights(), 7)
      monkeypatch.setattr(device, "decode", spoilt)
      with pytest.raises(EngineError, match="version 7 are not finite"):
        await engine.generate(prompt(1, 5), draw(), 0)

  asyncio.run(run())


def test_closing_reaches_everyone_and_the_engine_can_be_reopened():
  async def run(engine):
    with pytest.raises(EngineError, match="not running"):
      await engine.generate(prompt(1, 5), draw(), 0)
    async with engine:
      tasks = [
          asyncio.create_task(
              engine.generate(prompt(1, 5), draw(50, stop_ids=()), i)
          )
          for i in range(12)
      ]
      await asyncio.sleep(0.01)
    results = await asyncio.wait_for(
        asyncio.gather(*tasks, return_exceptions=True), timeout=60
    )
    assert any(isinstance(result, EngineError) for result in results)
    assert everything_is_free(engine)
    async with engine:
      return await converse(engine, 5)

  engine = make()
  assert asyncio.run(run(engine)) == alone(5)
  assert asyncio.run(run(engine)) == alone(5)


def test_tools_run_while_the_device_works(monkeypatch):
  decode, caller = device.decode, threading.get_ident()

  def slow(*args, **kwargs):
    assert threading.get_ident() != caller
    time.sleep(0.2)
    return decode(*args, **kwargs)

  async def run():
    async with make() as engine:
      await engine.generate(prompt(1, 5), draw(), 0)
      monkeypatch.setattr(device, "decode", slow)
      task = asyncio.create_task(engine.generate(prompt(1, 5), draw(3), 0))
      ticks = 0
      while not task.done():
        await asyncio.sleep(0.005)
        ticks += 1
      assert ticks > 5

  asyncio.run(run())


def test_engines_of_one_configuration_share_their_programs():
  events = []
  shallow = dataclasses.replace(CONFIG, num_layers=1)  # nobody else's

  def listen(name, duration, **kwargs):
    if name == "/jax/core/compile/backend_compile_duration":
      events.append(name)

  async def run():
    before = device.compilations()
    async with make(config=shallow) as engine:
      await asyncio.gather(*(converse(engine, i) for i in range(8)))
      await asyncio.gather(
          *(engine.generate(prompt(0, 25), draw(), i) for i in range(3))
      )
    after = device.compilations()
    added = {kind: after[kind] - before.get(kind, 0) for kind in after}
    assert added == {
        "init_cache": 1, "prefill": 2, "decode": 1, "copy_slots": 1
    }  # fmt: skip
    assert len(events) == sum(added.values())
    async with make(config=shallow) as engine:
      engine.update(weights(1, shallow), 1)
      await asyncio.gather(*(converse(engine, i) for i in range(8)))
    assert device.compilations() == after
    assert len(events) == sum(added.values())

  weights(0, shallow), weights(1, shallow)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    asyncio.run(run())
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
