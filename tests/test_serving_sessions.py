"""Turns of a conversation prefill what is new, for the client it belongs to."""

import asyncio

import numpy as np
import pytest
from served import (
    HELLO,
    TOKENIZER,
    all_free,
    engine,
    raw,
    serve,
    speaker,
    until,
)

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.slots import common_length
from mgrpo_jax.serving.sessions import Sessions

SAMPLING = Sampling(temperature=1.0, max_new_tokens=5, stop_ids=())


def words(seed, length=20):
  return np.random.default_rng(seed).integers(1, 250, length).tolist()


def serve_sessions(made, limit=3):
  sessions = Sessions(made.generate, made.release, limit=limit)
  return serve(speaker(made.generate, sessions=sessions), engines={"t": made})


def prefilled_by(made, act):
  """What something returns, and the tokens prefilled for it."""
  before = made.stats()["prefilled"]
  told = act()
  return told, made.stats()["prefilled"] - before


def after(messages, told):
  """The conversation with the answer and the next question."""
  reply = told["choices"][0]["message"]
  return [*messages, reply, {"role": "user", "content": "Why?"}]


def stream_of(told):
  return np.array(told["prompt_token_ids"] + told["choices"][0]["token_ids"])


def test_a_turn_prefills_only_what_is_new():
  made = engine()
  with serve_sessions(made) as served:

    def ask(messages, seed):
      return prefilled_by(
          made,
          lambda: served.complete(
              messages=messages, seed=seed, max_tokens=3, return_token_ids=True
          ),
      )

    exact = 0
    for seed in range(60):
      messages = [{"role": "user", "content": f"Hello {seed}"}]
      told, count = ask(messages, seed)
      assert count == len(told["prompt_token_ids"]) - 1
      for _ in range(2):
        known = stream_of(told)[:-1]  # the newest token is never cached
        asked = len(told["prompt_token_ids"])
        spelled = TOKENIZER.encode(told["choices"][0]["message"]["content"])
        came_back = spelled == told["choices"][0]["token_ids"]
        messages = after(messages, told)
        told, count = ask(messages, seed)
        prompt = np.array(told["prompt_token_ids"])
        kept = common_length(known, prompt)
        assert kept >= asked and count == len(prompt) - 1 - kept
        if came_back:
          assert kept == len(known)
        exact += came_back
      if exact >= 2:
        break
    assert exact >= 2  # replies that text gives back token by token


def test_what_is_sampled_is_what_a_session_of_the_engine_samples():
  made, asked = engine(), []
  with serve_sessions(made) as served:
    messages = HELLO
    for turn in range(4):
      told = served.complete(
          messages=messages, seed=turn, max_tokens=5, logprobs=True,
          return_token_ids=True,
      )  # fmt: skip
      (choice,) = told["choices"]
      logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
      asked.append((told["prompt_token_ids"], choice["token_ids"], logprobs))
      messages = after(messages, told)

  async def directly():
    async with engine() as other:
      for turn, (prompt, ids, logprobs) in enumerate(asked):
        stop = Sampling(
            temperature=1.0,
            max_new_tokens=5,
            stop_ids=(TOKENIZER.special_ids["<|im_end|>"],),
        )
        own = await other.generate(prompt, stop, turn, session="s")
        assert own.tokens.tolist() == ids
        np.testing.assert_array_equal(own.logprobs, np.float32(logprobs))

  asyncio.run(directly())


def test_nothing_of_another_client_is_reused():
  made = engine()
  with serve_sessions(made) as served:

    def ask(key, messages, **fields):
      fields = {"messages": messages, "key": key, "max_tokens": 1} | fields
      return prefilled_by(made, lambda: served.complete(**fields))

    told, whole = ask("mine", HELLO)
    longer = after(HELLO, told)
    assert ask("theirs", HELLO)[1] == whole  # equal prompts, not copied
    assert ask("theirs", HELLO, n=2)[1] == 0
    assert made.stats()["copied"] == 2  # their own, for both choices
    turn = ask("third", longer)[1]
    assert turn == ask("theirs", longer)[1] + whole + 1
    assert turn == ask("mine", longer)[1] + whole + 1


def run_with(act, limit=3, **sizes):
  """Runs `act(sessions, engine)` on an engine."""

  async def run():
    async with engine(**sizes) as made:
      sessions = Sessions(made.generate, made.release, limit=limit)
      return await act(sessions, made)

  return asyncio.run(run())


async def turn_of(sessions, made, stream, client="me", seed=0):
  """The stream after a turn, and how many tokens were prefilled for it."""
  before = made.stats()["prefilled"]
  told = await sessions.go_on(client, stream, SAMPLING, seed)
  stream = [*stream, *told.tokens.tolist(), 7, 8]
  return stream, made.stats()["prefilled"] - before


def test_the_least_recently_used_goes_first():
  async def act(sessions, made):
    streams = {}
    for number in (0, 1, 2):
      streams[number], _ = await turn_of(sessions, made, words(number))
    # two are kept: 0 is gone, 1 goes on and is newer than 2 now
    streams[1], count = await turn_of(sessions, made, streams[1])
    assert count == 2 and len(sessions) == 2
    _, count = await turn_of(sessions, made, words(3))
    assert made.stats()["slots"]["idle"] == len(sessions) == 2
    _, count = await turn_of(sessions, made, streams[1])
    assert count == 2
    for gone in (0, 2):
      _, count = await turn_of(sessions, made, streams[gone])
      assert count == len(streams[gone]) - 1

  run_with(act, limit=2)


def test_caches_are_given_up_where_slots_run_out():
  async def act(sessions, made):
    stream, _ = await turn_of(sessions, made, words(0))
    others = [made.generate(words(n), SAMPLING, n) for n in range(1, 4)]
    await asyncio.gather(*others)
    assert made.stats()["evictions"] == 1
    _, count = await turn_of(sessions, made, stream)
    assert count == len(stream) - 1 and len(sessions) == 1

  run_with(act, num_slots=3)


def test_the_branch_that_a_client_goes_on_with_is_found():
  async def act(sessions, made):
    ways = [
        (await turn_of(sessions, made, words(0), seed=s))[0] for s in (1, 2)
    ]
    assert ways[0] != ways[1] and len(sessions) == 1  # asked again, replaced
    _, count = await turn_of(sessions, made, ways[1])
    assert count == 2
    left = await asyncio.gather(
        *(turn_of(sessions, made, [*ways[1], n]) for n in (1, 2, 3))
    )  # one finds it, the others find it in use
    assert len(left) == len(sessions) == 3
    for stream, _ in left:
      assert (await turn_of(sessions, made, stream))[1] == 2

  run_with(act)


def test_a_prompt_that_begins_otherwise_is_another_conversation():
  async def act(sessions, made):
    await turn_of(sessions, made, words(0))
    _, count = await turn_of(sessions, made, [*words(0)[:-1], 251, 252])
    assert count == 20 and len(sessions) == 2

  run_with(act)


def test_what_fails_is_not_kept():
  async def act(sessions, made):
    stream, _ = await turn_of(sessions, made, words(0))

    def tell(tokens, logprobs):
      raise KeyError

    with pytest.raises(KeyError):
      await sessions.go_on("me", stream, SAMPLING, 0, on_tokens=tell)
    assert len(sessions) == 0
    _, count = await turn_of(sessions, made, stream)
    assert count == len(stream) - 1
    counts = made.stats()["slots"]
    assert (counts["idle"], counts["busy"]) == (1, 0)
    with pytest.raises(ValueError, match="seed"):  # found, and not sampled
      await sessions.go_on("me", stream, SAMPLING, -1)
    assert made.stats()["slots"]["idle"] == len(sessions) == 0

  run_with(act)


def test_none_may_be_kept():
  async def act(sessions, made):
    stream, _ = await turn_of(sessions, made, words(0))
    assert made.stats()["slots"]["idle"] == len(sessions) == 0
    _, count = await turn_of(sessions, made, stream)
    assert count == len(stream) - 1

  run_with(act, limit=0)


def test_who_leaves_in_a_stream_leaves_nothing():
  made = engine()
  with serve_sessions(made) as served:
    connection = raw(served, stream=True)
    assert connection.recv(15) == b"HTTP/1.1 200 OK"
    connection.close()
    until(lambda: all_free(made) and served.service.gate.inside == 0)
    until(lambda: made.stats()["slots"]["idle"] == 0)
    served.complete(max_tokens=2)
    assert made.stats()["slots"]["idle"] == 1


def test_a_cache_that_was_cut_back_is_not_copied():
  prompt, other = words(0), words(1)

  async def act(sessions, made):
    await made.generate(prompt, SAMPLING, 0, session="s")
    await made.generate(prompt[:5] + other, SAMPLING, 0, session="s")
    assert made.stats()["mismatches"] == 1
    return await made.generate(prompt, SAMPLING, 3)

  async def fresh(sessions, made):
    return await made.generate(prompt, SAMPLING, 3)

  np.testing.assert_array_equal(
      run_with(act).logprobs, run_with(fresh).logprobs
  )
