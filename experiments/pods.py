"""From a recipe to what each policy's compiler needs to know."""

import dataclasses
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from jax.experimental import topologies

from configs import architectures
from experiments import checks, placing, recipe
from mgrpo_jax.aot import chips
from mgrpo_jax.aot.programs import Plan
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import huggingface

ARCHITECTURES: Mapping[str, Callable[[], dict[str, Any]]] = {
    name: function
    for name, function in inspect.getmembers(architectures, inspect.isfunction)
    if not name.startswith("_")
}


def plans(
    config: ml_collections.ConfigDict, topology: chips.Topology
) -> dict[str, Plan]:
  """Plans every policy of a recipe's team.

  Args:
    config: of the recipe.
    topology: whose devices the policies get, each its own.

  Returns:
    Plans by policy, in the team's order.

  Raises:
    ValueError: a value is impossible, or there are too few devices.
  """
  recipe.check(config, num_devices=topology.chips * topology.slices)
  names = recipe.build_team(config).policies
  configs = {name: _transformer(config, name) for name in names}
  described = topologies.get_topology_desc(**topology.description())
  devices = chips.split(
      described.devices,
      {name: math.prod(config.policies[name].mesh.values()) for name in names},
  )
  method = recipe.build_method(config)
  reinforced = any(
      s.objective == "reinforce" for s in recipe.build_stages(config)
  )
  made = {}
  for name in names:
    one = config.policies[name]
    with checks.inside(f"policies.{name}"):
      made[name] = Plan(
          config=configs[name],
          mesh=dict(one.mesh),
          devices=devices[name],
          sampler_tensor=one.sampler_tensor,
          shape=method.shape,
          objective=method.policy_loss if reinforced else method.imitation_loss,
          optimizer=method.optimizer,
          temperature=config.rollout.temperature,
          engine=dict(config.engine),
      )
  return made


def _transformer(
    config: ml_collections.ConfigDict, name: str
) -> TransformerConfig:
  """What a policy computes, and how; no weights are read."""
  one, key = config.policies[name], f"policies.{name}"
  path = pathlib.Path(one.source) / "config.json"
  if one.architecture:
    choice = checks.pick(ARCHITECTURES, one.architecture, f"{key}.architecture")
    fields, source = choice(), one.architecture
  elif path.is_file():
    fields, source = json.loads(path.read_text()), str(path)
  else:
    raise ValueError(
        f"config.{key}.source: {one.source!r} holds no config.json, and"
        f" config.{key}.architecture names none of"
        f" {', '.join(sorted(ARCHITECTURES))}"
    )
  with checks.inside(key):
    return dataclasses.replace(
        huggingface.read(fields, source),
        dtype=one.dtype,
        execution=placing.execution(config, name),
    )
