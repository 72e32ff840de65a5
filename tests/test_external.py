"""An engine that is a server: what it is given, what it is believed."""

import asyncio
import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_llama
from fake_openai import VOCAB, Fake, fake, honest, running
from served import CONFIG, CONTEXT, engine, serve, speaker, weights

from mgrpo_jax.atomic import StorageError
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import dialects, exchange, handover
from mgrpo_jax.sampler.connection import Address, UnreachableError
from mgrpo_jax.sampler.exchange import Question
from mgrpo_jax.sampler.external import ExternalEngine
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.sampler.lease import Server
from mgrpo_jax.serving.weights import Weights

SAMPLING = Sampling(temperature=1.0, max_new_tokens=5, stop_ids=(9,))


def policy(params, config):
  return Policy(
      config=config, params=params, tokenizer=None, chat=None, system=""
  )


@functools.cache
def small(seed=0):
  config = tiny_llama.config()
  assert config.vocab_size == VOCAB
  return policy(tiny_llama.weights(config, seed), config)


@pytest.fixture
def server():
  with fake() as made:
    yield made


def make(server, folder, *, context=64, **changes):
  fields = {
      "url": server.url, "token": "", "max_concurrent": 4, "timeout": 5.0,
      "attempts": 2,
  }  # fmt: skip
  where = Server(
      address=Address(**fields | changes),
      model="tiny",
      folder=folder / "tiny",
      dialect=dialects.VLLM,
  )
  return ExternalEngine(small(), 3, server=where, context=context)


def run(made, work):
  """What a coroutine function of an engine returns inside `async with`."""

  async def inside():
    async with made:
      return await work(made)

  return asyncio.run(inside())


def ask(made, tokens=(1, 2), sampling=SAMPLING, seed=7, **more):
  return run(made, lambda m: m.generate(tokens, sampling, seed, **more))


def answer(tokens, limit, *, seed=7, stops=(9,)):
  """What the fake says to this."""
  sampling = Sampling(temperature=1.0, max_new_tokens=limit, stop_ids=stops)
  asked = Question(tokens=tokens, sampling=sampling, seed=seed, limit=limit)
  return honest(exchange.body(asked, "tiny"))["choices"][0]


@pytest.mark.parametrize("seed", range(6))
def test_completions_are_the_servers_answers(server, tmp_path, seed):
  heard = []
  found = ask(
      make(server, tmp_path),
      seed=seed,
      sampling=Sampling(temperature=1.0, max_new_tokens=20, stop_ids=(9,)),
      on_tokens=lambda *args: heard.append(args),
  )
  said = answer((1, 2), 20, seed=seed)
  assert found.tokens.tolist() == said["token_ids"]
  logprobs = np.float32(said["logprobs"]["token_logprobs"])
  np.testing.assert_array_equal(found.logprobs, logprobs)
  assert found.finish == said["finish_reason"]
  assert (found.version_min, found.version_max) == (3, 3)
  assert heard == [(found.tokens.tolist(), found.logprobs.tolist())]


def test_the_context_ends_a_stream(server, tmp_path):
  made = make(server, tmp_path, context=6)
  sampling = Sampling(temperature=1.0, max_new_tokens=99, stop_ids=())
  found = ask(made, tokens=(1, 2, 3, 4), sampling=sampling)
  assert len(found.tokens) == 2 and found.finish == "context"
  assert server.asked("/v1/completions")[-1]["max_tokens"] == 2
  full = make(server, tmp_path, context=6)
  empty = ask(full, tokens=range(6))
  assert empty.finish == "context" and not len(empty.tokens)
  assert (empty.version_min, empty.version_max) == (3, 3)
  assert full.stats()["visits"] == 0


@pytest.mark.parametrize(
    ("tokens", "seed", "told"),
    [
        ((), 0, "1 to 64 ids"),
        (range(65), 0, "1 to 64 ids"),
        ((VOCAB,), 0, "ids in 0..22"),
        ((-1,), 0, "ids in 0..22"),
        ((1,), -1, "seed"),
        ((1,), 2**64, "seed"),
    ],
)
def test_nonsense_is_refused_before_anybody_is_asked(
    server, tmp_path, tokens, seed, told
):
  made = make(server, tmp_path)
  with pytest.raises(ValueError, match=told):
    ask(made, tokens=[*tokens], seed=seed)
  assert made.stats()["visits"] == 0


def test_the_first_weights_are_handed_over_before_anything_is_asked(
    server, tmp_path
):
  ask(make(server, tmp_path))
  (path,) = server.loaded
  assert path == str(tmp_path / "tiny" / "handed-v3")
  jax.tree.map(
      np.testing.assert_array_equal,
      load(path).params,
      handover.untied(small()).params,
  )
  order = [where for _, where, _ in server.calls]
  told = ["/pause", "/collective_rpc", "/reset_prefix_cache",
          "/update_weight_version", "/resume"]  # fmt: skip
  asked = "/v1/completions"  # with a head of zeros, at two temperatures, ours
  assert order == [
      "/v1/models", *told, asked, *told, asked, asked, "/weight_info", asked
  ]  # fmt: skip
  assert server.label.endswith("-v3")


def test_an_update_is_loaded_when_it_returns(server, tmp_path):
  async def work(made):
    before = await made.generate([1], SAMPLING, 7)
    for version in (4, 5, 6):
      made.update(small(1).params, version)
      assert server.loaded[-1].endswith(f"v{version}")
    after = await made.generate([1], SAMPLING, 7)
    return before, after, made.stats()

  before, after, stats = run(make(server, tmp_path), work)
  assert (before.version_min, before.version_max) == (3, 3)
  assert (after.version_min, after.version_max) == (6, 6)
  jax.tree.map(
      np.testing.assert_array_equal,
      load(server.loaded[-1]).params,
      handover.untied(small(1)).params,
  )
  kept = sorted(p.name for p in (tmp_path / "tiny").iterdir())
  assert kept == [".lock", "blank", "handed-v5", "handed-v6"]
  assert stats["handovers"] == 4 and stats["visits"] == 2
  assert stats["generated"] == len(before.tokens) + len(after.tokens)


def test_weights_for_later_are_handed_over_at_the_start(server, tmp_path):
  made = make(server, tmp_path)
  made.update(small(1).params, 8)
  found = ask(made)
  assert (found.version_min, found.version_max) == (8, 8)
  assert [path[-2:] for path in server.loaded] == ["v8"]


def test_an_answer_on_its_way_has_both_versions(server, tmp_path):
  async def work(made):
    server.hold.clear()
    waiting = asyncio.create_task(made.generate([1], SAMPLING, 7))
    while not server.running:
      await asyncio.sleep(0.01)
    server.hold.set()
    made.update(small(1).params, 4)  # the loop waits, so it is read after
    return await waiting

  found = run(make(server, tmp_path), work)
  assert (found.version_min, found.version_max) == (3, 4)


def test_a_server_without_token_ids_is_refused_at_the_start(server, tmp_path):
  server.always = functools.partial(honest, token_ids=None)
  with pytest.raises(EngineError, match="return_token_ids") as caught:
    ask(make(server, tmp_path))
  assert server.url in str(caught.value)
  assert len(server.asked("/v1/completions")) == 2


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ([{"id": "other"}], "no 'tiny', but .'other'"),
        ([{"id": "tiny", "max_model_len": 63}], "63, must be at least.* 64"),
        ([7, {}], "no 'tiny'"),
        ("tiny", "no 'tiny'"),
    ],
)
def test_a_server_of_something_else_is_refused(server, tmp_path, models, told):
  server.models = models
  with pytest.raises(EngineError, match=told):
    ask(make(server, tmp_path))
  assert not server.loaded


def test_a_server_that_loads_nothing_is_told_of_its_mode(server, tmp_path):
  server.development = False
  with pytest.raises(EngineError, match="404.*VLLM_SERVER_DEV_MODE=1"):
    ask(make(server, tmp_path))


def test_old_prefixes_must_be_forgotten(server, tmp_path):
  server.cached = False
  with pytest.raises(EngineError, match="reset_prefix_cache"):
    ask(make(server, tmp_path))
  assert server.calls[-1][1] == "/resume"  # it serves others as before


def test_a_head_that_stays_is_refused(server, tmp_path):
  server.reloads = False
  with pytest.raises(EngineError, match="not tied, such as .*blank/handed-v0"):
    ask(make(server, tmp_path))
  assert not server.loaded
  head = load(tmp_path / "tiny/blank/handed-v0").params.unembedding
  assert not np.any(head) and head.shape == (12, VOCAB)


def test_logprobs_of_another_temperature_are_refused(server, tmp_path):
  raw = functools.partial(
      honest, top=lambda temperature: -1.0 - 1e-6 * temperature
  )
  server.always = raw
  ask(make(server, tmp_path))
  cold = dataclasses.replace(SAMPLING, temperature=0.0)
  ask(make(server, tmp_path), sampling=cold)
  cool = dataclasses.replace(SAMPLING, temperature=0.7)
  with pytest.raises(EngineError, match="processed_logprobs"):
    ask(make(server, tmp_path), sampling=cool)
  server.always = honest
  ask(make(server, tmp_path), sampling=cool)


def after_start(server, *plan):
  """Asks for a completion that gets such answers."""

  async def ask_once(made):
    server.plan = list(plan)
    return await made.generate([1, 2], SAMPLING, 7)

  return ask_once


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": None},
        {"token_ids": [1]},
        {"finish_reason": "stop"},
        {"logprobs": None},
        {"prompt_token_ids": [2, 1, 2]},
    ],
)
def test_an_answer_that_does_not_add_up_ends_it(server, tmp_path, changes):
  plan = functools.partial(honest, **changes)
  with pytest.raises(EngineError, match=f"{server.url}/completions: "):
    run(make(server, tmp_path), after_start(server, plan))


def test_nan_logprobs_end_it(server, tmp_path):
  def nan(body):
    told = honest(body)
    told["choices"][0]["logprobs"]["token_logprobs"][-1] = float("nan")
    return told

  with pytest.raises(EngineError, match="nan"):
    run(make(server, tmp_path), after_start(server, nan))


def test_failures_that_pass_do_not_show(server, tmp_path):
  plan = ((503, {}, {}), functools.partial(honest, finish_reason="abort"))
  found = run(make(server, tmp_path), after_start(server, *plan))
  assert found.tokens.tolist() == answer((1, 2), 5)["token_ids"]
  assert not server.plan


def test_a_server_that_keeps_failing_fails_the_call(server, tmp_path):
  plan = [(500, {}, {})] * 2
  with pytest.raises(UnreachableError):
    run(make(server, tmp_path), after_start(server, *plan))
  aborts = [functools.partial(honest, finish_reason="abort")] * 2
  with pytest.raises(UnreachableError, match="no whole answer"):
    run(make(server, tmp_path), after_start(server, *aborts))


def test_a_server_started_anew_gets_the_weights_again(tmp_path):
  """What it answers before, from weights nobody knows, is not believed."""
  first, again = Fake(), Fake()

  def by_weights(body):
    fresh = again.label == "default"
    return honest(body, token_ids=[0]) if fresh else honest(body)

  again.always = by_weights

  async def work(made):
    await made.generate([1], SAMPLING, 7)
    stack.close()
    with running(again, first.port):
      found = await asyncio.gather(
          *(made.generate([1], SAMPLING, seed) for seed in range(4))
      )
    return found, made.stats()["handovers"]

  with contextlib.ExitStack() as stack:
    first.port = stack.enter_context(running(first))
    found, handovers = run(make(first, tmp_path), work)
  assert [path[-2:] for path in again.loaded] == ["v3"] and handovers == 2
  order = [where for _, where, _ in again.calls]
  assert order.index("/v1/completions") < order.index("/collective_rpc")
  for seed, one in enumerate(found):
    said = answer((1,), 5, seed=seed)
    assert one.tokens.tolist() == said["token_ids"]


def test_a_server_started_anew_between_steps_is_no_loss(server, tmp_path):
  async def work(made):
    server.label = "default"
    made.update(small(1).params, 4)
    return await made.generate([1], SAMPLING, 7)

  assert run(make(server, tmp_path), work).version_min == 4


def test_a_new_connection_to_the_same_server_is_no_loss(server, tmp_path):
  async def work(made):
    await asyncio.gather(*(made.generate([1], SAMPLING, s) for s in range(4)))
    return made.stats()

  stats = run(make(server, tmp_path), work)
  assert stats["handovers"] == 1 and stats["visits"] == 4
  assert server.asked("/weight_info")


def test_weights_of_somebody_else_end_it(server, tmp_path):
  async def work(made):
    server.label = "theirs"
    made.update(small(1).params, 4)

  async def ask_anew(made):
    server.label = "theirs"
    await asyncio.gather(*(made.generate([1], SAMPLING, s) for s in range(4)))

  for number, how in enumerate((work, ask_anew), 1):
    with pytest.raises(EngineError, match="'theirs'.*another run"):
      run(make(server, tmp_path), how)
    assert len(server.loaded) == number


def test_a_folder_has_one_writer(server, tmp_path):
  async def work(made):
    async with make(server, tmp_path):
      raise AssertionError

  with pytest.raises(StorageError, match="in use"):
    run(make(server, tmp_path), work)


def test_who_is_cancelled_lets_go(server, tmp_path):
  async def work(made):
    server.hold.clear()
    waiting = asyncio.create_task(made.generate([1], SAMPLING, 7))
    while not server.running:
      await asyncio.sleep(0.01)
    busy = made.stats()["slots"]
    waiting.cancel()
    await asyncio.wait({waiting})
    server.hold.set()
    assert waiting.cancelled()
    return busy, made.stats()

  busy, stats = run(make(server, tmp_path), work)
  assert busy == {"free": 3, "idle": 0, "busy": 1}
  assert stats["slots"] == {"free": 4, "idle": 0, "busy": 0}
  assert stats["cancelled"] == 1 and stats["generated"] == 0


def test_it_has_the_counts_of_the_engine_here(server, tmp_path):
  assert engine().stats().keys() <= make(server, tmp_path).stats().keys()


def test_outside_async_with_nothing_is_sampled(server, tmp_path):
  made = make(server, tmp_path)
  with pytest.raises(EngineError, match="not running"):
    asyncio.run(made.generate([1], SAMPLING, 7))
  ask(made)
  ask(made)  # it can be entered again
  with pytest.raises(EngineError, match="not running"):
    asyncio.run(made.generate([1], SAMPLING, 7))


# Against our own server.


def ours(served, folder, params, version=7):
  return ExternalEngine(
      policy(params, CONFIG),
      version,
      context=CONTEXT,
      server=Server(
          address=Address(
              url=f"http://127.0.0.1:{served.port}/v1",
              token="0123456789abcdef",
              max_concurrent=4,
              timeout=60.0,
              attempts=3,
          ),
          model="tiny",
          folder=folder / "tiny",
          dialect=dialects.MGRPO,
      ),
  )


def test_our_server_samples_as_the_engine_here(tmp_path):
  others = jax.tree.map(lambda x: x[..., ::-1].copy(), weights())
  sampling = Sampling(temperature=0.7, max_new_tokens=12, stop_ids=(5, 6))
  prompts = [([1, 2, 3, seed], seed) for seed in (0, 5, 2**63, 2**64 - 1)]

  async def work(made):
    found = []
    for params, version in ((weights(), 7), (others, 8)):
      made.update(params, version)
      found += await asyncio.gather(
          *(made.generate([t % 9 for t in p], sampling, s) for p, s in prompts)
      )
    return found

  here, there = run(engine(), work), engine()
  loading = Weights(tmp_path, engines={"tiny": there}, configs={"tiny": CONFIG})
  with serve(
      speaker(there.generate),
      engines={"tiny": there},
      weights=loading,
      token="0123456789abcdef",
  ) as served:
    found = run(ours(served, tmp_path, others), work)
  for one, other in zip(found, here, strict=True):
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert (
        dataclasses.replace(
            one,
            tokens=other.tokens,
            logprobs=other.logprobs,
            raw_logprobs=other.raw_logprobs,  # which a server does not tell
        )
        == other
    )


def test_our_server_must_be_told_where_weights_are(tmp_path):
  made = engine()
  with serve(speaker(made.generate), engines={"tiny": made}) as served:
    with pytest.raises(EngineError, match="404.*--weights_from"):
      run(ours(served, tmp_path, weights()), lambda m: None)
