"""A whole run in miniature in which an untrained main agent does delegate.

What it says in such turns is plain code's; everything else is sampled.
"""

import dataclasses

import numpy as np

from mgrpo_jax.agents.actor import Actor
from mgrpo_jax.agents.protocol import Action
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.testing.setup import small_setup

REQUESTS = ("capital of Peru", "area of Chad", "rivers of Mali and Niger")


def delegating_setup(**changes):
  """`small_setup` with one or two calls in most rollouts."""
  setup = small_setup(**changes)

  def actor(name, engine):
    plain = setup.actor(name, engine)

    async def speak(moment):
      turn = len(moment.turns)
      wanted = moment.role.name == "main" and turn < 2
      if not wanted or moment.seed % (2 + turn) == 0:
        return await plain.speak(moment)
      one = Sampling(temperature=1.0, max_new_tokens=1, stop_ids=())
      drawn = await engine.generate(moment.tokens, one, moment.seed)
      request = REQUESTS[moment.seed % len(REQUESTS)]
      action = Action(
          kind="call", name="researcher", arguments={"request": request}
      )
      ids = plain.chat.write(plain.protocol.render(action))
      ids = ids[: moment.sampling.max_new_tokens]
      nothing = np.full(len(ids), -1.0, np.float32)
      return dataclasses.replace(
          drawn,
          tokens=np.asarray(ids, np.int32),
          logprobs=nothing,
          raw_logprobs=nothing,
          finish="stop",
      )

    return Actor(
        speak=speak,
        release=plain.release,
        chat=plain.chat,
        protocol=plain.protocol,
    )

  return dataclasses.replace(setup, actor=actor)
