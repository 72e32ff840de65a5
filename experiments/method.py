"""The algorithm of a recipe: names in its config become functions here."""

import functools

import ml_collections

from experiments import checks
from mgrpo_jax import (
    advantages,
    alignment,
    answers,
    importance,
    losses,
    objectives,
    optim,
    packing,
    rewards,
)
from mgrpo_jax.plan import Method
from mgrpo_jax.rewards import Matches

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
    "token": importance.by_token,
    "sequence": importance.by_sequence,
    "sequence_rejection": importance.reject_sequences,
}
FORMATS = {"answered": rewards.answered, "well_formed": rewards.well_formed}
CORRECT_OF = {"root": rewards.of_root, "parent": rewards.of_parent}


def build(config: ml_collections.ConfigDict) -> Method:
  """Builds the algorithm of a recipe."""
  loss = config.loss
  ratio = checks.pick(RATIOS, loss.ratio, "loss.ratio")
  aggregation = checks.pick(AGGREGATIONS, loss.aggregation, "loss.aggregation")
  kl = checks.pick(KLS, loss.kl, "loss.kl")
  correction = checks.pick(IMPORTANCES, loss.importance, "loss.importance")
  if aggregation is losses.sequence_mean_token_sum_norm:
    longest = max(role.max_context for role in config.team.roles.values())
    aggregation = functools.partial(aggregation, max_tokens=longest)
  with checks.inside("loss"):
    policy_loss = objectives.PolicyLoss(
        ratio=ratio,
        aggregation=aggregation,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        kl=kl,
        kl_coefficient=loss.kl_coefficient,
        importance=correction,
        importance_cap=loss.importance_cap,
    )
    imitation_loss = objectives.ImitationLoss(
        context_weight=loss.context_weight
    )
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
