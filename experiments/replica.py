r"""Samples a policy for a run that is elsewhere, for as long as it lives.

    python -m experiments.replica --config=configs/quickstart.py \
        --config.rollout.replicas=True --bucket=file:///…/bucket \
        --policy=researcher

Takes the config and the bucket of a run whose config.rollout.replicas is True,
reads the weights that the run publishes, and answers what it asks to have
sampled. Any number of these may come and go while the run lasts, on this
machine or others: a seed determines what is sampled, not who samples. It waits
for a run that has not begun, outlives it and ends by SIGTERM or Ctrl-C; what
failed but may pass has the exit code 75. The policy's sampler_tensor devices of
this process are used, whatever the run's own mesh is.

The run finds it in the bucket, under --reached_as. Between machines both need
the same token, --token_file or MGRPO_JOBS_TOKEN.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import typing

from absl import flags

from experiments import cli

with cli.user_errors(ModuleNotFoundError):
  from ml_collections import config_flags

if typing.TYPE_CHECKING:
  from collections.abc import Mapping
  from typing import Any

  import ml_collections

  from experiments.joining import Place
  from mgrpo_jax.plan import Setup
  from mgrpo_jax.store import Store

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "recipe of the run, with the same --config.key=value"
)
_BUCKET = flags.DEFINE_string(
    "bucket", "", "URL of the run's bucket; empty for config.publish.bucket"
)
_POLICY = flags.DEFINE_string("policy", "", "that is sampled")
_LISTEN = flags.DEFINE_string(
    "listen",
    "127.0.0.1",
    "where it is asked; any but 127.0.0.1, ::1 and localhost needs a token,"
    " see --token_file",
)
_PORT = flags.DEFINE_integer("port", 0, "where it is asked; 0 for any")
_REACHED_AS = flags.DEFINE_string(
    "reached_as", "", "host by which the run reaches it; empty for --listen"
)
_TOKEN_FILE = flags.DEFINE_string(
    "token_file",
    "",
    "File with the token of the run, at least 16 characters; empty for the"
    " environment's MGRPO_JOBS_TOKEN",
)
_LOOK = 1.0  # seconds between looks for a run that has not begun
_COMPILING = 3600.0  # seconds that what samples may take to be compiled
_LAST = 10.0  # seconds for what is under way when it leaves


def main() -> None:
  """Samples; see the module."""
  with contextlib.ExitStack() as stack:
    with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
      from experiments import joining, recipe
      from mgrpo_jax import store
      from mgrpo_jax.decoupled.errors import ServerError
      from mgrpo_jax.sampler.interface import EngineError

      config = _config()
      values = recipe.plain(config)
      token = joining.token(_TOKEN_FILE.value, new=False)
      cli.check_exposure(_LISTEN.value, token, cli.TOKEN_ADVICE)
      place = stack.enter_context(
          joining.placed(
              _POLICY.value,
              host=_LISTEN.value,
              port=_PORT.value,
              reached_as=_REACHED_AS.value,
              token=token,
          )
      )
      setup = recipe.build(_alone(config), only=_POLICY.value)
      bucket = store.open(config.publish.bucket)
    passing = (OSError, EngineError, ServerError)  # TimeoutError is an OSError
    with (
        cli.user_errors(ValueError),
        cli.user_errors(*passing, code=cli.BROKEN),
    ):
      _wait_for_run(bucket, values)
      asyncio.run(_sample(setup, bucket, place, config.jobs.heartbeat))


async def _sample(
    setup: Setup, bucket: Store, place: Place, every: float
) -> None:
  """Follows the run and answers."""
  from mgrpo_jax.decoupled.ending import Ending
  from mgrpo_jax.decoupled.errors import ServerError
  from mgrpo_jax.replicas.replica import Replica
  from mgrpo_jax.replicas.weights import Weights
  from mgrpo_jax.sampler import warming
  from mgrpo_jax.sampler.engine import Engine
  from mgrpo_jax.serving import internal

  name = place.policy
  policy, mesh = setup.policies[name], setup.meshes[name].sampler
  adaptation = setup.adaptations.get(name)
  weights = Weights(policy, adaptation.lora if adaptation else None, mesh)
  sampler = Engine(
      policy.config, policy.params, 0, mesh=mesh, **setup.sampler.engine
  )
  async with contextlib.AsyncExitStack() as stack:
    stack.callback(bucket.hurry, _LAST)  # threads that still read go, too
    ending = await stack.enter_async_context(Ending())
    replica = Replica(
        bucket,
        name,
        await stack.enter_async_context(sampler),
        weights=weights,
        address=place.address,
        slots=setup.sampler.engine["num_slots"],
        every=every,
        tell=cli.say,
    )
    assert place.where is not None  # a policy was named
    await stack.enter_async_context(
        internal.serving(
            replica.application(place.token),
            place.where,
            failed=replica.failed,
            ended=lambda why: ServerError(f"this sampler's {why}"),
            broken=ending.tell,
        )
    )
    # So that no deadline of a turn counts it.
    await warming.warm_up({name: sampler}, deadline=_COMPILING, tell=cli.say)
    cli.say(f"samples {name} at {place.address} for {bucket.url}")
    await replica.run()


def _config() -> ml_collections.ConfigDict:
  """The run's recipe, checked as far as it concerns its samplers."""
  from experiments import joining, recipe

  config = cli.config_of(_CONFIG)
  recipe.name_bucket(config, _BUCKET.value)
  if not config.publish.bucket:
    raise ValueError("--bucket: must be the URL of the run's bucket")
  if not config.rollout.replicas:
    raise ValueError(
        "config.rollout.replicas: False, allowed: True; the run has to look for"
        " replicas"
    )
  joining.need_packages("httpx2", "starlette", "uvicorn")
  return config


def _alone(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The recipe as for a process that has no learner, and so no mesh for it."""
  found = config.copy_and_resolve_references()
  if _POLICY.value in found.policies:
    for axis in found.policies[_POLICY.value].mesh:
      found.policies[_POLICY.value].mesh[axis] = 1
  return found


def _wait_for_run(bucket: Store, values: Mapping[str, Any]) -> None:
  """Waits until the bucket is a run's; raises unless it is of this config."""
  from mgrpo_jax import atomic, ownership

  told = ""
  while True:
    try:
      if ownership.found(bucket, values):
        return
      problem = "no run has begun there"
    except atomic.StorageError as error:
      problem = str(error)
    if problem != told:
      cli.say(f"waits for a run in {bucket.url}: {problem}")
      told = problem
    time.sleep(_LOOK)


if __name__ == "__main__":
  cli.run(main, required=("config", "policy"))
