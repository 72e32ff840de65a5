"""One process of an engine over two; what it saw, as JSON lines.

python tests/followed.py ADDRESS NUMBER
"""

import asyncio
import json
import os
import sys

import jax
import numpy as np

from mgrpo_jax import sharding
from mgrpo_jax.policy import params
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import links
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sampler.follower import Follower
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.testing.sizes import tiny_config

CONFIG = tiny_config(
    num_layers=1, num_heads=4, num_kv_heads=4, head_dim=4, vocab_size=64
)
SIZES = {
    "num_slots": 4,
    "context": 64,
    "block": 32,
    "prefill_tokens": 16,
    "prefill_buckets": (8,),
    "decode_steps": 4,
    "decode_rows": 0,
}
LOST = 600.0  # seconds of silence; the machine may be busy, or stand still
FAILED = 3  # exit code of a process that found the other one lost


def weights(version):
  """Weights of two versions, whole, the same wherever they are made."""
  init = jax.jit(params.init, static_argnums=1)
  made = init(jax.random.key(version), CONFIG)
  return jax.tree.map(lambda x: 2 * np.asarray(x), made)


def mesh(devices):
  return sharding.sampler_mesh(devices)


async def answers(engine):
  """More prompts than slots, two of them equal, one in two turns."""
  sampling = Sampling(temperature=1.0, max_new_tokens=9, stop_ids=(3,))

  async def talk(place, number):
    prompt = np.random.default_rng(number).integers(4, 60, 2 + 3 * number)
    tokens, told = prompt.tolist(), []
    for turn in range(1 + (number == 1)):
      one = await engine.generate(
          tokens, sampling, 10 * place + turn, session=str(place)
      )
      told.append([one.tokens.tolist(), one.logprobs.tolist()])
      tokens += [*one.tokens.tolist(), 5, 6, 7]
    engine.release(str(place))
    return told

  return await asyncio.gather(*map(talk, range(6), (0, 1, 2, 3, 4, 4)))


async def disturbed(engine):
  """Weights are swapped, and a request cancelled, while others go on."""
  sampling = Sampling(temperature=1.0, max_new_tokens=40, stop_ids=())
  cancelled = asyncio.ensure_future(engine.generate([5], sampling, 1))

  def swap(tokens, logprobs):
    del tokens, logprobs
    if not cancelled.done():
      cancelled.cancel()
      engine.update(weights(1), 1)

  long = await engine.generate([6, 7], sampling, 2, on_tokens=swap)
  await asyncio.gather(cancelled, return_exceptions=True)
  return {
      "versions": [long.version_min, long.version_max],
      "length": len(long.tokens),
      "cancelled": cancelled.cancelled(),
  }


async def led(engine):
  """All that is asked of an engine, over several processes or one."""
  async with engine:
    before = await answers(engine)
    middle = await disturbed(engine)
    after = await answers(engine)
    visits = engine.stats()["visits"]
  return {"before": before, "middle": middle, "after": after, "visits": visits}


def tell(**what):
  print(json.dumps(what), flush=True)


async def stay(engine):
  """Leads on, and waits to be killed."""
  async with engine:
    tell(again=await answers(engine))
    await asyncio.sleep(600)


def lead():
  crew = links.gather(address="127.0.0.1", deadline=LOST)
  engine = Engine(
      CONFIG, weights(0), 0, mesh=mesh(jax.devices()), crew=crew, **SIZES
  )
  tell(**asyncio.run(led(engine)))
  asyncio.run(stay(engine))


def follow():
  link = links.join(deadline=LOST)
  follower = Follower(
      CONFIG, weights(0), 0, mesh=mesh(jax.devices()), link=link, **SIZES
  )
  tell(visits=follower.follow(weights))
  try:
    follower.follow(weights)
  except EngineError as error:
    tell(error=str(error))
    os._exit(FAILED)  # without the farewell to a coordinator that is gone


def main():
  address, number = sys.argv[1:]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
      address, 2, int(number), heartbeat_timeout_seconds=int(LOST)
  )
  (follow if int(number) else lead)()


if __name__ == "__main__":
  main()
