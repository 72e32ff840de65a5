"""The models of a run: its team under the recipe's name, and every policy."""

from __future__ import annotations

import functools

from mgrpo_jax.agents.actor import Actor, sampled
from mgrpo_jax.resources import Resources
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.serving.models import Model
from mgrpo_jax.serving.policy import Speaker, policy
from mgrpo_jax.serving.sessions import Sessions
from mgrpo_jax.serving.team import team


def engines(resources: Resources) -> dict[str, Engine]:
  """Lists the engines of a run, all of which must be of this process.

  Args:
    resources: of the run.

  Returns:
    Engines by policy.

  Raises:
    ValueError: a policy is sampled elsewhere.
  """
  found: dict[str, Engine] = {}
  for name, engine in resources.engines.items():
    if not isinstance(engine, Engine):
      raise ValueError(f"policy {name!r} is sampled elsewhere")
    found[name] = engine
  return found


def models(
    resources: Resources, name: str, *, conversations: int
) -> dict[str, Model]:
  """Makes models of what a run samples from.

  Args:
    resources: of the run, engines started.
    name: of the team's model.
    conversations: with each policy whose cache is kept for their next turn; at
      most half of the slots are, so that agents keep theirs.

  Returns:
    Models by name, the team first; policies that are plain code are not among
    them.

  Raises:
    ValueError: a policy has the team's name, no tokenizer, or is sampled
      elsewhere.
  """
  setup = resources.setup
  environment = resources.testing_of(setup.team_after(resources.newest))
  own = engines(resources)
  tokenizers = {}
  for key, one in setup.policies.items():
    if one.tokenizer is None:
      raise ValueError(f"policy {key!r} has no tokenizer")
    tokenizers[key] = one.tokenizer
  if name in tokenizers:
    raise ValueError(
        f"name: {name!r} is a policy's, too; the team's must be another"
    )
  root = environment.team[environment.team.root].policy
  if root not in tokenizers:  # plain code, which writes as the first one does
    root = next(iter(tokenizers))

  def actors(client: str) -> dict[str, Actor]:
    mine = {
        key: sampled(
            functools.partial(engine.generate, tenant=client),
            release=engine.release,
            chat=environment.actors[key].chat,
            protocol=environment.actors[key].protocol,
        )
        for key, engine in own.items()
    }
    return mine | dict(setup.coded)

  made = [
      team(
          name,
          environment=environment,
          tokenizer=tokenizers[root],
          actors=actors,
      )
  ]
  slots = setup.sampler.engine["num_slots"]
  for key, engine in own.items():
    actor = environment.actors[key]
    made.append(
        policy(
            Speaker(
                name=key,
                generate=engine.generate,
                context=setup.sampler.engine["context"],
                chat=actor.chat,
                protocol=actor.protocol,
                tokenizer=tokenizers[key],
                temperature=environment.temperature,
                sessions=Sessions(
                    engine.generate,
                    engine.release,
                    limit=min(conversations, slots // 2),
                ),
            )
        )
    )
  return {one.name: one for one in made}
