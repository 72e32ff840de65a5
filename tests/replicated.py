"""Replicas of a policy: in this process, over real sockets, and as commands."""

import asyncio
import contextlib

import commands

from mgrpo_jax import publish
from mgrpo_jax.policy import fingerprint
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.replicas.pool import Pool
from mgrpo_jax.replicas.replica import Replica
from mgrpo_jax.replicas.weights import Weights
from mgrpo_jax.sampler.connection import Address
from mgrpo_jax.serving import internal
from mgrpo_jax.serving.listen import bind

TOKEN = "0123456789abcdef"
EVERY = 0.05  # seconds


@contextlib.asynccontextmanager
async def replica(
    bucket, name, engine, policy, *, lora=None, slots=8, token=TOKEN
):
  """A sampler that follows a policy while it is entered."""
  said = []
  with bind("127.0.0.1", 0) as where:
    made = Replica(
        bucket,
        name,
        engine,
        weights=Weights(policy, lora, None),
        address=f"http://127.0.0.1:{where.getsockname()[1]}",
        slots=slots,
        every=EVERY,
        tell=said.append,
    )
    made.said = said
    async with (
        engine,
        internal.serving(
            made.application(token),
            where,
            failed=made.failed,
            ended=RuntimeError,
            broken=said.append,
        ),
    ):
      task = asyncio.create_task(made.run())
      try:
        yield made
      finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def pool(engine, bucket, name, *, token=TOKEN, **sizes):
  """A policy's engine with replicas."""
  address = Address(
      url="http://127.0.0.1:1", token=token, max_concurrent=1, timeout=30.0,
      attempts=1,
  )  # fmt: skip
  return Pool(engine, bucket, name, address=address, every=EVERY, **sizes)


def put(bucket, name, policy, params, number):
  """Publishes weights as a run does."""
  meta = {"fingerprint": fingerprint.fingerprint(policy)}
  return publish.publish(
      bucket, name, number, params, keep=3, meta=meta
  ).version


def policy_of(config, params):
  return Policy(
      config=config, params=params, tokenizer=None, chat="compact", system=""
  )


async def until(true, seconds=20.0):
  """Waits for something to become true."""
  async with asyncio.timeout(seconds):
    while not true():
      await asyncio.sleep(0.01)


def command(directory, *arguments):
  """`experiments.replica` as a process, which logs to `replica.log`."""
  with open(directory / "replica.log", "a") as log:
    return commands.start(
        "-m", "experiments.replica", commands.SMOKE, *arguments,
        stdout=log, stderr=log,
    )  # fmt: skip
