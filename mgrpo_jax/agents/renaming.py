"""Other names for the things a demonstration is about.

A small policy that only ever copies the names of two hundred places learns
those names, not copying. So a demonstration is told in a world in which the
task's proper names are others: the question, what the expert writes and what
the tools show are renamed alike, and a search is led back to the real name.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax.agents.tools import Memory, Observation, Tool
from mgrpo_jax.types import Evidence, Task

_NAME = re.compile(
    r"[^\W\d_a-z][\w'’.-]*(?: (?:(?:of|the|and|de|da|du|la|el|al|d')"
    r" )*[^\W\d_a-z][\w'’.-]*)*"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renaming:
  """A one-to-one substitution of proper names.

  Attributes:
    names: real name to other name.
  """

  names: Mapping[str, str]

  def __call__(self, text: str) -> str:
    """Puts the other names in the place of the real ones."""
    return _substitute(text, self.names)

  def inverse(self, text: str) -> str:
    """Puts the real names back."""
    return _substitute(text, {new: old for old, new in self.names.items()})

  def task(self, task: Task) -> Task:
    """Renames what a task says; ids stay.

    Args:
      task: any task.

    Returns:
      The task under other names.
    """
    return dataclasses.replace(
        task,
        question=self(task.question),
        answers=tuple(map(self, task.answers)),
        evidence=tuple(map(self._hop, task.evidence)),
    )

  def tool(self, tool: Tool) -> Tool:
    """Lets a tool of the real world serve the renamed one.

    Args:
      tool: any tool.

    Returns:
      A tool that is asked and answers under other names.
    """

    async def run(arguments: Mapping[str, Any], memory: Memory) -> Observation:
      real = {
          key: self.inverse(value) if isinstance(value, str) else value
          for key, value in arguments.items()
      }
      found = await tool.run(real, memory)
      return dataclasses.replace(found, text=self(found.text))

    return dataclasses.replace(tool, run=run)

  def _hop(self, hop: Evidence) -> Evidence:
    """Renames a hop; its page is where it was."""
    return Evidence(
        page=hop.page,
        question=self(hop.question),
        query=self(hop.query),
        answers=tuple(map(self, hop.answers)),
    )


def draw(
    task: Task, pool: Sequence[str], random: np.random.Generator
) -> Renaming:
  """Draws other names for all proper names of a task's hops.

  Args:
    task: whose sub-questions and answers are searched for names.
    pool: names to choose from.
    random: the source of the choice.

  Returns:
    The renaming; names that the task mentions are not chosen.
  """
  texts = [
      text for hop in task.evidence for text in (hop.question, hop.answers[0])
  ]
  found = {name for text in texts for name in _NAME.findall(text)}
  names = sorted(name for name in found if not name.isupper())  # no codes
  fresh: list[str] = []
  while len(fresh) < len(names):
    name = pool[int(random.integers(len(pool)))]
    if name not in fresh and not any(name in text for text in texts):
      fresh.append(name)
  return Renaming(names=dict(zip(names, fresh, strict=True)))


def _substitute(text: str, names: Mapping[str, str]) -> str:
  """Replaces whole names, the longest first, all at once."""
  if not names:
    return text
  longest_first = sorted(names, key=len, reverse=True)
  pattern = "|".join(map(re.escape, longest_first))
  return re.sub(
      rf"(?<!\w)(?:{pattern})(?!\w)", lambda match: names[match[0]], text
  )
