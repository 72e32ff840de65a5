"""The messages of a request, checked one by one; `prompt` knows their order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mgrpo_jax.serving import reading
from mgrpo_jax.serving.errors import RequestError, wrong

ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_CALLS = 64  # of a message
_MOST_MESSAGES = 10_000
_MESSAGE_FIELDS = (
    "annotations",
    "content",
    "name",
    "refusal",
    "role",
    "tool_call_id",
    "tool_calls",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
  """A call that an assistant's message makes.

  Attributes:
    id: that its result refers to.
    name: of the function.
    arguments: by name.
  """

  id: str
  name: str
  arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """One message of a conversation.

  Attributes:
    role: one of `ROLES`.
    content: its text; may be empty.
    tool_calls: of an assistant.
    tool_call_id: of a tool: the call whose result it is, else empty.
  """

  role: str
  content: str
  tool_calls: tuple[ToolCall, ...] = ()
  tool_call_id: str = ""


def read(fields: Mapping[str, Any]) -> tuple[Message, ...]:
  """The conversation."""
  found = reading.objects(fields, "messages", _MOST_MESSAGES)
  if not found:
    raise wrong("messages", found, "at least one message")
  return tuple(
      _message(one, f"messages[{number}]") for number, one in enumerate(found)
  )


def _message(value: Mapping[str, Any], place: str) -> Message:
  """One message."""
  fields = {k: v for k, v in value.items() if v is not None}
  for name in fields:
    if name not in _MESSAGE_FIELDS:
      raise wrong(place, name, ", ".join(_MESSAGE_FIELDS))
  role = reading.text(fields, f"{place}.role")
  if role not in ROLES:
    raise wrong(f"{place}.role", role, ", ".join(ROLES))
  calls = tuple(
      _tool_call(one, f"{place}.tool_calls[{number}]")
      for number, one in enumerate(
          reading.objects(fields, f"{place}.tool_calls", _MOST_CALLS)
      )
  )
  if calls and role != "assistant":
    raise wrong(f"{place}.tool_calls", role, "messages of the assistant")
  if "content" not in fields and not calls:
    raise RequestError(
        400, f"{place}.content: missing", param=f"{place}.content"
    )
  answered = ""
  if role == "tool":
    answered = reading.text(fields, f"{place}.tool_call_id")
  return Message(
      role=role,
      content=_content(fields.get("content", ""), f"{place}.content"),
      tool_calls=calls,
      tool_call_id=answered,
  )


def _content(value: Any, path: str) -> str:
  """A message's text, which may come in parts."""
  parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
  allowed = "a text, or a list of parts of type text"
  if not isinstance(parts, list):
    raise wrong(path, value, allowed)
  for part in parts:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    if not is_text or not isinstance(part.get("text"), str):
      raise wrong(path, part, allowed)
  return "".join(part["text"] for part in parts)


def _tool_call(value: Mapping[str, Any], place: str) -> ToolCall:
  """A call that the assistant made earlier."""
  inner = reading.mapping(value, f"{place}.function")
  path = f"{place}.function.arguments"
  text = reading.text(inner, path)
  try:
    arguments = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise wrong(path, text, "a JSON object, as text") from error
  if not isinstance(arguments, dict):
    raise wrong(path, text, "a JSON object, as text")
  return ToolCall(
      id=reading.text(value, f"{place}.id"),
      name=reading.text(inner, f"{place}.function.name"),
      arguments=arguments,
  )
