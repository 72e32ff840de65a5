"""Text to actions and back: what a turn means.

A protocol is a value, a frozen dataclass of pure functions. It works on an
`Utterance`, the text of a turn with its control tokens already set apart by
the chat format, so ordinary text can never pass for structure.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mgrpo_jax.agents import team as team_lib

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_MAX_JSON_CHARS = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
  """Something a role may address in a turn.

  Attributes:
    kind: `tool`, or `call` for a child role.
    name: how it is addressed.
    description: one sentence for the model.
    schema: JSON schema of its arguments, an object of scalar properties.
  """

  kind: Literal["tool", "call"]
  name: str
  description: str
  schema: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utterance:
  """A turn's text, its control tokens set apart.

  Attributes:
    tag: name of the control token it begins with; empty if none.
    text: the ordinary text.
    ended: whether it ends with the stop token.
    stray: names of control tokens found where none belongs.
  """

  tag: str
  text: str
  ended: bool = True
  stray: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
  """What a well-formed turn asks for.

  Attributes:
    kind: a `tool` run, a child `call`, or the final `answer`.
    name: the tool or child role; empty for answers.
    arguments: by parameter name; `{'text': …}` for answers.
  """

  kind: Literal["tool", "call", "answer"]
  name: str
  arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Malformed:
  """A turn that means nothing.

  Attributes:
    reason: a short phrase the model is shown.
  """

  reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How actions are written; four pure functions.

  Attributes:
    name: for records and messages.
    system: (role's prompt, its functions) to the system message.
    parse: (utterance, functions by name) to what the turn means.
    render: action to the utterance that `parse` reads as this action.
    argument: action to the text kept in records.
    wrap: result text to what is put into the stream.
  """

  name: str
  system: Callable[[str, Sequence[Function]], str]
  parse: Callable[[Utterance, Mapping[str, Function]], Action | Malformed]
  render: Callable[[Action], Utterance]
  argument: Callable[[Action], str]
  wrap: Callable[[str], str]


def answer(text: str) -> Action:
  """The action of answering with a text."""
  return Action(kind="answer", name="", arguments={"text": text})


def delegation(name: str) -> Function:
  """A child role as a function of its parent.

  Args:
    name: the child role.

  Returns:
    A function of one argument, `request`.
  """
  return Function(
      kind="call",
      name=name,
      description=(
          f"Hand a sub-task to the {name}, who sees nothing but the request "
          "and returns a report."
      ),
      schema={
          "type": "object",
          "properties": {
              "request": {
                  "type": "string",
                  "description": "The sub-task, complete in itself.",
              }
          },
          "required": ["request"],
      },
  )


def scrub(text: str) -> str:
  """Makes any Python string valid Unicode: lone surrogates become `?`."""
  return text.encode("utf-8", "replace").decode("utf-8")


def check_arguments(
    schema: Mapping[str, Any], arguments: Mapping[str, Any]
) -> str:
  """Compares arguments with a schema of scalar properties.

  Args:
    schema: JSON schema of an object; types may be lists of types.
    arguments: by name.

  Returns:
    What is wrong, in a short phrase; empty where nothing is.
  """
  properties = schema["properties"]
  for name in schema["required"]:
    if name not in arguments:
      return f"argument {name} is missing"
  for name, value in arguments.items():
    if name not in properties:
      return f"unknown argument {scrub(name)[:40]}"
    wanted = properties[name]["type"]
    kinds = [wanted] if isinstance(wanted, str) else list(wanted)
    allowed = tuple(t for kind in kinds for t in _TYPES[kind])
    is_stray_bool = isinstance(value, bool) and bool not in allowed
    if is_stray_bool or not isinstance(value, allowed):
      return f"argument {name} must be {' or '.join(kinds)}"
  return ""


# --- compact: `<tag>text<end>`, every tag one control token ---


def compact_tags(team: team_lib.Team) -> tuple[str, ...]:
  """The control tokens that a team needs under the compact protocol.

  Args:
    team: whose tools and roles are addressed by tag.

  Returns:
    Names such as `<search>`: structure first, then tools, then child roles.
  """
  tools = (tool for role in team.roles for tool in role.tools)
  children = (child for role in team.roles for child in role.calls)
  names = ("task", "result", "end", "answer", *tools, *children)
  return tuple(dict.fromkeys(f"<{name}>" for name in names))


def _compact_system(prompt: str, functions: Sequence[Function]) -> str:
  """The prompt alone; raises for a function of several arguments."""
  for function in functions:
    required = list(function.schema["required"])
    if len(required) != 1:
      raise ValueError(
          f"compact protocol: {function.name!r} needs arguments {required}, "
          "only functions of one argument can be addressed"
      )
  return prompt


def _compact_parse(
    utterance: Utterance, functions: Mapping[str, Function]
) -> Action | Malformed:
  """Reads `<tag>text<end>`."""
  problem = _structural_problem(utterance)
  if problem:
    return Malformed(reason=problem)
  text = scrub(utterance.text).strip()
  name = utterance.tag.strip("<>")
  if not name:
    return Malformed(reason="no tag")
  if name != "answer" and name not in functions:
    return Malformed(reason=f"no {name} here")
  if not text:
    return Malformed(reason="empty")
  if name == "answer":
    return answer(text)
  function = functions[name]
  arguments = {function.schema["required"][0]: text}
  problem = check_arguments(function.schema, arguments)
  if problem:
    return Malformed(reason=problem)
  return Action(kind=function.kind, name=name, arguments=arguments)


def _compact_argument(action: Action) -> str:
  """The only argument."""
  if len(action.arguments) != 1:
    raise ValueError(
        f"compact protocol: {action.name!r} with arguments "
        f"{sorted(action.arguments)}, exactly one can be written"
    )
  return str(next(iter(action.arguments.values())))


def _compact_render(action: Action) -> Utterance:
  """Writes `<name>argument`."""
  name = "answer" if action.kind == "answer" else action.name
  return Utterance(tag=f"<{name}>", text=_compact_argument(action))


# --- hermes: `<tool_call>{json}</tool_call>`, anything else is the answer ---

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_HERMES_SYSTEM = """\
# Tools

You may call one function in each turn to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For a function call, return a json object with function name and arguments \
within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>

When you know the answer, write only the answer, without a function call."""


def _hermes_system(prompt: str, functions: Sequence[Function]) -> str:
  """The prompt, then the functions in the words Qwen 2.5 was trained on."""
  if not functions:
    return prompt
  signatures = "\n".join(
      json.dumps(
          {
              "type": "function",
              "function": {
                  "name": function.name,
                  "description": function.description,
                  "parameters": function.schema,
              },
          },
          ensure_ascii=False,
      )
      for function in functions
  )
  tools = _HERMES_SYSTEM.format(signatures=signatures)
  return f"{prompt}\n\n{tools}" if prompt else tools


def _hermes_parse(
    utterance: Utterance, functions: Mapping[str, Function]
) -> Action | Malformed:
  """Reads one tool call, or else the whole text as the answer."""
  problem = _structural_problem(utterance)
  if problem:
    return Malformed(reason=problem)
  text = scrub(utterance.text).strip()
  if _OPEN in text or _CLOSE in text:
    return _hermes_call(text, functions)
  if text.startswith("<answer>") and text.endswith("</answer>"):
    text = text[len("<answer>") : -len("</answer>")].strip()
  if not text:
    return Malformed(reason="the turn is empty")
  if isinstance(_load_json(text), dict | list):
    return Malformed(reason=f"a function call goes inside {_OPEN}{_CLOSE}")
  return answer(text)


def _hermes_call(
    text: str, functions: Mapping[str, Function]
) -> Action | Malformed:
  """Reads the one tool call of a turn; text before it is free."""
  if text.count(_OPEN) != 1 or text.count(_CLOSE) != 1:
    return Malformed(reason=f"write exactly one {_OPEN}…{_CLOSE} in a turn")
  body, rest = (
      text.split(_OPEN)[1].split(_CLOSE, 1)
      if (text.index(_OPEN) < text.index(_CLOSE))
      else ("", "misplaced")
  )
  if rest.strip():
    return Malformed(reason=f"a turn ends with {_CLOSE}")
  call = _load_json(body)
  if isinstance(call, list) and len(call) == 1:  # as SmolLM2 writes it
    call = call[0]
  if not isinstance(call, dict):
    return Malformed(reason="the tool call is not a JSON object")
  if set(call) != {"name", "arguments"}:
    return Malformed(reason="a tool call has the keys name and arguments")
  name, arguments = call["name"], call["arguments"]
  if not isinstance(name, str) or name not in functions:
    known = ", ".join(functions) or "none"
    return Malformed(reason=f"unknown function; there are: {known}")
  if not isinstance(arguments, dict):
    return Malformed(reason="arguments must be a JSON object")
  problem = check_arguments(functions[name].schema, arguments)
  if problem:
    return Malformed(reason=problem)
  clean = {
      key: scrub(value) if isinstance(value, str) else value
      for key, value in arguments.items()
  }
  return Action(kind=functions[name].kind, name=name, arguments=clean)


def _load_json(text: str) -> Any:
  """The JSON value of a text; None where it holds none."""
  if len(text) > _MAX_JSON_CHARS:
    return None
  try:
    return json.loads(text, parse_constant=_refuse_constant)
  except (ValueError, RecursionError):
    return None


def _refuse_constant(name: str) -> None:
  """Refuses NaN and Infinity, which JSON does not have."""
  raise ValueError(f"{name} is not JSON")


def _hermes_argument(action: Action) -> str:
  """The arguments as JSON; an answer's text as it is."""
  if action.kind == "answer":
    return str(action.arguments["text"])
  return json.dumps(dict(action.arguments), ensure_ascii=False)


def _hermes_render(action: Action) -> Utterance:
  """Writes the tool call, or the answer's text."""
  if action.kind == "answer":
    return Utterance(tag="", text=str(action.arguments["text"]))
  call = {"name": action.name, "arguments": dict(action.arguments)}
  body = json.dumps(call, ensure_ascii=False)
  return Utterance(tag="", text=f"{_OPEN}\n{body}\n{_CLOSE}")


def _hermes_wrap(text: str) -> str:
  """The result inside the tags models were trained to read it in."""
  return f"<tool_response>\n{text}\n</tool_response>"


def _structural_problem(utterance: Utterance) -> str:
  """What is wrong before any reading of the text; empty if nothing."""
  if utterance.stray:
    return f"stray {utterance.stray[0]}"
  if not utterance.ended:
    return "the turn was cut off"
  return ""


def _same(text: str) -> str:
  """The text itself."""
  return text


COMPACT = Protocol(
    name="compact",
    system=_compact_system,
    parse=_compact_parse,
    render=_compact_render,
    argument=_compact_argument,
    wrap=_same,
)

HERMES = Protocol(
    name="hermes",
    system=_hermes_system,
    parse=_hermes_parse,
    render=_hermes_render,
    argument=_hermes_argument,
    wrap=_hermes_wrap,
)
