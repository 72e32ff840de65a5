"""The protocol of Llama 3.1: a turn that is a JSON object is a call.

`{"name": …, "parameters": {…}}`, or else an answer. Delegation is a call named
after the child role.
"""

import json
from collections.abc import Mapping, Sequence

from mgrpo_jax.agents.protocol import (
    Action,
    Function,
    Malformed,
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

_SYSTEM = (  # the words and the missing spaces are the template's
    "You have access to the following functions. To call a function, please "
    "respond with JSON for a function call."
    'Respond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}."
    "Do not use variables.\n\n"
)


def _system(prompt: str, functions: Sequence[Function]) -> Pieces:
  """The functions in the template's words, then the prompt."""
  if not functions:
    return prompt.strip()
  signatures = (
      json.dumps(signature(function), ensure_ascii=False, indent=4) + "\n\n"
      for function in functions
  )
  return (_SYSTEM, *signatures, prompt.strip())


def _parse(
    utterance: Utterance, functions: Mapping[str, Function]
) -> Action | Malformed:
  """Reads a call, or else the whole text as the answer."""
  problem = structural_problem(utterance)
  if problem:
    return Malformed(reason=problem)
  text = scrub(utterance.text).strip()
  if not text:
    return Malformed(reason="the turn is empty")
  call = load_json(text)
  if not isinstance(call, dict | list) and not text.startswith('{"name"'):
    return answer(text)
  if not isinstance(call, dict) or set(call) != {"name", "parameters"}:
    return Malformed(
        reason="a call is one JSON object with the keys name and parameters"
    )
  return checked_call(call["name"], call["parameters"], functions)


def _render(action: Action) -> Pieces:
  """Writes the call, or the answer's text."""
  if action.kind == "answer":
    return str(action.arguments["text"])
  call = {"name": action.name, "parameters": dict(action.arguments)}
  return json.dumps(call, ensure_ascii=False)


def _wrap(text: str) -> Pieces:
  """The result as a JSON string, as the template writes it."""
  return json.dumps(scrub(text), ensure_ascii=False)


LLAMA = Protocol(
    name="llama",
    system=_system,
    parse=_parse,
    render=_render,
    argument=argument_text,
    wrap=_wrap,
)
