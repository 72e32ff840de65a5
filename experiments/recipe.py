"""From a ConfigDict to what the library takes.

Only this file and those it calls know both: `method` the algorithm, `placing`
the devices, `external` other samplers, `sources` the weights, `world` what the
team acts in, `checks` what is allowed.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from experiments import (
    casting,
    checks,
    combinations,
    external,
    method,
    placing,
    sources,
    world,
)
from mgrpo_jax import bucket, store
from mgrpo_jax.agents.actor import Actor, sampled
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.protocol import Protocol
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.plan import Adaptation, Sampler, Setup
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.sampler.interface import RolloutEngine
from mgrpo_jax.spares import Spares
from mgrpo_jax.tasks import factbook
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.work import Budget
from mgrpo_jax.workdir import Workdir


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Turns a config into the JSON values that a run directory keeps.

  Args:
    config: of a recipe.

  Returns:
    Nested dictionaries and lists.
  """
  return json.loads(json.dumps(config.to_dict()))


def restore(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Turns what a run directory keeps back into a config.

  Args:
    values: what `plain` returned.

  Returns:
    The config, lists as tuples.
  """
  return ml_collections.ConfigDict(_tuples(values))


def check(
    config: ml_collections.ConfigDict,
    *,
    num_devices: int | None = None,
    only: str = "",
) -> None:
  """Checks all values of a config, without reading or making anything.

  Args:
    config: of a recipe.
    num_devices: that policies may take; None for those of this process.
    only: the policy whose job this is; others have devices elsewhere.

  Raises:
    ValueError: a value is impossible; names the key and what is allowed.
  """
  values = config.to_dict()
  checks.keys_and_types(values)
  checks.ranges(values)
  with checks.inside("team"):
    team = build_team(config)
  stages, casts = build_stages(config), casting.build(config, team)
  world.check_names(config, team)
  combinations.sizes(values, team)
  for name, one in casts.items():
    with casting.told(name):
      world.check_names(config, one)
      combinations.sizes(values, one)
  placing.check(values, num_devices or jax.device_count(), only=only)
  external.check(values)
  for stage in stages:
    combinations.learners(values, casts.get(stage.name, team), stage)
  casting.check(config, team, stages)
  build_budget(config)
  build_adaptations(config)
  method.build(config)
  build_sampler(config)
  checks.pick(world.PROTOCOLS, config.team.protocol, "team.protocol")
  for name in config.policies:
    placing.execution(config, name)
  _published_short(config)
  if config.publish.bucket:
    with checks.inside("publish.bucket"):
      if bucket.spec(config.publish.bucket)["driver"] == "memory":
        raise ValueError("memory:// ends with the run; nothing could read it")


def name_bucket(config: ml_collections.ConfigDict, url: str = "") -> None:
  """Names a config's bucket in one way, for all who are given the same one.

  Args:
    config: of a recipe, changed.
    url: in place of the config's; empty for that.
  """
  named = url or (config.get("publish") or {}).get("bucket")
  if named and isinstance(named, str):  # what is none, `check` says
    config.publish.bucket = bucket.normal(named)


def open_store(
    config: ml_collections.ConfigDict, directory: Workdir
) -> store.Store:
  """Opens the bucket that a config names, or that of the run directory."""
  if config.publish.bucket:
    return store.open(config.publish.bucket)
  return store.open_folder(directory.bucket)


def build(config: ml_collections.ConfigDict, *, only: str = "") -> Setup:
  """Builds everything that a run needs, checked.

  Args:
    config: of a recipe.
    only: the policy whose job this is, which has all devices; empty where they
      are shared out.

  Returns:
    The setup.

  Raises:
    ValueError: a value is impossible; names the key and what is allowed.
  """
  check(config, only=only)
  team = build_team(config)
  casts, stages = casting.build(config, team), build_stages(config)
  book = factbook.load(config.tasks.seed)
  tools = world.tools(book, config.tools)
  names = placing.weighted(config, team)
  if only and only not in names:
    raise ValueError(f"--policy: {only!r}, allowed: {', '.join(names)}")
  meshes = placing.meshes(config, team, jax.devices(), only=only)
  policies = sources.policies(config, team, book, meshes)
  protocol = checks.pick(world.PROTOCOLS, config.team.protocol, "team.protocol")
  chats = world.chats(team, policies, config.team.protocol)
  coded = world.symbolic_actors(config, team, chats, protocol)
  for one in (team, *casts.values()):
    world.check_prompts(one, chats, coded, protocol, tools)
  demonstrator = world.Demonstrator(
      team=team,
      chats=chats,
      coded=coded,
      protocol=protocol,
      tools=tools,
      titles={p.id: p.title for p in book.corpus.passages.values()},
      names=factbook.training_names(book),
      renamed=config.tasks.renamed,
      hasty=0.0,
  )
  dev, test = config.evaluation.tasks, config.evaluation.final_tasks
  return Setup(
      seed=config.seed,
      stages=stages,
      budget=build_budget(config),
      tasks={
          stage.name: world.questions(
              book, "train", f"stages.{stage.name}", config
          )
          for stage in stages
      },
      dev=world.questions(book, "dev", "evaluation", config)[:dev],
      test=world.questions(book, "test", "evaluation", config)[:test],
      tasks_per_step=config.tasks.per_step,
      resample=config.tasks.resample,
      max_retries=config.tasks.max_retries,
      max_staleness=config.rollout.max_staleness,
      rollouts_per_task=config.rollout.per_task,
      team=team,
      policies=policies,
      adaptations=build_adaptations(config),
      meshes=meshes,
      external=external.engines(config, team),
      actor=functools.partial(_actor, chats, protocol),
      coded=coded,
      tools=tools,
      demonstrate=_demonstrators(config, demonstrator, casts),
      method=method.build(config),
      sampler=build_sampler(config),
      evaluate_every=config.evaluation.every,
      checkpoint_every=config.checkpoint.every,
      keep_checkpoints=config.checkpoint.keep,
      publish_every=config.publish.every,
      keep_versions=config.publish.keep,
      publish_short=_published_short(config),
      whole_every=config.publish.whole_every,
      casts=casts,
  )


def _demonstrators(
    config: ml_collections.ConfigDict,
    demonstrator: world.Demonstrator,
    casts: Mapping[str, Team],
) -> dict[str, world.Demonstrator]:
  """The expert of every stage, who plays that stage's team."""
  return {
      name: dataclasses.replace(
          demonstrator,
          team=casts.get(name, demonstrator.team),
          hasty=config.stages[name].hasty,
      )
      for name in config.curriculum
  }


def _published_short(config: ml_collections.ConfigDict) -> bool:
  """Returns whether published weights are rounded to bfloat16."""
  choices = {"float32": False, "bfloat16": True}
  return checks.pick(choices, config.publish.dtype, "publish.dtype")


def build_team(config: ml_collections.ConfigDict) -> Team:
  """Builds the team of a recipe; see `Team` for what is checked."""
  roles = config.team.roles
  return Team(
      roles=tuple(_role(name, roles[name]) for name in sorted(roles.keys())),
      root=config.team.root,
  )


def build_adaptations(
    config: ml_collections.ConfigDict,
) -> dict[str, Adaptation]:
  """Builds the adapters of a recipe; see `LoRA` for what is checked."""
  made = {}
  for name, policy in config.policies.items():
    if not policy.lora.rank:
      continue
    if not policy.trainable:
      raise ValueError(
          f"config.policies.{name}.lora.rank: {policy.lora.rank}, allowed: 0,"
          f" for config.policies.{name}.trainable is False"
      )
    with checks.inside(f"policies.{name}.lora"):
      lora = LoRA(
          rank=policy.lora.rank,
          alpha=policy.lora.alpha,
          targets=tuple(policy.lora.targets),
      )
    made[name] = Adaptation(lora=lora, base=policy.source)
  return made


def build_stages(config: ml_collections.ConfigDict) -> tuple[Stage, ...]:
  """Builds the curriculum of a recipe; see `Stage` for what is checked."""
  trainable = {n for n, p in config.policies.items() if p.trainable}
  stages = []
  for name in config.curriculum:
    if name not in config.stages:
      raise ValueError(
          f"config.curriculum: no stage {name!r} in config.stages, which has"
          f" {sorted(config.stages.keys())}"
      )
    one = config.stages[name]
    with checks.inside(f"stages.{name}"):
      stages.append(
          Stage(
              name=name,
              objective=one.objective,
              steps=one.steps,
              families=tuple(one.families),
              trained=frozenset(one.trained or trainable) & trainable,
              learning_rate=one.learning_rate,
              final_fraction=one.final_fraction,
          )
      )
  return tuple(stages)


def build_budget(config: ml_collections.ConfigDict) -> Budget:
  """Builds what ends a run early; see `Budget` for what is checked."""
  with checks.inside("budget"):
    return Budget(**config.budget)


def build_sampler(config: ml_collections.ConfigDict) -> Sampler:
  """Builds how rollouts are sampled; see `Spares` for what is checked."""
  with checks.inside("rollout"):
    spares = Spares(
        count=config.rollout.spare, patience=config.rollout.patience
    )
  return Sampler(
      engine=dict(config.engine),
      temperature=config.rollout.temperature,
      evaluation_temperature=config.evaluation.temperature,
      turn_deadline=config.rollout.turn_deadline,
      max_attempts=config.rollout.max_attempts,
      max_concurrent=config.rollout.max_concurrent,
      watchdog=config.rollout.watchdog,
      deadline=config.rollout.deadline,
      spares=spares,
  )


def _actor(
    chats: Mapping[str, Chat],
    protocol: Protocol,
    name: str,
    engine: RolloutEngine,
) -> Actor:
  """The actor that samples from an engine."""
  return sampled(
      engine.generate,
      release=engine.release,
      chat=chats[name],
      protocol=protocol,
  )


def _role(name: str, config: ml_collections.ConfigDict) -> Role:
  """One role of the team."""
  return Role(
      name=name,
      policy=config.policy,
      prompt=config.prompt,
      tools=tuple(config.tools),
      calls=tuple(config.calls),
      max_turns=config.max_turns,
      max_new_tokens=config.max_new_tokens,
      max_context=config.max_context,
      max_calls=config.max_calls,
      trainable=config.trainable,
      attempts=config.attempts,
  )


def _tuples(value: Any) -> Any:
  """Lists as tuples, all the way down."""
  if isinstance(value, Mapping):
    return {key: _tuples(item) for key, item in value.items()}
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  return value
