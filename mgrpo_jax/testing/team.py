"""A team of two over the small corpus, without a model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from mgrpo_jax.agents.actor import Actor, sampled
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.chats.chatml import chatml
from mgrpo_jax.agents.chats.compact import compact
from mgrpo_jax.agents.compact import COMPACT, compact_tags
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.protocol import Protocol
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.agents.tools import (
    SearchIndex,
    Tool,
    calculate,
    search,
    visit,
)
from mgrpo_jax.sampler.interface import Generate
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.tokens import ByteTokenizer

_BUDGETS = {"max_turns": 5, "max_new_tokens": 120, "max_context": 4000}


def small_team(**budgets: int) -> Team:
  """A main agent without tools and its researcher.

  Args:
    **budgets: `max_turns`, `max_new_tokens`, `max_context` of both roles,
      `max_calls` of the main agent.

  Returns:
    The team; policies are named like the roles.
  """
  shared = _BUDGETS | budgets
  max_calls = shared.pop("max_calls", 3)
  main = Role(
      name="main",
      policy="main",
      prompt="",
      tools=(),
      calls=("researcher",),
      max_calls=max_calls,
      trainable=True,
      attempts=1,
      **shared,
  )
  researcher = Role(
      name="researcher",
      policy="researcher",
      prompt="",
      tools=("search", "visit", "calculate"),
      calls=(),
      max_calls=0,
      trainable=True,
      attempts=1,
      **shared,
  )
  return Team(roles=(main, researcher), root="main")


def tokenizer(team: Team) -> ByteTokenizer:
  """Bytes, with the control tokens of both chat formats."""
  return ByteTokenizer((*compact_tags(team), "<|im_start|>", "<|im_end|>"))


def chat_of(protocol: Protocol, team: Team) -> Chat:
  """The chat format that goes with a protocol, over the byte tokenizer."""
  if protocol is COMPACT:
    return compact(tokenizer(team), tags=compact_tags(team))
  return chatml(tokenizer(team), default_system="")


@functools.cache
def _index() -> SearchIndex:
  """The small corpus, indexed once."""
  return SearchIndex(corpus.passages(), title_weight=3, cache_size=100)


def small_tools(*, max_chars: int = 80) -> dict[str, Tool]:
  """`search`, `visit` and `calculate` over the small corpus."""
  passages = corpus.passages()
  limits: Mapping[str, Any] = {"deadline": 5.0, "max_chars": max_chars}
  tools = (
      search(_index(), num_results=3, **limits),
      visit(passages, **limits),
      calculate(**limits),
  )
  return {tool.name: tool for tool in tools}


def no_release(session: str) -> None:
  """Forgets nothing, for there is nothing to forget."""
  del session


def environment(
    generates: Mapping[str, Generate],
    *,
    team: Team,
    protocol: Protocol = HERMES,
    tools: Mapping[str, Tool] | None = None,
    turn_deadline: float = 5.0,
    max_attempts: int = 2,
    release: Callable[[str], None] = no_release,
) -> Environment:
  """An environment whose policies are `generate` functions.

  Args:
    generates: by policy.
    team: the roles.
    protocol: of all roles.
    tools: by name; the small tools where None.
    turn_deadline: seconds.
    max_attempts: of a call.
    release: forgets a session.

  Returns:
    The environment, temperature 1.
  """
  chat = chat_of(protocol, team)
  actors: dict[str, Actor] = {
      policy: sampled(generate, release=release, chat=chat, protocol=protocol)
      for policy, generate in generates.items()
  }
  return Environment(
      team=team,
      actors=actors,
      tools=small_tools() if tools is None else tools,
      temperature=1.0,
      turn_deadline=turn_deadline,
      max_attempts=max_attempts,
  )
