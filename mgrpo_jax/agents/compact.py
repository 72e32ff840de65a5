"""The compact protocol: a turn is `<tag>text<end>`.

Every tag is one control token, for small models trained from scratch; a
function has one argument, the text.
"""

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
    check_arguments,
    scrub,
    structural_problem,
)
from mgrpo_jax.agents.team import Team


def compact_tags(team: Team) -> tuple[str, ...]:
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


def _system(prompt: str, functions: Sequence[Function]) -> str:
  """The prompt alone; raises for a function of several arguments."""
  for function in functions:
    required = list(function.schema["required"])
    if len(required) != 1:
      raise ValueError(
          f"compact protocol: {function.name!r} needs arguments {required}, "
          "only functions of one argument can be addressed"
      )
  return prompt


def _parse(
    utterance: Utterance, functions: Mapping[str, Function]
) -> Action | Malformed:
  """Reads `<tag>text<end>`."""
  problem = structural_problem(utterance)
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


def _argument(action: Action) -> str:
  """The only argument."""
  if len(action.arguments) != 1:
    raise ValueError(
        f"compact protocol: {action.name!r} with arguments "
        f"{sorted(action.arguments)}, exactly one can be written"
    )
  return str(next(iter(action.arguments.values())))


def _render(action: Action) -> Pieces:
  """Writes `<name>argument`."""
  name = "answer" if action.kind == "answer" else action.name
  return (Mark(f"<{name}>"), _argument(action))


def _same(text: str) -> str:
  """The text itself."""
  return text


COMPACT = Protocol(
    name="compact",
    system=_system,
    parse=_parse,
    render=_render,
    argument=_argument,
    wrap=_same,
)
