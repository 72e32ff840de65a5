"""A policy's job of several processes, one on every host of its slice."""

from __future__ import annotations

import functools
import math

import jax
import ml_collections

from mgrpo_jax.hosts import crew, group
from mgrpo_jax.plan import Setup
from mgrpo_jax.resources import make_learner
from mgrpo_jax.store import Store


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


def assist(
    setup: Setup, policy: str, bucket: Store, *, patience: float
) -> None:
  """Does this process's part of what process 0 of the job does.

  Args:
    setup: the recipe, restricted to the policy.
    policy: of the job.
    bucket: that the jobs share.
    patience: seconds that it waits for the others to come.

  Raises:
    DrivenError: process 0 ended in an error.
    SilentError: the others have not come.
  """
  channel = group.open_channel(patience)
  assert channel is not None  # process 0 is elsewhere
  crew.assist(
      channel,
      mesh=setup.meshes[policy].learner,
      make=functools.partial(make_learner, setup, policy),
      objectives={
          "imitate": setup.method.imitation_loss,
          "reinforce": setup.method.policy_loss,
      },
      store=bucket,
  )
