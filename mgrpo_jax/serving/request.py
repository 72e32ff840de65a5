"""What a client asks for: the body of a chat completion, checked.

Pure functions from bytes to frozen dataclasses. A field that would change the
answer and cannot be honoured is an error, never passed over.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mgrpo_jax.agents.protocol import Function
from mgrpo_jax.serving import conversation, reading
from mgrpo_jax.serving.conversation import Message
from mgrpo_jax.serving.errors import wrong

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LEAST = 1e-6  # top_p; below, float32 sums of a large vocabulary say nothing
_MOST_STOPS, _LONGEST_STOP = 4, 200
_MOST_TOOLS = 64
# What sampling here does not know, and the values at which it changes nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "parallel_tool_calls": (True, False),  # a turn makes one call at most
}
_WITHOUT_EFFECT = (
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "user",
)
_READ = (
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "model",
    "n",
    "logprobs",
    "return_calls",
    "return_token_ids",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
  """A chat completion that is asked for.

  Attributes:
    model: its name.
    messages: at least one.
    functions: that may be called; empty where `tool_choice` is `none`.
    n: choices.
    max_tokens: of each choice; None for what there is room for.
    temperature: None for the server's.
    top_k: of `policy.filters`; 0 for every token.
    top_p: likewise; 1 for every token.
    min_p: likewise; 0 for every token.
    seed: None for any.
    stop: texts that end a choice and are not part of it.
    stream: whether events are wanted.
    include_usage: whether the last event says what was used.
    logprobs: whether each token's log-probability is wanted.
    return_token_ids: whether the ids of prompt and choices are wanted.
    return_calls: whether a team's agent calls are wanted.
  """

  model: str
  messages: tuple[Message, ...]
  functions: tuple[Function, ...]
  n: int
  max_tokens: int | None
  temperature: float | None
  top_k: int
  top_p: float
  min_p: float
  seed: int | None
  stop: tuple[str, ...]
  stream: bool
  include_usage: bool
  logprobs: bool
  return_token_ids: bool
  return_calls: bool


def parse(body: bytes, *, max_choices: int) -> ChatRequest:
  """Reads the body of a request for a chat completion.

  Args:
    body: JSON.
    max_choices: largest n.

  Returns:
    The request.

  Raises:
    RequestError: it is no JSON, or a field is missing, unknown or has a value
      that is not allowed; names the field.
  """
  fields = reading.parse(body)
  reading.check_names(
      fields, read=_READ, neutral=_NEUTRAL, without_effect=_WITHOUT_EFFECT
  )
  options = reading.mapping(fields, "stream_options")
  stream = reading.flag(fields, "stream")
  if options and not stream:
    raise wrong("stream_options", options, "nothing, for stream is not true")
  functions = _functions(fields)
  choice = reading.field(
      fields, "tool_choice", lambda v: v in ("auto", "none"), "'auto', 'none'"
  )
  return ChatRequest(
      model=reading.text(fields, "model"),
      messages=conversation.read(fields),
      functions=() if choice == "none" else functions,
      n=reading.whole(fields, "n", 1, max_choices) or 1,
      max_tokens=_budget(fields),
      temperature=reading.temperature(fields),
      top_k=max(reading.whole(fields, "top_k", -1, 2**31 - 1) or 0, 0),
      top_p=reading.share(fields, "top_p", lowest=_LEAST, absent=1.0),
      min_p=reading.share(fields, "min_p", lowest=0.0, absent=0.0),
      seed=reading.whole(fields, "seed", 0, 2**64 - 1),
      stop=_stops(fields),
      stream=stream,
      include_usage=reading.flag(options, "include_usage"),
      logprobs=reading.flag(fields, "logprobs"),
      return_token_ids=reading.flag(fields, "return_token_ids"),
      return_calls=reading.flag(fields, "return_calls"),
  )


def _budget(fields: Mapping[str, Any]) -> int | None:
  """The tokens that a choice may have, under its old or its new name."""
  old = reading.whole(fields, "max_tokens", 1, 2**31 - 1)
  new = reading.whole(fields, "max_completion_tokens", 1, 2**31 - 1)
  if old is not None and new is not None and old != new:
    raise wrong("max_tokens", old, f"{new}, max_completion_tokens, or neither")
  return old if new is None else new


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
  """The texts that end a choice."""

  def valid(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return (
        isinstance(stops, list)
        and len(stops) <= _MOST_STOPS
        and all(
            isinstance(one, str) and 0 < len(one) <= _LONGEST_STOP
            for one in stops
        )
    )

  allowed = f"up to {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters"
  value = reading.field(fields, "stop", valid, allowed) or []
  return (value,) if isinstance(value, str) else tuple(value)


def _functions(fields: Mapping[str, Any]) -> tuple[Function, ...]:
  """The functions that may be called."""
  found: dict[str, Function] = {}
  for number, tool in enumerate(reading.objects(fields, "tools", _MOST_TOOLS)):
    place = f"tools[{number}]"
    if tool.get("type") != "function":
      raise wrong(f"{place}.type", tool.get("type"), "'function'")
    inner = reading.mapping(tool, f"{place}.function")
    name = reading.text(inner, f"{place}.function.name")
    if not _NAME.fullmatch(name) or name in found:
      raise wrong(
          f"{place}.function.name", name, f"{_NAME.pattern}, each name once"
      )
    path = f"{place}.function.description"
    described = reading.field(
        inner, path, lambda v: isinstance(v, str), "a text"
    )
    found[name] = Function(
        kind="tool",
        name=name,
        description=described or "",
        schema=_schema(inner, f"{place}.function.parameters"),
    )
  return tuple(found.values())


def _schema(fields: Mapping[str, Any], path: str) -> dict[str, Any]:
  """The JSON schema of a function's arguments."""

  def valid(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("type", "object") != "object":
      return False
    properties = value.get("properties", {})
    required = value.get("required", [])
    return (
        isinstance(properties, dict)
        and all(isinstance(one, dict) for one in properties.values())
        and isinstance(required, list)
        and all(isinstance(name, str) for name in required)
    )

  allowed = "a JSON schema of an object, with properties and required"
  given = reading.field(fields, path, valid, allowed) or {}
  return {"type": "object", "properties": {}, "required": []} | given
