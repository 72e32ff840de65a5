"""A policy's job of several processes, one on every host of its slice."""

from __future__ import annotations

import functools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import jax
import ml_collections

from experiments import cli
from mgrpo_jax.hosts import crew, group
from mgrpo_jax.hosts.channel import SilentError
from mgrpo_jax.plan import Setup
from mgrpo_jax.resources import make_learner
from mgrpo_jax.store import Store

_CLOSING = 60.0  # seconds in which process 0 ends after this one was told to


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
    setup: Setup,
    policy: str,
    bucket: Store,
    *,
    patience: float,
    told: list[int],
) -> None:
  """Does this process's part of what process 0 of the job does.

  It ends with process 0, also where it is told to: what is cut off amid an
  order cannot take part in the next, in which process 0 would wait for it.

  Args:
    setup: the recipe, restricted to the policy.
    policy: of the job.
    bucket: that the jobs share.
    patience: seconds that it waits for the others to come.
    told: signals to end that came, also later. The caller heeds them where
      process 0 did; else this is cleared, for it ended with another code.

  Raises:
    SystemExit: process 0 ended in an error, with its code.
  """
  channel = group.open_channel(patience)
  assert channel is not None  # process 0 is elsewhere
  try:
    crew.assist(
        channel,
        mesh=setup.meshes[policy].learner,
        make=functools.partial(make_learner, setup, policy),
        objectives={
            "imitate": setup.method.imitation_loss,
            "reinforce": setup.method.policy_loss,
        },
        store=bucket,
        check=_bound(told),
    )
  except crew.DrivenError as error:
    if not told or error.code not in (cli.INTERRUPTED, cli.TERMINATED):
      told.clear()
      cli.tell(f"error: {error}")
    sys.exit(error.code)
  except BaseException as error:
    if isinstance(error, SilentError):
      cli.tell(f"error: {error}")
    else:
      traceback.print_exc()
    sys.stderr.flush()
    # At once: `jax.distributed` would wait for process 0, which waits for us.
    os._exit(cli.BROKEN if isinstance(error, SilentError) else 1)
  told.clear()


def _bound(told: Sequence[int]) -> Callable[[], None]:
  """Gives what raises SilentError where process 0 does not end in time.

  Args:
    told: signals to end that came; the time begins with the first.
  """
  since: list[float] = []

  def check() -> None:
    if told and not since:
      since.append(time.monotonic())
      cli.tell(f"told to end: waits for process 0, up to {_CLOSING:.0f} s")
    if since and time.monotonic() - since[0] > _CLOSING:
      raise SilentError(
          f"process 0 has not ended in {_CLOSING:.0f} s, this one was told to"
      )

  return check
