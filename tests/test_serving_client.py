"""OpenAI's own client against a run in miniature: its team, its policies."""

import asyncio
import contextlib
import json
import threading

import openai
import pytest
from served import LIMITS, engine, saying, serve, speaker

from mgrpo_jax import store
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.protocol import Action
from mgrpo_jax.resources import open_resources
from mgrpo_jax.serving import catalog, listen, warming
from mgrpo_jax.serving.service import Service
from mgrpo_jax.serving.team import team
from mgrpo_jax.testing.generate import complete
from mgrpo_jax.testing.setup import small_setup
from mgrpo_jax.testing.team import (
    chat_of,
    environment,
    small_team,
    tokenizer,
)

TOKEN = "0123456789abcdef"
TEAM = small_team()
CHAT = chat_of(COMPACT, TEAM)
HELLO = [{"role": "user", "content": "capital of Peru?"}]


def client(port, token=TOKEN):
  return openai.OpenAI(
      base_url=f"http://127.0.0.1:{port}/v1",
      api_key=token,
      max_retries=0,
      timeout=60,
  )


def scripted(*turns):
  """Says one turn after the other, whoever asks; then the last for ever."""
  left = [CHAT.write(COMPACT.render(turn)) for turn in turns]

  async def generate(tokens, sampling, seed, *, session):
    ids = left.pop(0) if len(left) > 1 else left[0]
    return complete(ids, sampling, seed=seed, version=3)

  return generate


def small_world(main, researcher):
  return environment(
      {"main": main, "researcher": researcher}, team=TEAM, protocol=COMPACT
  )


def action(kind, name, text):
  key = "text" if kind == "answer" else "request"
  return Action(kind=kind, name=name, arguments={key: text})


@pytest.fixture(scope="module")
def run():
  """A run's resources behind a server: port and resources."""
  ready, told = threading.Event(), {}

  async def main():
    setup = small_setup(seed=0, imitation_steps=0, steps=1)
    async with open_resources(setup, store.open("memory://")) as resources:
      service = Service(
          catalog.models(resources, "small:team", conversations=4),
          stats=lambda: {n: e.stats() for n, e in resources.engines.items()},
          limits=LIMITS,
          token=TOKEN,
      )
      await warming.warm_up(
          service.gate, resources.engines, deadline=300, tell=lambda line: None
      )
      with listen.bind("127.0.0.1", 0) as where:
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        told["stop"] = lambda: loop.call_soon_threadsafe(stopping.set)
        told["run"] = where.getsockname()[1], resources
        ready.set()
        await listen.listen(
            service, where, stopping=stopping, drain=5, max_connections=50
        )

  def start():
    with contextlib.suppress(BaseException):
      asyncio.run(main())
    ready.set()

  thread = threading.Thread(target=start)
  thread.start()
  assert ready.wait(300) and "run" in told
  yield told["run"]
  told["stop"]()
  thread.join(60)
  assert not thread.is_alive()


def test_the_team_and_every_policy_are_models(run):
  names = [model.id for model in client(run[0]).models.list()]
  assert names == ["small:team", "main", "researcher"]


def test_a_policy_speaks_and_streams(run):
  port, resources = run
  asked = {
      "model": "researcher", "messages": HELLO, "max_tokens": 20, "seed": 4,
      "temperature": 1.0, "logprobs": True,
  }  # fmt: skip
  create = client(port).chat.completions.create
  extra = {"return_token_ids": True}
  whole = create(**asked, extra_body=extra)
  choice = whole.choices[0]
  assert len(choice.logprobs.content) == whole.usage.completion_tokens
  assert whole.prompt_token_ids == resources.testing.actors[
      "researcher"
  ].chat.open("", "capital of Peru?")
  assert len(choice.token_ids) == whole.usage.completion_tokens
  chunks = list(create(**asked, stream=True))
  text = "".join(c.choices[0].delta.content or "" for c in chunks)
  assert text == choice.message.content
  assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_the_team_answers_the_same_for_the_same_seed(run):
  port, resources = run
  create = client(port).chat.completions.create
  asked = {"model": "small:team", "messages": HELLO, "temperature": 1.0}
  extra = {"return_calls": True}

  def record(seed):
    told = create(**asked, n=2, seed=seed, extra_body=extra)
    return [
        [
            {k: v for k, v in call.items() if k != "seconds"}
            for call in one.calls
        ]
        for one in told.choices
    ]

  first = record(1)
  assert record(1) == first
  assert record(2) != first and first[0] != first[1]
  assert all(calls[0]["role"] == "main" for calls in first)
  for made in resources.engines.values():
    assert made.stats()["slots"]["busy"] == 0


def test_errors_are_the_clients_own(run):
  port, _ = run
  with pytest.raises(openai.AuthenticationError):
    client(port, "wrong").models.list()
  create = client(port).chat.completions.create
  with pytest.raises(openai.NotFoundError, match="small:team"):
    create(model="gpt", messages=HELLO)
  with pytest.raises(openai.BadRequestError, match="presence") as caught:
    create(model="main", messages=HELLO, presence_penalty=0.5)
  assert caught.value.param == "presence_penalty"


def test_a_team_delegates_and_shows_how():
  world = small_world(
      scripted(action("call", "researcher", "capital of Peru"),
               action("answer", "", "It is Lima, I hear.")),
      scripted(action("answer", "", "Lima")),
  )  # fmt: skip
  model = team("team", environment=world, tokenizer=tokenizer(TEAM))
  with serve(models=[model]) as served:
    told = served.complete(model="team", messages=HELLO, return_calls=True)
    (choice,) = told["choices"]
    assert choice["message"]["content"] == "It is Lima, I hear."
    assert (choice["status"], choice["finish_reason"]) == ("COMPLETED", "stop")
    main, researcher = choice["calls"]
    assert (main["role"], main["parent"], main["request"]) == (
        "main", -1, "capital of Peru?",
    )  # fmt: skip
    assert (researcher["role"], researcher["parent"]) == ("researcher", 0)
    assert researcher["result"] == main["turns"][0]["result"] == "Lima"
    assert told["usage"]["completion_tokens"] > 20
    for more, text, finish in (
        ({"stop": ", "}, "It is Lima", "stop"),
        ({"max_tokens": 5}, "It is", "length"),
    ):
      (choice,) = served.complete(model="team", messages=HELLO, **more)[
          "choices"
      ]
      assert choice["message"]["content"].strip() == text
      assert choice["finish_reason"] == finish
    chunks = served.stream(model="team", messages=HELLO)
    assert chunks[1]["choices"][0]["delta"]["content"] == "It is Lima, I hear."


def test_a_team_that_does_not_answer_says_why():
  lost = scripted(action("call", "researcher", "what?"))
  world = small_world(lost, scripted(action("answer", "", "Lima")))
  model = team("team", environment=world, tokenizer=tokenizer(TEAM))
  with serve(models=[model]) as served:
    (choice,) = served.complete(model="team", messages=HELLO)["choices"]
    assert choice["message"]["content"] == ""
    assert (choice["status"], choice["finish_reason"]) == (
        "TRUNCATED", "length",
    )  # fmt: skip


def test_a_machine_that_fails_the_team_is_no_answer():
  async def broken(*args, **kwargs):
    raise OSError("unplugged")

  world = small_world(broken, broken)
  model = team("team", environment=world, tokenizer=tokenizer(TEAM))
  with serve(models=[model]) as served:
    served.complete(503, model="team", messages=HELLO)


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": True},
        {"return_token_ids": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [*HELLO, {"role": "assistant", "content": "?"}]},
        {"messages": [{"role": "user", "content": " "}]},
    ],
)
def test_what_a_team_cannot_do_is_refused(more):
  answers = scripted(action("answer", "", "Lima"))
  world = small_world(answers, answers)
  model = team("team", environment=world, tokenizer=tokenizer(TEAM))
  with serve(models=[model]) as served:
    error = served.complete(
        400, **({"model": "team", "messages": HELLO} | more)
    )
    assert error["error"]["param"]


def test_tools_go_around_with_openais_client():
  call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
  tool = {"type": "function", "function": {"name": "add", "parameters": {
      "type": "object", "properties": {"a": {"type": "integer"}}}}}  # fmt: skip
  with serve(speaker(saying(call), context=5000)) as served:
    create = client(served.port, "any").chat.completions.create
    asked = {"model": "tiny", "tools": [tool]}
    message = create(messages=HELLO, **asked).choices[0].message
    (made,) = message.tool_calls
    assert json.loads(made.function.arguments) == {"a": 2}
    result = {"role": "tool", "tool_call_id": made.id, "content": "4"}
    create(messages=[*HELLO, message, result], **asked)


def test_two_hundred_clients_at_once():
  """Each is answered or told to come back; nothing is left behind."""
  made = engine()

  async def ask(create, seed):
    try:
      stream = await create(
          model="tiny", messages=HELLO, seed=seed % 5, max_tokens=12,
          temperature=1.0, stream=True,
      )  # fmt: skip
      text = ""
      async for chunk in stream:
        if seed % 7 == 0:
          await stream.close()
          return None
        text += chunk.choices[0].delta.content or ""
      return seed % 5, text
    except openai.RateLimitError as error:
      assert error.response.headers["retry-after"] == "1"
      return None

  async def everyone(port):
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="any",
        max_retries=0,
        timeout=60,
    ) as asker:
      create = asker.chat.completions.create
      return await asyncio.gather(*(ask(create, i) for i in range(200)))

  with serve(speaker(made.generate), engines={"tiny": made}) as served:
    answers = {one for one in asyncio.run(everyone(served.port)) if one}
    assert 1 <= len(answers) == len({seed for seed, _ in answers})
    served.complete(max_tokens=2)
    stats = made.stats()
    assert stats["slots"]["busy"] == stats["requests"] == 0
    assert served.service.gate.inside == 0
