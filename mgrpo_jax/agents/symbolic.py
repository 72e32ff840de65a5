"""Symbolic policies: plain code that plays a role, without weights.

Each function says what a role does next, `actor` makes an actor of it. Symbolic
policies take part in rollouts like any other; nothing trains them.
"""

import dataclasses
from collections.abc import Callable, Mapping

from mgrpo_jax.agents.actor import Actor, Moment, scripted
from mgrpo_jax.agents.call import fit
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.errors import ToolError
from mgrpo_jax.agents.protocol import Action, Protocol, answer
from mgrpo_jax.agents.tools import ERROR, compute


def actor(
    act: Callable[[Moment], Action], *, chat: Chat, protocol: Protocol
) -> Actor:
  """An actor that is plain code, and whose turns fit.

  Args:
    act: the next action, with one argument at most; of that as much is kept as
      the tokens of a turn hold.
    chat: messages to tokens.
    protocol: text to actions.

  Returns:
    The actor.
  """

  def fitted(moment: Moment) -> Action:
    action = act(moment)
    ((name, value),) = action.arguments.items()

    def cut(text: str) -> Action:
      return dataclasses.replace(action, arguments={name: text})

    def encode(text: str) -> list[int]:
      return list(chat.write(protocol.render(cut(text))))

    text = str(value)
    if action.kind == "answer":  # what a page says must not pass for a call
      text = text.replace("<", "(")
    return cut(fit(text, encode, moment.sampling.max_new_tokens))

  return scripted(fitted, chat=chat, protocol=protocol)


def calculate(moment: Moment) -> Action:
  """Answers a request with its value, at once.

  Args:
    moment: whose request is an arithmetic expression, see `tools.compute`.

  Returns:
    The answer: a number, or what is wrong with the expression.
  """
  try:
    return answer(compute(moment.request))
  except ToolError as error:
    return answer(f"{ERROR}{error}")


def look_up(moment: Moment) -> Action:
  """Searches for the request, opens the first result and answers with it.

  Args:
    moment: of a role with the tools `search` and `visit`.

  Returns:
    The next action; the answer says so where nothing was found.
  """
  if not moment.turns:
    arguments = {"query": moment.request}
    return Action(kind="tool", name="search", arguments=arguments)
  last = moment.turns[-1]
  if last.name != "search" or last.result.startswith(ERROR):
    return answer(last.result)
  listed = last.result.split(maxsplit=1)
  if not listed or not listed[0].isdigit():
    return answer(last.result)
  arguments = {"page": listed[0]}
  return Action(kind="tool", name="visit", arguments=arguments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
  """Plain code that can play a role, and what the role must allow it.

  Attributes:
    act: the next action.
    tools: names of those that it uses.
    turns: that it takes at most.
  """

  act: Callable[[Moment], Action]
  tools: tuple[str, ...]
  turns: int


CODES: Mapping[str, Code] = {
    "calculate": Code(act=calculate, tools=(), turns=1),
    "look_up": Code(act=look_up, tools=("search", "visit"), turns=3),
}
