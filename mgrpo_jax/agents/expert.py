"""A scripted expert: what each role should do next, from a task's evidence.

A role with child roles delegates one hop after the other; a role with tools
searches, opens the passage where the search listed it, and reports what
stands there. Its turns go through the same agent calls as a policy's, so what
is imitated is what a policy would have had to write.

In some calls the expert is hasty: it answers with the first report though hops
are left, or reports a title without opening the passage. Its caller takes a
report as it is, right or wrong. Whoever imitates it knows the moves; which of
them pay is left to be learned from rewards.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from mgrpo_jax.agents.actor import Actor, Moment, scripted
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.agents.protocol import Action, Protocol, answer
from mgrpo_jax.agents.team import Team
from mgrpo_jax.agents.tools import ERROR, Tool
from mgrpo_jax.types import Evidence, Task, Turn

_TURN_DEADLINE = 60.0  # seconds; a scripted turn takes none


class LostError(Exception):
  """Raised where the evidence does not say what to do next."""


def environment(
    task: Task,
    *,
    team: Team,
    chats: Mapping[str, Chat],
    coded: Mapping[str, Actor],
    protocol: Protocol,
    tools: Mapping[str, Tool],
    titles: Mapping[str, str],
    hasty: Callable[[Moment], bool],
) -> Environment:
  """An environment in which the expert plays the roles of one task.

  Args:
    task: whose evidence it follows.
    team: the roles.
    chats: messages to tokens, by policy that the expert plays.
    coded: actors of the other policies, the symbolic ones.
    protocol: how actions are written.
    tools: by name.
    titles: passage id to the title that a search shows, for the passages of
      the evidence.
    hasty: whether it cuts the call short at this moment.

  Returns:
    What `rollout.run_group` takes; a rollout raises `LostError` where the
    evidence does not help.
  """

  def act(moment: Moment) -> Action:
    asked = [name for name in moment.role.calls if looks_up(team, name)]
    role = dataclasses.replace(moment.role, calls=tuple(asked))
    own = dataclasses.replace(moment, role=role) if asked else moment
    return next_action(own, task, titles, hasty)

  return Environment(
      team=team,
      actors={
          policy: scripted(act, chat=chat, protocol=protocol)
          for policy, chat in chats.items()
      }
      | dict(coded),
      tools=tools,
      temperature=0.0,
      turn_deadline=_TURN_DEADLINE,
      max_attempts=1,
  )


def next_action(
    moment: Moment,
    task: Task,
    titles: Mapping[str, str],
    hasty: Callable[[Moment], bool],
) -> Action:
  """Returns what the expert does next in one agent call.

  Args:
    moment: whose turn it is, what was asked, what happened so far.
    task: the task, for its evidence.
    titles: passage id to title.
    hasty: whether it cuts the call short at this moment.

  Returns:
    The next action.

  Raises:
    LostError: the request is no hop of the task, the search did not list the
      passage that holds the answer, or nothing follows from wrong reports.
  """
  if moment.turns and hasty(moment):
    return _shortcut(moment.turns[-1])
  if moment.role.calls and moment.request != task.question:
    return _pass_on(moment)
  if moment.role.calls:
    return _delegate(moment, task)
  if moment.request == task.question:
    return _look_up(task.evidence, task.answers[0], moment.turns, titles)
  for hop in task.evidence:
    if hop.question == moment.request:
      return _look_up((hop,), hop.answers[0], moment.turns, titles)
  return _guess(moment, task)


def never(moment: Moment) -> bool:
  """The expert that is never hasty."""
  del moment
  return False


def _shortcut(turn: Turn) -> Action:
  """Answers with a report, with what a title names, or with what was opened."""
  first = turn.result.splitlines()[0] if turn.result else ""
  if turn.name == "search":
    first = first.partition(" ")[2].partition(":")[0]
  if not first:
    raise LostError("there is nothing to answer with")
  return answer(first)


def _guess(moment: Moment, task: Task) -> Action:
  """Looks for what no evidence tells, and reports what is listed first."""
  if moment.turns:
    return _shortcut(moment.turns[-1])
  for number, hop in enumerate(task.evidence):
    for earlier in task.evidence[:number]:
      known = earlier.answers[0]
      head, found, tail = hop.question.partition(known)
      name = moment.request.removeprefix(head).removesuffix(tail)
      if found and moment.request == head + name + tail:
        return _search(_retold(hop.query, {known: name}))
  raise LostError(f"{moment.request!r} is no hop of task {task.id}")


def looks_up(team: Team, name: str) -> bool:
  """Says whether a role, or one that it calls, can find passages.

  Args:
    team: the roles.
    name: of the role.

  Returns:
    Whether one of them has the tool that finds them.
  """
  role = team[name]
  below = any(looks_up(team, child) for child in role.calls)
  return below or "search" in role.tools


def _pass_on(moment: Moment) -> Action:
  """Has the first child do what was asked for, and reports what it found."""
  if not moment.turns:
    return _call(moment, moment.request)
  if moment.turns[-1].result.startswith(ERROR):
    raise LostError(f"a call came back with {moment.turns[-1].result!r}")
  return answer(moment.turns[-1].result)


def _call(moment: Moment, request: str) -> Action:
  """Calls the first child."""
  return Action(
      kind="call", name=moment.role.calls[0], arguments={"request": request}
  )


def _delegate(moment: Moment, task: Task) -> Action:
  """Asks the first child for each hop in turn, then answers.

  What was reported goes into the next hop and the answer, right or wrong.
  """
  if not task.evidence:
    raise LostError(f"task {task.id} has no evidence")
  reports = [turn.result for turn in moment.turns if turn.kind == "call"]
  if reports and reports[-1].startswith(ERROR):
    raise LostError(f"a call came back with {reports[-1]!r}")
  if len(reports) == len(task.evidence):
    return answer(_conclusion(task, reports))
  told = {
      hop.answers[0]: report
      for hop, report in zip(task.evidence, reports, strict=False)
  }
  return _call(moment, _retold(task.evidence[len(reports)].question, told))


def _conclusion(task: Task, reports: Sequence[str]) -> str:
  """The last report, or what follows from all of them."""
  if task.answers[0] == task.evidence[-1].answers[0]:
    return reports[-1]
  for hop, report in zip(task.evidence, reports, strict=True):
    if report != hop.answers[0]:
      raise LostError(f"nothing known follows from {report!r}")
  return task.answers[0]


def _retold(text: str, names: Mapping[str, str]) -> str:
  """Replaces names where they stand as whole words, all at once."""
  if not names:
    return text
  longest_first = sorted(map(re.escape, names), key=len, reverse=True)
  pattern = rf"(?<!\w)({'|'.join(longest_first)})(?!\w)"
  return re.sub(pattern, lambda match: names[match[1]], text)


def _look_up(
    hops: Sequence[Evidence],
    report: str,
    turns: Sequence[Turn],
    titles: Mapping[str, str],
) -> Action:
  """Searches and opens the passage of each hop in turn, then answers."""
  done = sum(turn.name == "visit" for turn in turns)
  if done == len(hops):
    return answer(report)
  hop = hops[done]
  if not turns or turns[-1].name != "search":
    return _search(hop.query)
  if hop.page not in titles:
    raise LostError(f"the passage {hop.page} has no title")
  number = _listed(titles[hop.page], turns[-1].result)
  return Action(kind="tool", name="visit", arguments={"page": number})


def _search(query: str) -> Action:
  """Searches the passages."""
  return Action(kind="tool", name="search", arguments={"query": query})


def _listed(title: str, results: str) -> str:
  """The number under which a list of results shows a title."""
  for line in results.splitlines():
    number, _, shown = line.partition(" ")
    if shown == title:
      return number
  raise LostError(f"the search did not list {title!r}")
