"""From a recipe to what each policy's compiler needs to know."""

import dataclasses
import inspect
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from jax.experimental import topologies

from configs import architectures
from experiments import checks, method, placing, recipe
from mgrpo_jax import sharding
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
  names = placing.weighted(config, recipe.build_team(config))
  configs = {name: _transformer(config, name) for name in names}
  described = topologies.get_topology_desc(**topology.description())
  needs = placing.needs(config, names)
  devices = sharding.assign(needs, described.devices, apart=True)
  if len({device.id for group in devices.values() for device in group}) < sum(
      needs.values()
  ):
    wanted = ", ".join(f"{name} {number}" for name, number in needs.items())
    raise ValueError(
        f"config.policies: meshes of {wanted} devices, allowed: what"
        f" {topology.name} has for all of them side by side"
    )
  loras = {
      name: one.lora for name, one in recipe.build_adaptations(config).items()
  }
  chosen = method.build(config)
  reinforced = any(
      s.objective == "reinforce" for s in recipe.build_stages(config)
  )
  made = {}
  for name in names:
    one = config.policies[name]
    with checks.inside(f"policies.{name}"):
      made[name] = Plan(
          config=configs[name],
          lora=loras.get(name),
          mesh=dict(one.mesh),
          devices=_compiled_for(devices[name], described.devices),
          sampler_tensor=one.sampler_tensor,
          shape=chosen.shape,
          objective=chosen.policy_loss if reinforced else chosen.imitation_loss,
          optimizer=chosen.optimizer,
          temperature=config.rollout.temperature,
          reference=chosen.reference,
          engine=dict(config.engine),
      )
  return made


def _compiled_for(
    held: Sequence[Any], devices: Sequence[Any]
) -> tuple[Any, ...]:
  """The same places on the first slice, for what lies on another one.

  Slices are equal, and the compiler (libtpu 0.0.42) takes no program that
  leaves the first one out: "Slice is empty".
  """
  slices = sharding.by_slice(devices)
  own = next((one for one in slices if set(held) <= set(one)), None)
  if own is None:
    return tuple(held)
  return tuple(slices[0][own.index(device)] for device in held)


def _transformer(
    config: ml_collections.ConfigDict, name: str
) -> TransformerConfig:
  """What a policy computes, and how; no weights are read."""
  one, key = config.policies[name], f"policies.{name}"
  path = pathlib.Path(one.source) / "config.json"
  with checks.inside(key):
    if one.architecture:
      choice = checks.pick(
          ARCHITECTURES, one.architecture, f"{key}.architecture"
      )
      sizes = huggingface.read(choice(), one.architecture)
    elif one.source == "random":
      sizes = placing.random_sizes(one, vocab_size=one.vocab_size)
    elif path.is_file():
      sizes = huggingface.read(_fields(path), str(path))
    else:
      raise ValueError(
          f"config.{key}.source: {one.source!r} holds no config.json, and"
          f" config.{key}.architecture names none of"
          f" {', '.join(sorted(ARCHITECTURES))}"
      )
    made = dataclasses.replace(
        sizes,
        dtype=one.dtype,
        value_head=placing.has_critic(config, name),
        execution=placing.execution(config, name),
    )
  placing.check_sharing(config, name, made)
  placing.check_decoding(made, config, name)
  return made


def _fields(path: pathlib.Path) -> dict[str, Any]:
  """Reads a model's config.json."""
  try:
    return json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
