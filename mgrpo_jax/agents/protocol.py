"""Text to actions and back: what a turn means.

A protocol is a value, a frozen dataclass of pure functions. It works on an
`Utterance`, the text of a turn with its control tokens already set apart by
the chat format, so ordinary text can never pass for structure.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_MAX_JSON_CHARS = 20_000  # no turn is that long; bounds the parser's work


@dataclasses.dataclass(frozen=True)
class Mark:
  """Structure between pieces of text, such as `<tool_call>`.

  A chat format writes it as the control token of this name, so that no text
  can pass for it. Where a tokenizer has no such token it is spelled out.

  Attributes:
    name: of the token.
  """

  name: str


# What is written: text and structure. A string is a sequence of its letters,
# and adjacent text is joined, so plain text is pieces too.
Pieces = Sequence[str | Mark]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
  """Something a role may address in a turn.

  Attributes:
    kind: `tool`, or `call` for a child role.
    name: how it is addressed.
    description: one sentence for the model.
    schema: JSON schema of its arguments, an object whose properties have types.
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
  """How actions are written; pure functions.

  Attributes:
    name: for records and messages.
    system: (role's prompt, its functions) to the system message.
    parse: (utterance, functions by name) to what the turn means.
    render: action to the pieces that `parse` reads as this action, once a
      chat format has written and read them.
    argument: action to the text kept in records.
    wrap: result text to what is put into the stream.
  """

  name: str
  system: Callable[[str, Sequence[Function]], Pieces]
  parse: Callable[[Utterance, Mapping[str, Function]], Action | Malformed]
  render: Callable[[Action], Pieces]
  argument: Callable[[Action], str]
  wrap: Callable[[str], Pieces]


def spelled(pieces: Pieces) -> str:
  """Pieces as a reader sees them, marks by their names."""
  return "".join(p.name if isinstance(p, Mark) else p for p in pieces)


def joined(pieces: Pieces) -> list[str | Mark]:
  """The same pieces, none empty and no text next to text."""
  whole: list[str | Mark] = []
  texts: list[str] = []
  for piece in (*pieces, Mark("")):
    if isinstance(piece, str):
      texts.append(piece)
      continue
    if any(texts):
      whole.append("".join(texts))
    texts = []
    whole.append(piece)
  return whole[:-1]


def trimmed(pieces: Pieces) -> list[str | Mark]:
  """The pieces without white space at either end."""
  whole = joined(pieces)
  if whole and isinstance(whole[0], str):
    whole[0] = whole[0].lstrip()
  if whole and isinstance(whole[-1], str):
    whole[-1] = whole[-1].rstrip()
  return whole


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
  """Compares arguments with the names and types of a schema's properties.

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


def structural_problem(utterance: Utterance) -> str:
  """What is wrong with a turn whatever its text says.

  Args:
    utterance: the turn.

  Returns:
    A short phrase; empty where nothing is wrong.
  """
  if utterance.stray:
    return f"stray {utterance.stray[0]}"
  if not utterance.ended:
    return "the turn was cut off"
  return ""


def checked_call(
    name: Any, arguments: Any, functions: Mapping[str, Function]
) -> Action | Malformed:
  """Makes a call of what was read as JSON, or says what is wrong with it.

  Args:
    name: of the function, if it is one.
    arguments: by name, if they are.
    functions: by name.

  Returns:
    The action, if the function exists and takes these arguments.
  """
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


def signature(function: Function) -> dict[str, Any]:
  """A function as chat templates take it."""
  return {
      "type": "function",
      "function": {
          "name": function.name,
          "description": function.description,
          "parameters": function.schema,
      },
  }


def argument_text(action: Action) -> str:
  """Gives the arguments of a call for records, as JSON.

  Args:
    action: a call, or an answer, whose text is given as it is.

  Returns:
    The text.
  """
  if action.kind == "answer":
    return str(action.arguments["text"])
  return json.dumps(dict(action.arguments), ensure_ascii=False)


def load_json(text: str) -> Any:
  """The JSON value of a text; None where it holds none or is too long."""
  if len(text) > _MAX_JSON_CHARS:
    return None
  try:
    return json.loads(text, parse_constant=_refuse_constant)
  except (ValueError, RecursionError):
    return None


def _refuse_constant(name: str) -> None:
  """Refuses NaN and Infinity, which JSON does not have."""
  raise ValueError(f"{name} is not JSON")
