"""What a team acts in: the Factbook, its tools, chats and an expert."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence

import ml_collections
import numpy as np

from experiments import checks, placing
from mgrpo_jax import rollout
from mgrpo_jax.agents import (
    compact,
    expert,
    hermes,
    llama,
    renaming,
    symbolic,
)
from mgrpo_jax.agents.actor import Actor, Moment, scripted
from mgrpo_jax.agents.call import turn_seed
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.chats import chatml, gemma3, llama3
from mgrpo_jax.agents.chats.compact import compact as compact_chat
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.agents.protocol import Action, Protocol
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.agents.tools import (
    SearchIndex,
    Tool,
    calculate,
    search,
    visit,
)
from mgrpo_jax.keys import check_name
from mgrpo_jax.policy.policy import QWEN2_5_SYSTEM, Policy
from mgrpo_jax.tasks import pipeline
from mgrpo_jax.tasks.factbook import Factbook
from mgrpo_jax.types import RolloutGroup, Status, Task

PROTOCOLS: Mapping[str, Protocol] = {
    "compact": compact.COMPACT,
    "hermes": hermes.HERMES,
    "llama": llama.LLAMA,
}
# The chat formats of `Policy.chat` that go with a protocol, but for compact's,
# which needs the team. Runs are repeatable, so the date is the template's.
CHATS: Mapping[str, Mapping[str, Callable[..., Chat]]] = {
    "hermes": {
        "chatml": functools.partial(chatml.chatml, default_system=""),
        "qwen2_5": functools.partial(
            chatml.chatml, default_system=QWEN2_5_SYSTEM
        ),
        "qwen3": chatml.qwen3,
        "qwen3_direct": chatml.qwen3_direct,
        "llama3": llama3.llama3,
        "llama3_1": functools.partial(
            llama3.llama3_1, date=llama3.TEMPLATE_DATE
        ),
        "gemma3": gemma3.gemma3,
    },
    "llama": {
        "llama3_1": functools.partial(
            llama3.llama3_1_tools, date=llama3.TEMPLATE_DATE
        ),
    },
}
TOOLS = ("calculate", "search", "visit")
_REMEMBERED_QUERIES = 100_000


def questions(
    book: Factbook, split: str, key: str, config: ml_collections.ConfigDict
) -> tuple[Task, ...]:
  """Selects questions of a split.

  Args:
    book: they are about.
    split: train, dev or test.
    key: of the config section that names their families, none for all.
    config: the whole recipe.

  Returns:
    The questions.

  Raises:
    ValueError: there is no such family in the split.
  """
  tasks = book.splits[split]
  wanted = functools.reduce(operator.getitem, key.split("."), config).families
  known = {str(task.meta["family"]) for task in tasks}
  unknown = sorted(set(wanted) - known)
  if unknown:
    raise ValueError(
        f"config.{key}.families: no {split} question is of {unknown}, there"
        f" are {sorted(known)}"
    )
  return pipeline.select(tasks, stages=(), kinds=(), families=wanted)


def check_names(config: ml_collections.ConfigDict, team: Team) -> None:
  """Checks that a team uses what there is.

  Args:
    config: the whole recipe.
    team: names tools and policies.

  Raises:
    ValueError: a tool does not exist, a policy is not configured, or twice, or
      none has weights.
  """
  for name, one in config.symbolic.items():
    checks.pick(symbolic.CODES, one.code, f"symbolic.{name}.code")
    if name in config.policies:
      raise ValueError(
          f"config.symbolic.{name}: is in config.policies, too; allowed: names"
          " of its own"
      )
  played = placing.playing(config, team)
  for name in sorted(set(config.policies.keys()) - set(played)):
    if rank := config.policies[name].lora.rank:
      raise ValueError(
          f"config.policies.{name}.lora.rank: {rank}, allowed: 0, for no role"
          " of config.team.roles has this policy"
      )
  if not set(team.policies) - set(config.symbolic.keys()):
    raise ValueError(
        "config.team.roles: all are played by config.symbolic; one must have a"
        " policy of config.policies, whose tokens the others write"
    )
  for role in team.roles:
    unknown = sorted(set(role.tools) - set(TOOLS))
    if unknown:
      raise ValueError(
          f"config.team.roles.{role.name}.tools: unknown {unknown}, allowed:"
          f" {', '.join(TOOLS)}"
      )
    if role.policy in config.symbolic:
      _check_coded(role, config.symbolic[role.policy].code)
    known = {*config.policies.keys(), *config.symbolic.keys()}
    if role.policy not in known:
      raise ValueError(
          f"config.team.roles.{role.name}.policy: {role.policy!r} is not in"
          " config.policies or config.symbolic, which have"
          f" {sorted(known)}"
      )
    with checks.inside("policies"):
      check_name(role.policy, "policy")


def _check_coded(role: Role, code: str) -> None:
  """Raises where plain code could not do what the role is there for."""
  key = f"config.team.roles.{role.name}"
  needs = symbolic.CODES[code]
  if missing := sorted(set(needs.tools) - set(role.tools)):
    raise ValueError(
        f"{key}.tools: {role.tools}, must have {missing}, which {code} uses"
    )
  if role.calls:
    raise ValueError(
        f"{key}.calls: {role.calls}, allowed: (), {code} calls nobody"
    )
  if role.max_turns < needs.turns:
    raise ValueError(
        f"{key}.max_turns: {role.max_turns} must be at least"
        f" {needs.turns}, which {code} takes"
    )
  if role.attempts > 1:
    raise ValueError(
        f"{key}.attempts: {role.attempts}, allowed: 1, {code} does the same"
        " again"
    )


def tools(book: Factbook, config: ml_collections.ConfigDict) -> dict[str, Tool]:
  """Builds every tool over a corpus.

  Args:
    book: the documents.
    config: `config.tools`.

  Returns:
    Tools by name.
  """
  passages = tuple(book.corpus.passages.values())
  index = SearchIndex(
      passages,
      title_weight=config.title_weight,
      cache_size=_REMEMBERED_QUERIES,
  )
  limits = {"deadline": config.deadline, "max_chars": config.max_chars}
  made = (
      search(index, num_results=config.search_results, **limits),
      visit(passages, **limits),
      calculate(**limits),
  )
  return {tool.name: tool for tool in made}


def chats(
    team: Team, loaded: Mapping[str, Policy], protocol: str
) -> dict[str, Chat]:
  """Builds the chat format of every policy.

  Args:
    team: whose tags the compact format needs.
    loaded: policies by name.
    protocol: name of it; each goes with some chat formats only.

  Returns:
    Chat formats by policy.

  Raises:
    ValueError: a policy has no tokenizer, lacks control tokens, or speaks a
      format that does not go with the protocol.
  """
  tags = compact.compact_tags(team)
  own = {"compact": functools.partial(compact_chat, tags=tags)}
  constructors = own if protocol == "compact" else CHATS[protocol]
  made: dict[str, Chat] = {}
  for name, policy in loaded.items():
    if policy.tokenizer is None:
      raise ValueError(f"config.policies.{name}.source: holds no tokenizer")
    constructor = constructors.get(policy.chat or "")
    if constructor is None:
      raise ValueError(
          f"config.team.protocol: {protocol!r} does not go with the chat format"
          f" {policy.chat!r} of policy {name!r}, but with"
          f" {', '.join(constructors)}"
      )
    if policy.system and policy.chat in ("chatml", "qwen2_5"):
      constructor = functools.partial(constructor, default_system=policy.system)
    with checks.inside(f"policies.{name}.source"):
      made[name] = constructor(policy.tokenizer)
  return made


def symbolic_actors(
    config: ml_collections.ConfigDict,
    team: Team,
    made: Mapping[str, Chat],
    protocol: Protocol,
) -> dict[str, Actor]:
  """Builds the actors of policies that are plain code.

  Args:
    config: the whole recipe.
    team: of the recipe.
    made: chat formats of the other policies; the first one's writes the
      streams that nobody samples.
    protocol: how actions are written.

  Returns:
    Actors by policy.
  """
  chat = next(iter(made.values()))
  return {
      name: symbolic.actor(
          symbolic.CODES[config.symbolic[name].code].act,
          chat=chat,
          protocol=protocol,
      )
      for name in placing.playing(config, team)
      if name in config.symbolic
  }


def check_prompts(
    team: Team,
    made: Mapping[str, Chat],
    coded: Mapping[str, Actor],
    protocol: Protocol,
    available: Mapping[str, Tool],
) -> None:
  """Checks that every role's prompt leaves it room to say something.

  Args:
    team: the roles.
    made: chat formats by policy.
    coded: actors of symbolic policies.
    protocol: what a system message says.
    available: tools by name.

  Raises:
    ValueError: one does not.
  """

  def silent(moment: Moment) -> Action:
    raise RuntimeError(f"{moment.role.name} is only looked at")

  with checks.inside("team"):
    Environment(  # checks itself
        team=team,
        actors={
            name: scripted(silent, chat=chat, protocol=protocol)
            for name, chat in made.items()
        }
        | dict(coded),
        tools=available,
        temperature=0.0,
        turn_deadline=1.0,
        max_attempts=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrator:
  """Plays the scripted expert.

  Attributes:
    team: the roles.
    chats: by policy that it plays.
    coded: actors of symbolic policies, which play themselves.
    protocol: how actions are written.
    tools: by name.
    titles: passage id to title.
    names: other names that demonstrations may use.
    renamed: share of demonstrations told under other names, in [0, 1].
    hasty: share of calls that the expert cuts short, in [0, 1].
  """

  team: Team
  chats: Mapping[str, Chat]
  coded: Mapping[str, Actor]
  protocol: Protocol
  tools: Mapping[str, Tool]
  titles: Mapping[str, str]
  names: Sequence[str]
  renamed: float
  hasty: float

  async def __call__(self, task: Task, seed: int) -> RolloutGroup | None:
    """Demonstrates a task once.

    Args:
      task: what is demonstrated.
      seed: decides, with the task's id, which names it is told under.

    Returns:
      One rollout, or None where the expert cannot do the task: a search does
      not list the passage it needs, or a turn of its does not fit a budget.
    """
    random = np.random.default_rng(turn_seed(seed, task.id))
    names: Mapping[str, str] = {}
    if random.random() < self.renamed:
      names = renaming.draw(task, self.names, random).names
    told = renaming.Renaming(names=names)
    other = told.task(task)

    def hasty(moment: Moment) -> bool:
      identity = (seed, task.id, moment.role.name, moment.request)
      draws = np.random.default_rng(turn_seed(*identity))
      return len(moment.turns) == 1 and bool(draws.random() < self.hasty)

    environment = expert.environment(
        other,
        team=self.team,
        chats=self.chats,
        coded=self.coded,
        protocol=self.protocol,
        tools={name: told.tool(tool) for name, tool in self.tools.items()},
        titles={hop.page: told(self.titles[hop.page]) for hop in task.evidence},
        hasty=hasty,
    )
    try:
      group = await rollout.run_group(
          other, environment=environment, num_rollouts=1, seed=seed
      )
    except expert.LostError:
      return None
    endings = {trajectory.status for trajectory in group.trajectories}
    return group if endings == {Status.COMPLETED} else None
