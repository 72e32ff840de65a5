"""Conversations to tokens, in a policy's own chat format and protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.protocol import (
    Action,
    Function,
    Pieces,
    Protocol,
    answer,
)
from mgrpo_jax.serving.conversation import Message
from mgrpo_jax.serving.errors import RequestError, wrong
from mgrpo_jax.serving.request import ChatRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
  """How a protocol that has conversations writes calls.

  Attributes:
    marks: texts from which on a turn may be one.
    beside_text: whether a turn with a call may begin with text.
  """

  marks: tuple[str, ...]
  beside_text: bool


# By name of the protocol; others have one request and no tools of a client's.
CALLS: Mapping[str, Calls] = {
    "hermes": Calls(marks=("<tool_call>",), beside_text=True),
    "llama": Calls(marks=("{",), beside_text=False),
}
_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")


def encode(
    request: ChatRequest, *, chat: Chat, protocol: Protocol
) -> list[int]:
  """The token stream that a conversation is.

  Args:
    request: its messages and functions.
    chat: messages to tokens.
    protocol: how calls and results are written.

  Returns:
    The ids before the first token to be sampled.

  Raises:
    RequestError: the messages are in an order, or of a kind, that this chat
      format or protocol does not have; names the message.
  """
  if request.functions and protocol.name not in CALLS:
    raise RequestError(
        400,
        f"tools: model {request.model!r} speaks the {protocol.name} protocol,"
        f" allowed: none; policies of {' and '.join(CALLS)} take tools",
        param="tools",
    )
  messages = list(enumerate(request.messages))
  system = ""
  if messages[0][1].role in ("system", "developer"):
    system = messages.pop(0)[1].content
  if not messages or messages[0][1].role != "user":
    raise RequestError(
        400,
        "messages: must be a system message, if any, and then one of the user",
        param="messages",
    )
  if len(messages) > 1 and protocol.name not in CALLS:
    raise RequestError(
        400,
        f"messages: model {request.model!r} speaks the {protocol.name}"
        " protocol, allowed: one message of the user, the last",
        param="messages",
    )
  ids = chat.open(
      protocol.system(system, request.functions), messages[0][1].content
  )
  for number, told, reply in _exchanges(messages[1:]):
    ids += chat.write(_turn(number, told, protocol))
    ids += _reply(reply, chat, protocol)
  return ids


def checkable(functions: Sequence[Function]) -> dict[str, Function]:
  """Functions whose schemas say no more than protocols check.

  Args:
    functions: of a request, with any schemas.

  Returns:
    By name; every property has types, all of them where it named none or
    names that JSON does not have.
  """
  return {
      one.name: Function(
          kind=one.kind,
          name=one.name,
          description=one.description,
          schema=_plain(one.schema),
      )
      for one in functions
  }


def _plain(schema: Mapping[str, Any]) -> dict[str, Any]:
  """The names and types of a schema's properties."""
  types = {}
  for name, one in schema["properties"].items():
    wanted = one.get("type")
    kinds = wanted if isinstance(wanted, list) else [wanted]
    is_known = all(kind in _TYPES for kind in kinds)
    types[name] = {"type": kinds if is_known else list(_TYPES)}
  return {
      "type": "object",
      "properties": types,
      "required": schema["required"],
  }


def _exchanges(
    messages: Sequence[tuple[int, Message]],
) -> list[tuple[int, Message, Message]]:
  """What the assistant said, by number, and what it was told then."""
  for position, (number, message) in enumerate(messages):
    allowed = ("user", "tool") if position % 2 else ("assistant",)
    if message.role not in allowed:
      raise wrong(
          f"messages[{number}].role",
          message.role,
          f"{' or '.join(allowed)} here; turns alternate",
      )
  if len(messages) % 2:
    number = messages[-1][0]
    raise wrong(
        f"messages[{number}].role", "assistant", "user or tool as the last"
    )
  pairs = []
  for (number, told), (_, reply) in zip(
      messages[::2], messages[1::2], strict=True
  ):
    _check_pair(number + 1, told, reply)
    pairs.append((number, told, reply))
  return pairs


def _check_pair(number: int, told: Message, reply: Message) -> None:
  """Raises unless a call is followed by its result, and only a call is."""
  if len(told.tool_calls) > 1:
    raise wrong(
        f"messages[{number - 1}].tool_calls",
        [call.name for call in told.tool_calls],
        "one call a turn",
    )
  ids = [call.id for call in told.tool_calls]
  if reply.role == "tool" and reply.tool_call_id not in ids:
    raise wrong(
        f"messages[{number}].tool_call_id",
        reply.tool_call_id,
        f"the id of the call before it, {ids}",
    )
  if reply.role == "user" and ids:
    raise wrong(
        f"messages[{number}].role", "user", f"tool, the result of {ids}"
    )


def _turn(number: int, message: Message, protocol: Protocol) -> Pieces:
  """What the assistant wrote."""
  if not message.tool_calls:
    return protocol.render(answer(message.content))
  call = message.tool_calls[0]
  action = Action(kind="tool", name=call.name, arguments=call.arguments)
  if not CALLS[protocol.name].beside_text:
    if message.content.strip():
      raise wrong(
          f"messages[{number}].content",
          message.content,
          f"none beside a call, under the {protocol.name} protocol",
      )
    return protocol.render(action)
  joint = "" if message.content[-1:] in ("", "\n") else "\n"
  return (message.content, joint, *protocol.render(action))


def _reply(message: Message, chat: Chat, protocol: Protocol) -> list[int]:
  """What the assistant was told: a result, or the user's next message."""
  if message.role == "tool":
    return chat.extend(True, protocol.wrap(message.content))
  return chat.ask(True, message.content)
