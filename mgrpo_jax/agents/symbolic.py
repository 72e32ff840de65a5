"""Symbolic policies: plain code that plays a role, without weights.

Each function says what a role does next, `actor.scripted` makes an actor of it.
Symbolic policies take part in rollouts like any other; nothing trains them.
"""

from mgrpo_jax.agents.actor import Moment
from mgrpo_jax.agents.errors import ToolError
from mgrpo_jax.agents.protocol import Action, answer
from mgrpo_jax.agents.tools import ERROR, compute


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
    moment: of a role with the tools `search` and `visit`, and room in a turn
      for what a visit shows.

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
