"""The scripted policy that agent frameworks are shown to work with."""

import asyncio
import json
import signal
import subprocess
import sys

import openai
import pytest
from served import TOKENIZER, serve, speaker

from experiments.bench import capitals
from mgrpo_jax.policy.sampling import Sampling

TOOL = {
    "type": "function",
    "function": {
        "name": "capital",
        "parameters": {
            "type": "object",
            "properties": {"country": {"type": "string"}},
        },
    },
}


@pytest.fixture(scope="module")
def create():
  with serve(speaker(capitals.generate, context=8192)) as served:
    url = f"http://127.0.0.1:{served.port}/v1"
    yield openai.OpenAI(base_url=url, api_key="any").chat.completions.create


def test_it_calls_the_tool_and_says_what_came_back(create):
  asked = {"model": "tiny", "tools": [TOOL], "max_tokens": 200}
  messages = []
  for question, country in (
      ("What is the capital of Peru?", "Peru"),
      ("And what is that of New Zealand?", "New Zealand"),
  ):
    messages.append({"role": "user", "content": question})
    message = create(messages=messages, **asked).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"country": country}
    result = f"Lima, the capital of {country}"  # which is no question
    messages += [
        message,
        {"role": "tool", "tool_call_id": call.id, "content": result},
    ]
    answer = create(messages=messages, **asked).choices[0]
    assert answer.message.content == f"It is {result}."
    assert answer.finish_reason == "stop"
    messages.append(answer.message)


def test_no_more_tokens_are_drawn_than_were_asked_for():
  tokens = TOKENIZER.encode("<|im_start|>user\nthe capital of Peru<|im_end|>")
  told = asyncio.run(
      capitals.generate(
          tokens, Sampling(temperature=1.0, max_new_tokens=4, stop_ids=()), 0
      )
  )
  assert (len(told.tokens), told.finish) == (4, "length")


def test_what_asks_for_no_capital_is_refused(create):
  system = {"role": "system", "content": "the capital of Peru"}
  hello = {"role": "user", "content": "Hello"}
  with pytest.raises(openai.BadRequestError, match="asks for no capital"):
    create(model="tiny", tools=[TOOL], messages=[system, hello])


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_that_there_is_not_is_one_line(port):
  done = subprocess.run(
      [sys.executable, "-m", "experiments.bench.capitals", f"--port={port}"],
      capture_output=True,
      text=True,
  )
  assert done.returncode == 2
  assert done.stderr == f"error: --port={port}: allowed: 0 to 65535\n"


def test_the_command_ends_when_it_is_told():
  serving = subprocess.Popen(
      [sys.executable, "-m", "experiments.bench.capitals", "--port=0"],
      stderr=subprocess.PIPE,
      text=True,
  )
  try:
    told = serving.stderr.readline()
    assert told.startswith("serving main on port ")
    url = f"http://127.0.0.1:{int(told.split()[-1])}/v1"
    (model,) = openai.OpenAI(base_url=url, api_key="any").models.list()
    assert model.id == "main"
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(60) == 0
  finally:
    serving.kill()
