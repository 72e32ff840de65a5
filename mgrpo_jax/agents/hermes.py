"""The hermes protocol: `<tool_call>{json}</tool_call>`, or else an answer.

It is what Qwen and many other instruction-tuned models were trained on.
Delegation is a tool call named after the child role; a turn without a tool
call is the answer.
"""

import json
from collections.abc import Mapping, Sequence

from mgrpo_jax.agents.protocol import (
    Action,
    Function,
    Malformed,
    Mark,
    Pieces,
    Protocol,
    Utterance,
    answer,
    argument_text,
    checked_call,
    load_json,
    scrub,
    signature,
    structural_problem,
)

GUIDANCE = """\
Call at most one function in a turn. When you know the answer, write only \
the answer, without a function call."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAGS = (Mark(_OPEN), Mark(_CLOSE))
_TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments \
within """
_SHAPE = '\n{"name": <function-name>, "arguments": <args-json-object>}\n'


def _system(prompt: str, functions: Sequence[Function]) -> Pieces:
  """The prompt and how we play, then the functions as Qwen is told them."""
  if not functions:
    return prompt
  signatures = "\n".join(
      json.dumps(signature(function), ensure_ascii=False)
      for function in functions
  )
  head = f"{prompt}\n\n{GUIDANCE}" if prompt else GUIDANCE
  return (
      f"{head}\n\n{_TOOLS.format(signatures=signatures)}",
      *_TAGS,
      " XML tags:\n",
      _TAGS[0],
      _SHAPE,
      _TAGS[1],
  )


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
  if isinstance(load_json(text), dict | list):
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
  call = load_json(body)
  if isinstance(call, list) and len(call) == 1:  # as SmolLM2 writes it
    call = call[0]
  if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
    return Malformed(
        reason="a tool call is a JSON object with the keys name and arguments"
    )
  return checked_call(call["name"], call["arguments"], functions)


def _render(action: Action) -> Pieces:
  """Writes the tool call, or the answer's text."""
  if action.kind == "answer":
    return str(action.arguments["text"])
  call = {"name": action.name, "arguments": dict(action.arguments)}
  body = json.dumps(call, ensure_ascii=False)
  return (_TAGS[0], f"\n{body}\n", _TAGS[1])


def _wrap(text: str) -> Pieces:
  """The result inside the tags models were trained to read it in."""
  return (Mark("<tool_response>"), f"\n{text}\n", Mark("</tool_response>"))


HERMES = Protocol(
    name="hermes",
    system=_system,
    parse=_parse,
    render=_render,
    argument=argument_text,
    wrap=_wrap,
)
