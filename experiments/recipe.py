"""From a ConfigDict to what the library takes: the only place that knows both.

Names in a config become functions here, in the dictionaries below.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from experiments import checks, placing, world
from mgrpo_jax import (
    advantages,
    alignment,
    answers,
    bucket,
    losses,
    optim,
    packing,
    rewards,
    store,
    update,
)
from mgrpo_jax.agents.actor import Actor, sampled
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.protocol import Protocol
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.plan import Adaptation, Method, Sampler, Setup
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.rewards import Matches
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.tasks import factbook
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.workdir import Workdir

ALIGNMENTS = {
    "duplicate_or_drop": alignment.duplicate_or_drop,
    "mask": alignment.mask,
    "inverse_count": alignment.inverse_count,
}
ADVANTAGES = {
    "per_task": advantages.per_task,
    "mean_only": advantages.mean_only,
    "leave_one_out": advantages.leave_one_out,
    "per_call_index": advantages.per_call_index,
    "per_batch": advantages.per_batch,
}
RATIOS = {
    "token": losses.token_ratio,
    "sequence": losses.sequence_ratio,
    "geometric": losses.geometric_ratio,
}
AGGREGATIONS = {
    "token_mean": losses.token_mean,
    "sequence_mean_token_mean": losses.sequence_mean_token_mean,
    "sequence_mean_token_sum": losses.sequence_mean_token_sum,
    "sequence_mean_token_sum_norm": losses.sequence_mean_token_sum_norm,
}
KLS = {"none": None, "k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}
IMPORTANCES = {
    "none": None,
    "token": losses.token_importance,
    "sequence": losses.sequence_importance,
    "sequence_rejection": losses.sequence_rejection,
}
FORMATS = {"answered": rewards.answered, "well_formed": rewards.well_formed}
CORRECT_OF = {"root": rewards.of_root, "parent": rewards.of_parent}


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
    config: ml_collections.ConfigDict, *, num_devices: int | None = None
) -> None:
  """Checks all values of a config, without reading or making anything.

  Args:
    config: of a recipe.
    num_devices: that policies may take; None for those of this process.

  Raises:
    ValueError: a value is impossible; names the key and what is allowed.
  """
  values = config.to_dict()
  checks.keys_and_types(values)
  checks.ranges(values)
  with checks.inside("team"):
    team = build_team(config)
  checks.combinations(values, team)
  placing.check(values, num_devices or jax.device_count())
  for stage in build_stages(config):
    checks.learners(values, team, stage)
  build_adaptations(config)
  build_method(config)
  build_sampler(config)
  checks.pick(world.PROTOCOLS, config.team.protocol, "team.protocol")
  world.check_names(config, team)
  for name in config.policies:
    placing.execution(config, name)
  if config.publish.bucket:
    with checks.inside("publish.bucket"):
      if bucket.spec(config.publish.bucket)["driver"] == "memory":
        raise ValueError("memory:// ends with the run; nothing could read it")


def open_store(
    config: ml_collections.ConfigDict, directory: Workdir
) -> store.Store:
  """Opens the bucket that a config names, or that of the run directory."""
  if config.publish.bucket:
    return store.open(config.publish.bucket)
  return store.open_folder(directory.bucket)


def build(config: ml_collections.ConfigDict) -> Setup:
  """Builds everything that a run needs, checked.

  Args:
    config: of a recipe.

  Returns:
    The setup.

  Raises:
    ValueError: a value is impossible; names the key and what is allowed.
  """
  check(config)
  team = build_team(config)
  stages = build_stages(config)
  book = factbook.load(config.tasks.seed)
  tools = world.tools(book, config.tools)
  meshes = placing.meshes(config, team, jax.devices())
  policies = world.policies(config, team, book, meshes)
  protocol = checks.pick(world.PROTOCOLS, config.team.protocol, "team.protocol")
  chats = world.chats(team, policies, config.team.protocol)
  world.check_prompts(team, chats, protocol, tools)
  demonstrator = world.Demonstrator(
      team=team,
      chats=chats,
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
      tasks={
          stage.name: world.questions(
              book, "train", f"stages.{stage.name}", config
          )
          for stage in stages
      },
      dev=world.questions(book, "dev", "evaluation", config)[:dev],
      test=world.questions(book, "test", "evaluation", config)[:test],
      tasks_per_step=config.tasks.per_step,
      max_retries=config.tasks.max_retries,
      rollouts_per_task=config.rollout.per_task,
      team=team,
      policies=policies,
      adaptations=build_adaptations(config),
      meshes=meshes,
      actor=functools.partial(_actor, chats, protocol),
      tools=tools,
      demonstrate={
          stage.name: dataclasses.replace(
              demonstrator, hasty=config.stages[stage.name].hasty
          )
          for stage in stages
      },
      method=build_method(config),
      sampler=build_sampler(config),
      evaluate_every=config.evaluation.every,
      checkpoint_every=config.checkpoint.every,
      keep_checkpoints=config.checkpoint.keep,
      publish_every=config.publish.every,
      keep_versions=config.publish.keep,
  )


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


def build_method(config: ml_collections.ConfigDict) -> Method:
  """Builds the algorithm of a recipe."""
  loss = config.loss
  ratio = checks.pick(RATIOS, loss.ratio, "loss.ratio")
  aggregation = checks.pick(AGGREGATIONS, loss.aggregation, "loss.aggregation")
  kl = checks.pick(KLS, loss.kl, "loss.kl")
  importance = checks.pick(IMPORTANCES, loss.importance, "loss.importance")
  if aggregation is losses.sequence_mean_token_sum_norm:
    longest = max(role.max_context for role in config.team.roles.values())
    aggregation = functools.partial(aggregation, max_tokens=longest)
  with checks.inside("loss"):
    policy_loss = update.PolicyLoss(
        ratio=ratio,
        aggregation=aggregation,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        kl=kl,
        kl_coefficient=loss.kl_coefficient,
        importance=importance,
        importance_cap=loss.importance_cap,
    )
    imitation_loss = update.ImitationLoss(context_weight=loss.context_weight)
  with checks.inside("batch"):
    shape = packing.BatchShape(
        rows=config.batch.rows,
        row_tokens=config.batch.row_tokens,
        trajectories=config.batch.trajectories,
        row_targets=config.batch.row_targets or config.batch.row_tokens,
    )
  with checks.inside("optimizer"):
    optimizer = optim.AdamW(**config.optimizer)
  correct = _correct(config.reward)
  return Method(
      rules=rewards.Rules(
          format=checks.pick(FORMATS, config.reward.format, "reward.format"),
          correct=correct,
          expert=functools.partial(
              rewards.evidence_grade,
              matches=correct,
              opened_share=config.reward.opened_share,
          ),
          correct_of=checks.pick(
              CORRECT_OF, config.reward.correct_of, "reward.correct_of"
          ),
      ),
      reward_weights={
          name: rewards.RewardWeights(
              format=role.format_share,
              correct=role.correct_share,
              expert=role.expert_share,
          )
          for name, role in config.team.roles.items()
      },
      align=checks.pick(
          ALIGNMENTS, config.alignment.strategy, "alignment.strategy"
      ),
      num_slots=config.alignment.num_slots,
      advantage=checks.pick(ADVANTAGES, config.advantage, "advantage"),
      policy_loss=policy_loss,
      imitation_loss=imitation_loss,
      minibatches=config.batch.minibatches,
      shape=shape,
      optimizer=optimizer,
      warmup_steps=config.warmup_steps,
  )


def build_sampler(config: ml_collections.ConfigDict) -> Sampler:
  """Builds how rollouts are sampled."""
  return Sampler(
      engine=dict(config.engine),
      temperature=config.rollout.temperature,
      evaluation_temperature=config.evaluation.temperature,
      turn_deadline=config.rollout.turn_deadline,
      max_attempts=config.rollout.max_attempts,
      max_concurrent=config.rollout.max_concurrent,
  )


def _correct(config: ml_collections.ConfigDict) -> Matches:
  """What counts as right, from `config.reward`."""
  most = config.mention_words
  if most < 1:
    raise ValueError(f"config.reward.mention_words: {most} must be at least 1")
  choices: dict[str, Matches] = {
      "matches": answers.matches,
      "mentions": functools.partial(answers.mentions, max_words=most),
  }
  return checks.pick(choices, config.correct, "reward.correct")


def _actor(
    chats: Mapping[str, Chat], protocol: Protocol, name: str, engine: Engine
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
  )


def _tuples(value: Any) -> Any:
  """Lists as tuples, all the way down."""
  if isinstance(value, Mapping):
    return {key: _tuples(item) for key, item in value.items()}
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  return value
