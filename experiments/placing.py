"""Where the policies of a recipe live, and how they are run there."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from experiments import checks
from mgrpo_jax import sharding
from mgrpo_jax.agents.team import Team
from mgrpo_jax.hosts import spread
from mgrpo_jax.policy import arranging, attention, paged
from mgrpo_jax.policy.config import (
    DTYPES,
    CacheAttention,
    Execution,
    TransformerConfig,
)
from mgrpo_jax.policy.native import streams
from mgrpo_jax.policy.params import param_specs
from mgrpo_jax.sharding import Meshes

ATTENTIONS: Mapping[str, Callable[..., Any]] = {
    "blockwise": attention.blockwise,
    "splash": attention.splash,
}
DECODE_ATTENTIONS: Mapping[str, CacheAttention | None] = {
    "blocks": None,
    "native": streams.ATTENTION,
    "paged": paged.ATTENTION,
}
REMATS: Mapping[str, Callable[..., Any] | None] = {
    "none": None,
    "layer": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(
        attention.ATTENDED
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check(values: Mapping[str, Any], number: int, *, only: str = "") -> None:
  """Checks that policies fit the devices, and batches their meshes.

  Args:
    values: of the config, nested; each in its range.
    number: of devices there are.
    only: the policy whose job this is; the others' devices are elsewhere.

  Raises:
    ValueError: they do not; names the key and what is allowed.
  """
  for name, policy in values["policies"].items():
    if policy["dtype"] not in DTYPES:
      raise ValueError(
          f"config.policies.{name}.dtype: {policy['dtype']!r}, allowed:"
          f" {', '.join(DTYPES)}"
      )
    mesh = policy["mesh"]
    for key, size in (
        ("mesh", math.prod(mesh.values())),
        ("sampler_tensor", policy["sampler_tensor"]),
    ):
      if size > number and only in ("", name):
        raise ValueError(
            f"config.policies.{name}.{key}: takes {size} devices, there are"
            f" {number}"
        )
    pieces = mesh["data"] * mesh["fsdp"]
    for key in ("rows", "trajectories"):
      if values["batch"][key] % pieces:
        raise ValueError(
            f"config.batch.{key}: {values['batch'][key]} must be a multiple of"
            f" {pieces}, the product of config.policies.{name}.mesh.data and"
            f" config.policies.{name}.mesh.fsdp"
        )


def playing(config: ml_collections.ConfigDict, team: Team) -> tuple[str, ...]:
  """Names the policies that play in a run, whenever they do.

  Args:
    config: the whole recipe.
    team: of the recipe.

  Returns:
    Names, in the team's order, then those of later casts in the curriculum's.
  """
  stages = (config.stages[n] for n in config.curriculum if n in config.stages)
  later = (one.cast[role] for one in stages for role in sorted(one.cast))
  return tuple(dict.fromkeys((*team.policies, *later)))


def weighted(config: ml_collections.ConfigDict, team: Team) -> tuple[str, ...]:
  """Names the policies of a run that have weights, and so take devices.

  Args:
    config: the whole recipe.
    team: of the recipe.

  Returns:
    Names, in the order of `playing`; without symbolic policies.
  """
  return tuple(n for n in playing(config, team) if n not in config.symbolic)


def needs(
    config: ml_collections.ConfigDict, names: Sequence[str]
) -> dict[str, int]:
  """Counts the devices that each policy takes.

  Args:
    config: the whole recipe, checked.
    names: of the policies.

  Returns:
    Devices by policy: the more of its learner's and of one sampler's.
  """
  policies = [(name, config.policies[name]) for name in names]
  return {
      name: max(math.prod(one.mesh.values()), one.sampler_tensor)
      for name, one in policies
  }


def meshes(
    config: ml_collections.ConfigDict,
    team: Team,
    devices: Sequence[jax.Device],
    *,
    only: str = "",
) -> dict[str, Meshes]:
  """Gives every policy its devices; see `sharding.assign`.

  Args:
    config: the whole recipe, checked.
    team: of the recipe.
    devices: that there are.
    only: the policy whose job this is; others then take none of them.

  Returns:
    Meshes by policy; None where a policy has the first device for itself, or
    shares it.
  """
  names = (only,) if only else weighted(config, team)
  sizes = {name: config.policies[name].mesh.to_dict() for name in names}
  heads = {name: config.policies[name].sampler_tensor for name in names}
  nowhere = Meshes(learner=None, sampler=None)
  made = dict.fromkeys(weighted(config, team), nowhere)
  # A machine's CPU devices are the same cores; accelerators are not.
  apart = devices[0].platform != "cpu"
  groups = sharding.assign(needs(config, names), devices, apart=apart)
  for name, group in groups.items():
    alone = group == (devices[0],)
    number = math.prod(sizes[name].values())
    learner = None
    if not alone:
      learner = sharding.make_mesh(**sizes[name], devices=group[:number])
    if spread.is_spread(learner):  # process 0 samples, on what it has itself
      group = tuple(d for d in group if d.process_index == jax.process_index())
    made[name] = Meshes(
        learner=learner,
        sampler=None if alone else sharding.sampler_mesh(group[: heads[name]]),
    )
  return made


def has_critic(config: ml_collections.ConfigDict, name: str) -> bool:
  """Says whether a policy has a critic's head.

  Args:
    config: the whole recipe.
    name: of the policy.

  Returns:
    Whether the recipe has a critic and the policy learns.
  """
  return config.critic.coefficient > 0 and config.policies[name].trainable


def random_sizes(
    policy: ml_collections.ConfigDict, *, vocab_size: int
) -> TransformerConfig:
  """Builds the sizes of a policy that begins at random.

  Args:
    policy: of the recipe.
    vocab_size: of its tokenizer.

  Returns:
    A small transformer of the Llama family, float32.
  """
  return TransformerConfig(
      vocab_size=vocab_size,
      embed_dim=policy.embed_dim,
      num_layers=policy.num_layers,
      num_heads=policy.num_heads,
      num_kv_heads=policy.num_kv_heads,
      head_dim=policy.head_dim,
      mlp_dim=policy.mlp_dim,
      rope_base=policy.rope_base,
      norm_eps=policy.norm_eps,
      tied_embeddings=True,
      dtype="float32",
  )


def execution(config: ml_collections.ConfigDict, name: str) -> Execution:
  """Builds how a policy is run.

  Args:
    config: the whole recipe.
    name: of the policy.

  Returns:
    The execution.

  Raises:
    ValueError: a name or number is not allowed, naming its key.
  """
  one, key = config.policies[name].execution, f"policies.{name}.execution"
  with checks.inside(key):
    return Execution(
        attention=checks.pick(ATTENTIONS, one.attention, f"{key}.attention"),
        decode_attention=checks.pick(
            DECODE_ATTENTIONS,
            one.decode_attention,
            f"{key}.decode_attention",
        ),
        remat=checks.pick(REMATS, one.remat, f"{key}.remat"),
        scan_layers=one.scan_layers,
        logit_columns=one.logit_columns,
        kernels=one.kernels,
    )


def check_decoding(
    sizes: TransformerConfig, config: ml_collections.ConfigDict, name: str
) -> None:
  """Checks that a policy's sampler can attend as its recipe says.

  Args:
    sizes: of the transformer, its execution included.
    config: the whole recipe.
    name: of the policy.

  Raises:
    ValueError: it cannot, naming the key and what it would need.
  """
  if (attention := sizes.execution.decode_attention) is None:
    return
  engine = config.engine
  with checks.inside(f"policies.{name}.execution.decode_attention"):
    attention.check(
        sizes,
        num_slots=engine.num_slots,
        num_rows=engine.decode_rows or engine.num_slots,
        context=engine.context,
        block=engine.block,
        devices=config.policies[name].sampler_tensor,
    )


def executed(
    sizes: TransformerConfig,
    config: ml_collections.ConfigDict,
    name: str,
    where: Meshes,
) -> TransformerConfig:
  """Lets a policy run as its recipe says, where it divides.

  Args:
    sizes: of the transformer.
    config: the whole recipe.
    name: of the policy.
    where: it lives.

  Returns:
    The same sizes, with dtype and execution.

  Raises:
    ValueError: a mesh does not divide the parameters, naming one, its sampler
      could not keep kernels as it shall, or its rows cannot share prompts.
  """
  with checks.inside(f"policies.{name}"):
    sizes = dataclasses.replace(
        sizes,
        dtype=config.policies[name].dtype,
        execution=execution(config, name),
    )
  check_sharing(config, name, sizes)
  with checks.inside(f"policies.{name}.execution.kernels"):
    arranging.check(sizes, where.sampler)
  check_decoding(sizes, config, name)
  for key, mesh in (("mesh", where.learner), ("sampler_tensor", where.sampler)):
    if mesh is not None:
      with checks.inside(f"policies.{name}.{key}"):
        sharding.params_shardings(param_specs(sizes), mesh)
  return sizes


def check_sharing(
    config: ml_collections.ConfigDict, name: str, sizes: TransformerConfig
) -> None:
  """Checks that rows can share prompts, where the recipe says that they do.

  Args:
    config: the whole recipe.
    name: of the policy.
    sizes: of its transformer, with its execution.

  Raises:
    ValueError: they cannot, naming the key and why.
  """
  least = config.batch.least_shared
  if least and config.policies[name].trainable and sizes.shares_nothing:
    raise ValueError(
        f"config.batch.least_shared: {least}, allowed: 0 with"
        f" config.policies.{name}, because {sizes.shares_nothing}"
    )
