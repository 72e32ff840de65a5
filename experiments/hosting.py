"""A policy's job of several processes, one on every host of its slice."""

from __future__ import annotations

import math

import jax
import ml_collections

from experiments import recipe
from mgrpo_jax.decoupled.run import restricted
from mgrpo_jax.hosts import group
from mgrpo_jax.hosts.crew import Crew
from mgrpo_jax.resources import make_learner


def check(config: ml_collections.ConfigDict, policy: str) -> None:
  """Checks that a policy takes the devices of all processes of its job.

  Args:
    config: the whole recipe, checked.
    policy: of the job.

  Raises:
    ValueError: it does not, or the sampler takes more than a process has.
  """
  if jax.process_count() == 1 or policy not in config.policies:
    return
  one, number = config.policies[policy], jax.device_count()
  if (size := math.prod(one.mesh.values())) != number:
    raise ValueError(
        f"config.policies.{policy}.mesh: takes {size} devices, allowed:"
        f" {number}, all that the {jax.process_count()} processes of the job"
        " have"
    )
  if one.sampler_tensor > jax.local_device_count():
    raise ValueError(
        f"config.policies.{policy}.sampler_tensor: {one.sampler_tensor},"
        f" allowed: at most {jax.local_device_count()}, the devices of one"
        " process"
    )


def assist(config: ml_collections.ConfigDict, policy: str) -> None:
  """Does this process's part of what process 0 of the job does.

  Args:
    config: the whole recipe, checked.
    policy: of the job.

  Raises:
    DrivenError: process 0 ended in an error.
    ValueError: a value is impossible, or there is no such policy.
  """
  setup = restricted(recipe.build(config, only=policy), policy)
  channel = group.open_channel(config.jobs.patience)
  assert channel is not None  # process 0 is elsewhere
  channel.meet(setup.meshes[policy].learner)
  crew = Crew(
      make_learner(setup, policy),
      {
          "imitate": setup.method.imitation_loss,
          "reinforce": setup.method.policy_loss,
      },
  )
  crew.run(channel)
