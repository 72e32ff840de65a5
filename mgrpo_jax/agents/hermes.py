"""The hermes protocol: `<tool_call>{json}</tool_call>`, or else an answer.

It is what Qwen and many other instruction-tuned models were trained on.
Delegation is a tool call named after the child role; a turn without a tool
call is the answer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax.agents.protocol import (
    Action,
    Function,
    Malformed,
    Protocol,
    Utterance,
    answer,
    check_arguments,
    scrub,
    structural_problem,
)

_MAX_JSON_CHARS = 20_000  # no turn is that long; bounds the parser's work
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_SYSTEM = """\
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


def _system(prompt: str, functions: Sequence[Function]) -> str:
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
  tools = _SYSTEM.format(signatures=signatures)
  return f"{prompt}\n\n{tools}" if prompt else tools


def _parse(
    utterance: Utterance, functions: Mapping[str, Function]
) -> Action | Malformed:
  """Reads one tool call, or else the whole text as the answer."""
  problem = structural_problem(utterance)
  if problem:
    return Malformed(reason=problem)
  text = scrub(utterance.text).strip()
  if _OPEN in text or _CLOSE in text:
    return _call(text, functions)
  if text.startswith("<answer>") and text.endswith("</answer>"):
    text = text[len("<answer>") : -len("</answer>")].strip()
  if not text:
    return Malformed(reason="the turn is empty")
  if isinstance(_load_json(text), dict | list):
    return Malformed(reason=f"a function call goes inside {_OPEN}{_CLOSE}")
  return answer(text)


def _call(text: str, functions: Mapping[str, Function]) -> Action | Malformed:
  """Reads the one tool call of a turn; text before it is free."""
  before, _, after = text.partition(_OPEN)
  body, _, rest = after.partition(_CLOSE)
  counts = (text.count(_OPEN), text.count(_CLOSE))
  if counts != (1, 1) or _CLOSE in before:
    return Malformed(reason=f"write exactly one {_OPEN}…{_CLOSE} in a turn")
  if rest:
    return Malformed(reason=f"a turn ends with {_CLOSE}")
  call = _load_json(body)
  if isinstance(call, list) and len(call) == 1:  # as SmolLM2 writes it
    call = call[0]
  if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
    return Malformed(
        reason="a tool call is a JSON object with the keys name and arguments"
    )
  return _checked(call["name"], call["arguments"], functions)


def _checked(
    name: Any, arguments: Any, functions: Mapping[str, Function]
) -> Action | Malformed:
  """The action, if the function exists and takes these arguments."""
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


def _argument(action: Action) -> str:
  """The arguments as JSON; an answer's text as it is."""
  if action.kind == "answer":
    return str(action.arguments["text"])
  return json.dumps(dict(action.arguments), ensure_ascii=False)


def _render(action: Action) -> Utterance:
  """Writes the tool call, or the answer's text."""
  if action.kind == "answer":
    return Utterance(tag="", text=str(action.arguments["text"]))
  call = {"name": action.name, "arguments": dict(action.arguments)}
  body = json.dumps(call, ensure_ascii=False)
  return Utterance(tag="", text=f"{_OPEN}\n{body}\n{_CLOSE}")


def _wrap(text: str) -> str:
  """The result inside the tags models were trained to read it in."""
  return f"<tool_response>\n{text}\n</tool_response>"


HERMES = Protocol(
    name="hermes",
    system=_system,
    parse=_parse,
    render=_render,
    argument=_argument,
    wrap=_wrap,
)
