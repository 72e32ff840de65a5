"""Whole runs in miniature in which an untrained main agent does delegate.

What it says in such turns is plain code's; everything else is sampled.
"""

import dataclasses

import numpy as np

from mgrpo_jax.agents.actor import Actor
from mgrpo_jax.agents.protocol import Action
from mgrpo_jax.agents.team import Team
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.testing.setup import small_setup
from mgrpo_jax.testing.team import small_team

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
      children = moment.role.calls
      action = Action(
          kind="call",
          name=children[moment.seed // 7 % len(children)],
          arguments={"request": request},
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


def cast_setup(*, seed, evaluate_every=3):
  """A run in which a policy leaves, another joins, and so does a role.

  Up to step 2 there is no checker, and the researcher is played by the policy
  of its name; then both are played by the scout's.
  """
  small = small_team(max_context=160, max_new_tokens=24, max_turns=3)
  main, researcher = small.roles
  main = dataclasses.replace(main, calls=("researcher", "checker"))
  checker = dataclasses.replace(
      researcher, name="checker", policy="scout", tools=()
  )
  team = Team(roles=(main, researcher, checker), root="main")
  made = delegating_setup(seed=seed, imitation_steps=1, steps=2, team=team)
  imitate, early = made.stages
  late = dataclasses.replace(early, name="late")
  before = team.without(("checker",))
  after = team.cast({"researcher": "scout"})
  return dataclasses.replace(
      made,
      stages=(imitate, early, late),
      tasks=dict.fromkeys(("imitate", "reinforce", "late"), made.dev),
      casts={"imitate": before, "reinforce": before, "late": after},
      evaluate_every=evaluate_every,
  )
