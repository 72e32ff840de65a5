"""What numbers and names of a config must go together.

Each is in its own range, which `checks` sees to.
"""

from collections.abc import Mapping
from typing import Any

from experiments import checks
from mgrpo_jax.agents.team import Team
from mgrpo_jax.tasks.curriculum import Stage

_BEATS = 3  # at least, until a job that lives may be taken for dead


def sizes(values: Mapping[str, Any], team: Team) -> None:
  """Checks numbers that must go together.

  Args:
    values: of the config, nested; each in its range.
    team: of the config.

  Raises:
    ValueError: they do not; names the key and what is allowed.
  """
  engine, batch = values["engine"], values["batch"]
  weighted = [r for r in team.roles if r.policy in values["policies"]]
  deepest = max(role.max_context for role in weighted)
  for key, size in (
      ("engine.context", engine["context"]),
      ("batch.row_tokens", batch["row_tokens"]),
  ):
    if size < deepest:
      raise ValueError(
          f"config.{key}: {size} must be at least {deepest}, the largest"
          " max_context of a role"
      )
  sampled = max(
      min(r.max_turns * r.max_new_tokens, r.max_context) for r in weighted
  )
  if 0 < batch["row_targets"] < sampled:
    raise ValueError(
        f"config.batch.row_targets: {batch['row_targets']} must be 0 or at"
        f" least {sampled}, what a role may sample in a call"
    )
  for key, most in (("block", "context"), ("decode_rows", "num_slots")):
    if engine[key] > engine[most]:
      raise ValueError(
          f"config.engine.{key}: {engine[key]} must be at most"
          f" {engine[most]}, config.engine.{most}"
      )
  buckets = engine["prefill_buckets"]
  ascending = all(a < b for a, b in zip((0, *buckets), buckets, strict=False))
  if not buckets or not ascending:
    raise ValueError(
        f"config.engine.prefill_buckets: {buckets} must be one or more"
        " positive numbers, ascending"
    )
  if batch["minibatches"] > values["tasks"]["per_step"]:
    raise ValueError(
        f"config.batch.minibatches: {batch['minibatches']} must be at most"
        f" {values['tasks']['per_step']}, config.tasks.per_step"
    )
  _staleness(values)
  _signs_of_life(values["jobs"])
  for role in team.roles:
    if team.most_calls(role.name) > checks.MOST_CALLS:
      raise ValueError(
          f"config.team.roles: {role.name} may be called"
          f" {team.most_calls(role.name)} times in a rollout, allowed:"
          f" {checks.MOST_CALLS}; lower a max_calls"
      )
  _concurrency(values, team)


def learners(values: Mapping[str, Any], team: Team, stage: Stage) -> None:
  """Checks that a stage names policies that can learn, and that one does.

  Args:
    values: of the config, nested.
    team: of the config.
    stage: of the config.

  Raises:
    ValueError: a policy is unknown or frozen, or none is left.
  """
  key = f"config.stages.{stage.name}.trained"
  policies = values["policies"]
  for name in values["stages"][stage.name]["trained"]:
    if name not in policies:
      raise ValueError(
          f"{key}: unknown policy {name!r}, allowed: {sorted(policies)}"
      )
    if name not in team.policies:
      raise ValueError(
          f"{key}: no role has policy {name!r}, allowed:"
          f" {sorted(team.policies)}"
      )
    if not policies[name]["trainable"]:
      raise ValueError(
          f"{key}: policy {name!r} is frozen, config.policies.{name}.trainable"
          " is False"
      )
  learning = {role.policy for role in team.roles if role.trainable}
  if stage.steps and not learning & stage.trained:
    raise ValueError(
        f"{key}: nothing learns in this stage; its policies are frozen, or all"
        " roles that use them"
    )


def _signs_of_life(jobs: Mapping[str, Any]) -> None:
  """Raises where a job that lives would be taken for dead."""
  least = _BEATS * jobs["heartbeat"]
  if jobs["patience"] < least:
    raise ValueError(
        f"config.jobs.patience: {jobs['patience']} must be at least {least:g},"
        f" {_BEATS} times config.jobs.heartbeat"
    )


def _staleness(values: Mapping[str, Any]) -> None:
  """Raises where rollouts cannot run ahead of training as far as asked."""
  allowed = values["rollout"]["max_staleness"]
  most = values["evaluation"]["every"] - 1
  if allowed > most:
    raise ValueError(
        f"config.rollout.max_staleness: {allowed} must be at most {most}, one"
        " less than config.evaluation.every: no rollout runs ahead of an"
        " evaluation"
    )
  if allowed and values["tasks"]["resample"]:
    raise ValueError(
        f"config.tasks.resample: {values['tasks']['resample']}, allowed: 0"
        " where config.rollout.max_staleness is not: rollouts ahead would wait"
        " for what is drawn again"
    )
  for name, policy in values["policies"].items():
    if allowed and policy["external"]["url"]:
      raise ValueError(
          f"config.rollout.max_staleness: {allowed}, allowed: 0 where"
          f" config.policies.{name}.external.url is set: a server's answers are"
          " not told apart while it is given other weights"
      )
    if allowed and policy["sampler_tensor"] > 1:
      raise ValueError(
          f"config.rollout.max_staleness: {allowed}, allowed: 0 where"
          f" config.policies.{name}.sampler_tensor is above 1: sampler and"
          " learner would wait for each other on the devices that they share"
      )


def _concurrency(values: Mapping[str, Any], team: Team) -> None:
  """Raises where rollouts are more than wanted, or more than slots hold.

  A session that loses its slot is prefilled anew, which rounds differently and
  depends on timing; with a slot for each, equal seeds give equal rollouts.
  """
  limit, kept, spare = (
      values["rollout"][key] for key in ("max_concurrent", "per_task", "spare")
  )
  per_task = kept + spare
  if limit < per_task:
    raise ValueError(
        f"config.rollout.max_concurrent: {limit} must be at least {per_task},"
        " config.rollout.per_task and config.rollout.spare: a task's rollouts"
        " run together"
    )
  evaluation = values["evaluation"]
  questions = max(evaluation["tasks"], evaluation["final_tasks"])
  tasks = min(limit // per_task, values["tasks"]["per_step"])
  rollouts = max(tasks * per_task, min(limit, questions))
  num_slots = values["engine"]["num_slots"]
  for policy in sorted(values["policies"].keys() & set(team.policies)):
    needed = rollouts * team.most_open(policy)
    if num_slots < needed:
      raise ValueError(
          f"config.engine.num_slots: {num_slots} must be at least {needed}, the"
          f" calls of policy {policy!r} in {rollouts} rollouts at a time; or"
          " lower config.rollout.max_concurrent"
      )
