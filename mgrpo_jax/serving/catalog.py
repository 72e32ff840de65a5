"""The models of a run: its team under the recipe's name, and every policy."""

from __future__ import annotations

from mgrpo_jax.resources import Resources
from mgrpo_jax.serving.models import Model
from mgrpo_jax.serving.policy import Speaker, policy
from mgrpo_jax.serving.team import team


def models(resources: Resources, name: str) -> dict[str, Model]:
  """Makes models of what a run samples from.

  Args:
    resources: of the run, engines started.
    name: of the team's model.

  Returns:
    Models by name, the team first; policies that are plain code are not among
    them.

  Raises:
    ValueError: a policy has the team's name, or no tokenizer.
  """
  setup, environment = resources.setup, resources.testing
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
  made = [team(name, environment=environment, tokenizer=tokenizers[root])]
  for key, engine in resources.engines.items():
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
            )
        )
    )
  return {one.name: one for one in made}
