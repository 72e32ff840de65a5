"""A server as its clients meet it: answers, streams, errors."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from served import (
    CHAT,
    CONTEXT,
    HELLO,
    LIMITS,
    TOKENIZER,
    all_free,
    engine,
    saying,
    serve,
    speaker,
    text_of,
    until,
)

from mgrpo_jax.agents.chats.llama3 import llama3_1_tools
from mgrpo_jax.agents.llama import LLAMA
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import device
from mgrpo_jax.serving.limits import SHORTEST_TOKEN
from mgrpo_jax.testing.tokens import ByteTokenizer

LLAMA_TOKENIZER = ByteTokenizer((
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
))  # fmt: skip
TOKEN = "0123456789abcdef"
ARGUMENTS = '{"a": 2, "b": [3]}'
CALL = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'
ADD = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object",
    "properties": {"a": {"type": "number"}, "b": {"type": "array"}},
    "required": ["a"]}}}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
  """A server of one tiny policy, and its engine."""
  made = engine()
  with serve(speaker(made.generate), engines={"tiny": made}) as served:
    yield served, made


def direct(tokens, *, seed, limit, temperature=1.0, **filters):
  """What the engine itself yields."""

  async def run():
    made = engine()
    async with made:
      sampling = Sampling(
          temperature=temperature, max_new_tokens=limit, stop_ids=CHAT.stop_ids,
          **filters,
      )  # fmt: skip
      return await made.generate(tokens, sampling, seed)

  return asyncio.run(run())


def test_same_seed_same_tokens_as_the_engine(tiny):
  served, _ = tiny
  told = served.complete(
      seed=3, max_tokens=20, logprobs=True, return_token_ids=True
  )
  assert told["prompt_token_ids"] == CHAT.open("", "Hello")
  expected = direct(told["prompt_token_ids"], seed=3, limit=20)
  (choice,) = told["choices"]
  assert choice["token_ids"] == expected.tokens.tolist()
  logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
  np.testing.assert_array_equal(np.float32(logprobs), expected.logprobs)
  kept = [t for t in choice["token_ids"] if t not in CHAT.stop_ids]
  assert choice["message"]["content"] == TOKENIZER.decode(kept)
  assert told["usage"] == {
      "prompt_tokens": len(told["prompt_token_ids"]),
      "completion_tokens": len(expected.tokens),
      "total_tokens": len(told["prompt_token_ids"]) + len(expected.tokens),
  }
  assert told["object"] == "chat.completion"


@pytest.mark.parametrize(
    "filters", [{"top_k": 1}, {"top_p": 0.3}, {"min_p": 0.9}]
)
def test_filters_reach_the_engine(tiny, filters):
  served, _ = tiny
  fields = {
      "seed": 3, "max_tokens": 20, "temperature": 2.0, "return_token_ids": True
  }  # fmt: skip
  told = served.complete(**fields, **filters)
  expected = direct(
      told["prompt_token_ids"], seed=3, limit=20, temperature=2.0, **filters
  )
  (choice,) = told["choices"]
  assert choice["token_ids"] == expected.tokens.tolist()
  (free,) = served.complete(**fields)["choices"]
  assert free["token_ids"] != choice["token_ids"]


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_spells_what_is_told_at_once(tiny, seed):
  served, _ = tiny
  fields = {
      "seed": seed, "max_tokens": 30, "n": 3, "logprobs": True,
      "return_token_ids": True,
  }  # fmt: skip
  whole = served.complete(**fields)
  chunks = served.stream(stream_options={"include_usage": True}, **fields)
  assert chunks[-1]["usage"] == whole["usage"] and not chunks[-1]["choices"]
  assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
  assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
  texts = set()
  for choice in whole["choices"]:
    index = choice["index"]
    assert text_of(chunks, index) == choice["message"]["content"]
    own = [
        part for chunk in chunks[1:] for part in chunk["choices"]
        if part["index"] == index
    ]  # fmt: skip
    assert [t for part in own for t in part["token_ids"]] == choice["token_ids"]
    assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert all(part["finish_reason"] is None for part in own[:-1])
    texts.add(choice["message"]["content"])
  assert len(texts) == 3


def test_stop_texts_cut_and_free_the_slot(tiny):
  served, made = tiny
  free = served.complete(seed=5, max_tokens=60, temperature=2.0)
  text = free["choices"][0]["message"]["content"]
  stop = text[10:12]
  before = text[: text.index(stop)]
  fields = {
      "seed": 5, "max_tokens": 60, "temperature": 2.0, "stop": [stop],
      "return_token_ids": True,
  }  # fmt: skip
  (choice,) = served.complete(**fields)["choices"]
  assert (choice["message"]["content"], choice["finish_reason"]) == (
      before,
      "stop",
  )
  assert len(choice["token_ids"]) < 60
  assert text_of(served.stream(**fields)) == before
  assert TOKENIZER.decode(choice["token_ids"][:-1]).find(stop) < 0
  assert stop in TOKENIZER.decode(choice["token_ids"])
  until(lambda: all_free(made))


def test_budgets_end_choices(tiny):
  served, _ = tiny
  short = served.complete(seed=0, max_completion_tokens=2, temperature=2.0)
  assert short["choices"][0]["finish_reason"] == "length"
  assert short["usage"]["completion_tokens"] == 2
  error = served.complete(
      400, messages=[{"role": "user", "content": "x" * CONTEXT}]
  )["error"]
  assert error["code"] == "context_length_exceeded"


def test_tool_calls_come_out_and_results_go_in():
  with serve(speaker(saying(f"I add.\n{CALL}"), context=5000)) as served:
    asked = {"tools": [ADD]}
    (choice,) = served.complete(**asked)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "I add.\n"
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 2, "b": [3]}
    chunks = served.stream(**asked)
    assert text_of(chunks) == "I add.\n"
    (delta,) = [
        chunk["choices"][0]["delta"] for chunk in chunks
        if "tool_calls" in chunk["choices"][0]["delta"]
    ]  # fmt: skip
    assert delta["tool_calls"][0]["function"] == call["function"]
    told = {"role": "tool", "tool_call_id": call["id"], "content": "5"}
    again = served.complete(messages=[*HELLO, message, told], **asked)
    assert again["choices"][0]["finish_reason"] == "tool_calls"
    # without tools, or if they may not be chosen, it is just text
    for plain in ({}, asked | {"tool_choice": "none"}):
      (choice,) = served.complete(**plain)["choices"]
      assert choice["finish_reason"] == "stop"
      assert choice["message"]["content"] == f"I add.\n{CALL}"


@pytest.mark.parametrize("text", ["<tool_call>{}</tool_call>", CALL[:-5], "so"])
def test_what_is_no_call_is_text(text):
  with serve(speaker(saying(text), context=5000)) as served:
    (choice,) = served.complete(tools=[ADD])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (
        text,
        "stop",
    )
    assert text_of(served.stream(tools=[ADD])) == text


def llama_says(text):
  """A speaker of Llama 3.1 and its protocol."""
  chat = llama3_1_tools(LLAMA_TOKENIZER, date="26 Jul 2024")
  return speaker(
      saying(text, chat=chat), context=50_000, chat=chat, protocol=LLAMA,
      tokenizer=LLAMA_TOKENIZER,
  )  # fmt: skip


def test_llama_calls_tools_too():
  said = '\n{"name": "add", "parameters": {"a": 2, "b": [3]}}'
  with serve(llama_says(said)) as served:
    (choice,) = served.complete(tools=[ADD])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert not message["content"]
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": 2, "b": [3]}
    chunks = served.stream(tools=[ADD])
    assert text_of(chunks).strip() == ""
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (delta,) = [one for one in deltas if "tool_calls" in one]
    assert delta["tool_calls"][0]["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    told = {"role": "tool", "tool_call_id": call["id"], "content": "5"}
    more = {"role": "user", "content": "Again?"}
    reply = {"role": "assistant", "content": "It is 5."}
    served.complete(messages=[*HELLO, message, told, reply, more], tools=[ADD])
    # without tools it is just text
    (choice,) = served.complete()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (
        said.strip(),  # as the format writes turns
        "stop",
    )


@pytest.mark.parametrize(
    "text",
    [
        "It is {5}, I think.",
        '{"name": "fly", "parameters": {}}',
        'So: {"name": "add", "parameters": {"a": 2}}',
        '{"name": "add"',
    ],
)
def test_what_is_no_call_of_llamas_is_text(text):
  with serve(llama_says(text)) as served:
    (choice,) = served.complete(tools=[ADD])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (
        text,
        "stop",
    )
    assert text_of(served.stream(tools=[ADD])) == text


def test_models_are_listed(tiny):
  served, _ = tiny
  status, _, body = served.ask("GET", "/v1/models")
  assert status == 200
  assert [one["id"] for one in json.loads(body)["data"]] == ["tiny"]
  one = json.loads(served.ask("GET", "/v1/models/tiny")[2])
  assert (one["id"], one["max_model_len"]) == ("tiny", CONTEXT)
  assert served.ask("GET", "/v1/models/other")[0] == 404
  assert served.complete(404, model="other")["error"]["code"] == (
      "model_not_found"
  )


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", "application/json", 400),
        ("POST", "/v1/chat/completions", b"{}", "text/plain", 415),
        (
            "POST",
            "/v1/chat/completions",
            b" " * 20_001,
            "application/json",
            413,
        ),
        (
            "POST",
            "/v1/chat/completions",
            b" " * 5_000_000,
            "application/json",
            413,
        ),
        ("GET", "/v1/chat/completions", None, "", 405),
        ("GET", "/v1/nothing", None, "", 404),
    ],
)
def test_wrong_requests_get_openais_errors(
    tiny, method, path, body, kind, status
):
  served, made = tiny
  visits = made.stats()["visits"]
  answer = served.ask(method, path, body, content_type=kind)
  assert answer[0] == status
  error = json.loads(answer[2])["error"]
  assert set(error) == {"message", "type", "param", "code"}
  assert error["type"] == "invalid_request_error"
  assert made.stats()["visits"] == visits


def test_a_token_opens_everything_but_health():
  assert len(TOKEN) == SHORTEST_TOKEN
  with serve(speaker(saying("x")), token=TOKEN) as served:
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/metrics"),
    ):
      for given in ({}, {"authorization": "Bearer 0123456789abcdeX"}):
        status, headers, body = served.ask(method, path, **given)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    right = {"authorization": f"Bearer {TOKEN}"}
    assert served.ask("GET", "/v1/models", **right)[0] == 200
    assert served.ask("GET", "/metrics", **right)[0] == 200
    assert served.ask("GET", "/healthz")[0] == 200
    assert served.ask("GET", "/readyz")[0] == 200


def test_too_many_requests_in_a_minute_are_told_when_to_come_back():
  limits = dataclasses.replace(LIMITS, requests_per_minute=3)
  with serve(speaker(saying("x")), limits=limits) as served:
    for _ in range(3):
      served.complete()
    status, headers, body = served.ask("GET", "/v1/models")
    assert status == 429 and 1 <= int(headers["retry-after"]) <= 20
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"


def test_a_broken_sampler_is_told_and_seen(monkeypatch):
  def broken(*args, **kwargs):
    raise MemoryError("no room")

  made = engine()
  with serve(speaker(made.generate), engines={"tiny": made}) as served:
    with monkeypatch.context() as patch:
      patch.setattr(device, "decode", broken)
      error = served.complete(503)["error"]
    assert "no room" in error["message"] and error["type"] == "server_error"
    assert served.stream()[-1]["error"]["type"] == "server_error"
    assert served.ask("GET", "/healthz")[0] == 503
    assert served.ask("GET", "/readyz")[0] == 503


def test_mistakes_of_ours_tell_nothing(caplog):
  async def generate(*args, **kwargs):
    raise KeyError("secret")

  with serve(speaker(generate)) as served:
    error = served.complete(500)["error"]
    assert "secret" not in json.dumps(error)
  assert "secret" in caplog.text


def test_metrics_add_up(tiny):
  served, made = tiny
  served.complete(max_tokens=3)
  text = served.ask("GET", "/metrics")[2].decode()
  assert 'mgrpo_requests_total{model="tiny",status="200"}' in text
  assert 'mgrpo_slots{policy="tiny",state="free"} 4' in text
  assert 'mgrpo_tokens_total{model="tiny",kind="sampled"}' in text
  assert "mgrpo_choices_in_progress 0" in text
