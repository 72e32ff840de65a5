r"""OpenAI's client and an agent framework against a server, with a tool.

    python -m experiments.bench.capitals &
    python -m venv /tmp/framework
    /tmp/framework/bin/pip install "pydantic-ai-slim[openai]"
    /tmp/framework/bin/python -m experiments.bench.framework \
        --url=http://127.0.0.1:8000/v1 --model=main [--token=…] [--seed=0]

Both ask twice in one conversation, and run the tool whenever the model calls
it; pydantic-ai does so on its own, whole and streamed. What was said is printed
as JSON lines. Neither jax nor mgrpo_jax is needed. The first command serves a
scripted policy; any other that calls tools will do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import openai
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import UsageLimits

QUESTIONS = ("What is the capital of Peru?", "And what is that of Chile?")
_CAPITALS = {"Peru": "Lima", "Chile": "Santiago"}
_MOST_REQUESTS = 4  # of a turn
_MOST_TOKENS = 128  # of an answer or a call
_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "capital",
        "description": "Looks the capital of a country up.",
        "parameters": {
            "type": "object",
            "properties": {"country": {"type": "string"}},
            "required": ["country"],
        },
    },
}


def capital(country: str) -> str:
  """Looks the capital of a country up.

  Args:
    country: its English name.

  Returns:
    The name of the capital.
  """
  return _CAPITALS.get(country, f"no country is called {country!r}")


def ask_client(arguments: argparse.Namespace) -> None:
  """Goes through the conversation with OpenAI's client.

  Args:
    arguments: of the command.
  """
  client = openai.OpenAI(base_url=arguments.url, api_key=arguments.token)
  messages: list[Any] = []
  for question in QUESTIONS:
    messages.append({"role": "user", "content": question})
    for _ in range(_MOST_REQUESTS):
      told = client.chat.completions.create(
          model=arguments.model,
          messages=messages,
          tools=[_TOOL],
          seed=arguments.seed,
          temperature=0,
          max_tokens=_MOST_TOKENS,
      )
      message: Any = told.choices[0].message
      messages.append(message.model_dump(exclude_none=True))
      if not message.tool_calls:
        break
      for call in message.tool_calls:
        if call.type != "function":
          raise ValueError(f"a call of type {call.type!r} was not offered")
        given = json.loads(call.function.arguments)
        result = {"role": "tool", "content": capital(**given)}
        messages.append(result | {"tool_call_id": call.id})
  for message in messages:
    print(json.dumps({"by": "openai", "message": message}))


async def ask_framework(arguments: argparse.Namespace) -> None:
  """Goes through the conversation with pydantic-ai, twice.

  Args:
    arguments: of the command.
  """
  provider = OpenAIProvider(base_url=arguments.url, api_key=arguments.token)
  settings = ModelSettings(
      temperature=0, max_tokens=_MOST_TOKENS, seed=arguments.seed
  )
  limits = UsageLimits(request_limit=_MOST_REQUESTS)
  agent = Agent(
      OpenAIChatModel(arguments.model, provider=provider),
      tools=[capital],
      model_settings=settings,
  )
  history: list[Any] = []
  for question in QUESTIONS:
    whole = await agent.run(
        question, message_history=history, usage_limits=limits
    )
    history = whole.all_messages()
    _say("pydantic-ai", question, whole.output, len(whole.new_messages()))
  history = []
  for question in QUESTIONS:
    async with agent.run_stream(
        question, message_history=history, usage_limits=limits
    ) as told:
      pieces = [text async for text in told.stream_text(delta=True)]
    history = told.all_messages()
    text = "".join(pieces)
    _say("pydantic-ai, streamed", question, text, len(told.new_messages()))


def _say(by: str, question: str, answer: str, messages: int) -> None:
  """Prints a turn; a tool's call and its result are two messages of it."""
  told = {"question": question, "answer": answer, "messages": messages}
  print(json.dumps({"by": by} | told))


def main() -> None:
  """Asks and prints; see the module."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--url", required=True)
  parser.add_argument("--model", required=True)
  parser.add_argument("--token", default="none")
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  ask_client(arguments)
  asyncio.run(ask_framework(arguments))


if __name__ == "__main__":
  main()
