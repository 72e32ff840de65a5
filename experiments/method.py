"""The algorithm of a recipe: names in its config become functions here."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import ml_collections
from jaxtyping import Array

from experiments import checks
from mgrpo_jax import (
    advantages,
    alignment,
    answers,
    grades,
    importance,
    losses,
    objectives,
    optim,
    packing,
    rewards,
)
from mgrpo_jax.comparison import Comparison, alike
from mgrpo_jax.critic import Critic
from mgrpo_jax.grades import Matches
from mgrpo_jax.plan import Method
from mgrpo_jax.rewards import RewardWeights

ALIGNMENTS = {
    "duplicate_or_drop": alignment.duplicate_or_drop,
    "mask": alignment.mask,
    "inverse_count": alignment.inverse_count,
}
COMPARISONS: Mapping[str, Comparison] = {
    "per_task": alike(advantages.per_task),
    "mean_only": alike(advantages.mean_only),
    "leave_one_out": alike(advantages.leave_one_out),
    "other_rollouts": alike(advantages.other_rollouts),
    "per_call_index": alike(advantages.per_call_index),
    "per_batch": alike(advantages.per_batch),
    "per_block": Comparison(
        root=advantages.per_task, calls=advantages.per_block
    ),
    "per_subtask": Comparison(
        root=advantages.per_task,
        calls=advantages.per_subtask,
        given="subtasks",
    ),
    "inherit_parent": Comparison(
        root=advantages.per_task,
        calls=advantages.inherit_parent,
        given="parents",
    ),
    "plain": alike(advantages.plain),
}
SURROGATES: Mapping[str, Callable[..., Array]] = {
    "clipped": losses.clipped_surrogate,
    "dual_clipped": losses.dual_clipped_surrogate,
    "cispo": losses.cispo_surrogate,
}
RATIOS = {
    "token": losses.token_ratio,
    "sequence": losses.sequence_ratio,
    "geometric": losses.geometric_ratio,
}
AGGREGATIONS: dict[str, Callable[..., Array]] = {
    "token_mean": losses.token_mean,
    "sequence_mean_token_mean": losses.sequence_mean_token_mean,
    "sequence_mean_token_sum": losses.sequence_mean_token_sum,
    "sequence_mean_token_sum_norm": losses.sequence_mean_token_sum_norm,
}
KLS = {"none": None, "k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}
IMPORTANCES = {
    "none": None,
    "token": importance.by_token,
    "sequence": importance.by_sequence,
    "sequence_rejection": importance.reject_sequences,
}
_UNSPREAD = {  # comparisons under which equal rewards may have advantages
    "plain": "groups without spread teach, too",
    "per_batch": "groups without spread teach beside other tasks' groups",
    "per_block": "groups without spread teach beside other tasks' calls",
}
FORMATS = {"answered": grades.answered, "well_formed": grades.well_formed}
CORRECT_OF = {"root": rewards.of_root, "parent": rewards.of_parent}


def build(config: ml_collections.ConfigDict) -> Method:
  """Builds the algorithm of a recipe.

  Args:
    config: of the recipe.

  Returns:
    The method.

  Raises:
    ValueError: a value is impossible; names the key and what is allowed.
  """
  with checks.inside("batch"):
    shape = packing.BatchShape(
        rows=config.batch.rows,
        row_tokens=config.batch.row_tokens,
        trajectories=config.batch.trajectories,
        row_targets=config.batch.row_targets or config.batch.row_tokens,
        least_shared=config.batch.least_shared,
    )
  with checks.inside("optimizer"):
    optimizer = optim.AdamW(**config.optimizer)
  with checks.inside("loss"):
    imitation_loss = objectives.ImitationLoss(
        context_weight=config.loss.context_weight
    )
  return Method(
      rules=_rules(config),
      reward_weights=_reward_weights(config),
      align=checks.pick(
          ALIGNMENTS, config.alignment.strategy, "alignment.strategy"
      ),
      num_slots=config.alignment.num_slots,
      comparison=_comparison(config),
      policy_loss=_policy_loss(config),
      imitation_loss=imitation_loss,
      minibatches=config.batch.minibatches,
      shape=shape,
      optimizer=optimizer,
      warmup_steps=config.warmup_steps,
      reference_every=config.loss.reference_every,
      stage_rewards=_stage_rewards(config),
  )


def _reward_weights(
    config: ml_collections.ConfigDict,
) -> dict[str, RewardWeights]:
  """What the components of a reward count, by role."""
  for name, role in config.team.roles.items():
    if name == config.team.root and role.expert_share:
      raise ValueError(
          f"config.team.roles.{name}.expert_share: {role.expert_share},"
          " allowed: 0, nobody called it"
      )
  return {
      name: RewardWeights(
          format=role.format_share,
          correct=role.correct_share,
          expert=role.expert_share,
          overlong=config.reward.overlong_share,
      )
      for name, role in config.team.roles.items()
  }


def _stage_rewards(
    config: ml_collections.ConfigDict,
) -> dict[str, dict[str, RewardWeights]]:
  """The same of stages that say otherwise, by stage and role."""
  whole = _reward_weights(config)
  made: dict[str, dict[str, RewardWeights]] = {}
  for stage, settings in config.stages.items():
    for role, given in settings.reward.items():
      key = f"stages.{stage}.reward.{role}"
      if "overlong_share" in given and not config.reward.overlong_tokens:
        raise ValueError(
            f"config.{key}.overlong_share: {given.overlong_share}, allowed:"
            " nothing where config.reward.overlong_tokens is 0"
        )
      changes = {name.removesuffix("_share"): n for name, n in given.items()}
      with checks.inside(key):
        made.setdefault(stage, {})[role] = dataclasses.replace(
            whole[role], **changes
        )
      if role == config.team.root and made[stage][role].expert:
        raise ValueError(
            f"config.{key}.expert_share: {given.expert_share}, allowed: 0,"
            " nobody called it"
        )
  return made


def _rules(config: ml_collections.ConfigDict) -> rewards.Rules:
  """How calls are graded."""
  reward = config.reward
  correct = _correct(reward)
  overlong = None
  if reward.overlong_tokens:
    longest = {n: role.max_context for n, role in config.team.roles.items()}
    shortest = min(_contexts(config).values(), default=0)
    if reward.overlong_tokens > shortest:
      raise ValueError(
          f"config.reward.overlong_tokens: {reward.overlong_tokens} must be at"
          f" most {shortest}, the smallest max_context of a role"
      )
    overlong = functools.partial(
        grades.overlong, longest=longest, buffer=reward.overlong_tokens
    )
  return rewards.Rules(
      format=checks.pick(FORMATS, reward.format, "reward.format"),
      correct=correct,
      expert=functools.partial(
          grades.evidence_grade,
          matches=correct,
          opened_share=reward.opened_share,
      ),
      correct_of=checks.pick(
          CORRECT_OF, reward.correct_of, "reward.correct_of"
      ),
      overlong=overlong,
  )


def _comparison(config: ml_collections.ConfigDict) -> Comparison:
  """What rewards are compared with, and whether that can be."""
  chosen = checks.pick(COMPARISONS, config.advantage, "advantage")
  tried = any(role.attempts > 1 for role in config.team.roles.values())
  if config.advantage == "per_subtask" and not tried:
    raise ValueError(
        "config.advantage: 'per_subtask' compares attempts at the same"
        " sub-task; set attempts of a role that is called above 1"
    )
  if tried and config.advantage != "per_subtask":
    raise ValueError(
        f"config.advantage: {config.advantage!r}, allowed: per_subtask, where"
        " roles have attempts that their callers do not see"
    )
  if config.tasks.resample and config.advantage in _UNSPREAD:
    raise ValueError(
        f"config.tasks.resample: {config.tasks.resample} must be 0 where"
        f" config.advantage is {config.advantage}:"
        f" {_UNSPREAD[config.advantage]}"
    )
  if config.critic.coefficient and config.advantage != "plain":
    raise ValueError(
        f"config.advantage: {config.advantage!r}, allowed: plain, where"
        " config.critic.coefficient is above 0"
    )
  return chosen


def _policy_loss(
    config: ml_collections.ConfigDict,
) -> objectives.PolicyLoss:
  """What is minimised in stages that reinforce."""
  loss = config.loss
  if loss.reference_every and loss.kl == "none":
    raise ValueError(
        f"config.loss.reference_every: {loss.reference_every}, allowed: 0 where"
        " config.loss.kl is 'none': nothing is compared with a reference"
    )
  aggregation = checks.pick(AGGREGATIONS, loss.aggregation, "loss.aggregation")
  if aggregation is losses.sequence_mean_token_sum_norm:
    longest = max(_contexts(config).values(), default=1)
    aggregation = functools.partial(aggregation, max_tokens=longest)
  surrogate = checks.pick(SURROGATES, loss.surrogate, "loss.surrogate")
  if surrogate is losses.dual_clipped_surrogate:
    if not loss.dual_floor > 1 + loss.clip_high:
      raise ValueError(
          f"config.loss.dual_floor: {loss.dual_floor} must be above 1 +"
          f" clip_high = {1 + loss.clip_high}"
      )
    surrogate = functools.partial(surrogate, floor=loss.dual_floor)
  with checks.inside("loss"):
    return objectives.PolicyLoss(
        ratio=checks.pick(RATIOS, loss.ratio, "loss.ratio"),
        aggregation=aggregation,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        kl=checks.pick(KLS, loss.kl, "loss.kl"),
        kl_coefficient=loss.kl_coefficient,
        importance=checks.pick(IMPORTANCES, loss.importance, "loss.importance"),
        importance_cap=loss.importance_cap,
        surrogate=surrogate,
        entropy_coefficient=loss.entropy_coefficient,
        critic=_critic(config),
    )


def _contexts(config: ml_collections.ConfigDict) -> dict[str, int]:
  """How long the streams get that policies with weights write, by role."""
  return {
      name: role.max_context
      for name, role in config.team.roles.items()
      if role.policy in config.policies
      or any(
          stage.cast.get(name) in config.policies
          for stage in config.stages.values()
      )
  }


def _critic(config: ml_collections.ConfigDict) -> Critic | None:
  """The critic, where there is one."""
  if not config.critic.coefficient:
    return None
  for name, policy in config.policies.items():
    if policy.lora.rank:
      raise ValueError(
          f"config.critic.coefficient: {config.critic.coefficient}, allowed: 0"
          f" where config.policies.{name} trains an adapter, which has no head"
      )
  with checks.inside("critic"):
    return Critic(**config.critic)


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
