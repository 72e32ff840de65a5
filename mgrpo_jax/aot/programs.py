"""The programs that one policy runs, lowered for a mesh of absent devices.

No weight exists: arguments are shapes, types and shardings.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from mgrpo_jax import (
    losses,
    objectives,
    optim,
    packing,
    sharding,
    trainer,
    update,
)
from mgrpo_jax.aot import flops
from mgrpo_jax.aot.flops import Work
from mgrpo_jax.minibatches import shape_for
from mgrpo_jax.packing import BatchShape
from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy import lora, params, sampling
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Slots
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.sampler import device
from mgrpo_jax.types import Reference, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What one policy is to do, and where.

  Attributes:
    config: of the transformer, its execution included.
    lora: the adapter that is trained; None to train the weights.
    mesh: size of each mesh axis of the learner.
    devices: as many as the learner's mesh and one sampler take.
    sampler_tensor: devices that share one copy of the weights for sampling.
    shape: of a micro-batch.
    objective: what is minimised.
    optimizer: how gradients become updates.
    temperature: that was sampled with, > 0.
    reference: what the objective compares with.
    engine: `num_slots`, `context`, `block`, `prefill_tokens`,
      `prefill_buckets`, `decode_steps`, `decode_rows` of each sampling engine.

  Raises:
    ValueError: something is not a multiple of the devices it is split over.
  """

  config: TransformerConfig
  lora: LoRA | None
  mesh: Mapping[str, int]
  devices: Sequence[Any]
  sampler_tensor: int
  shape: BatchShape
  objective: objectives.Objective
  optimizer: optim.AdamW
  temperature: float
  reference: Reference
  engine: Mapping[str, Any]

  def __post_init__(self) -> None:
    """Checks that everything divides."""
    mesh = AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh))
    specs = params.param_specs(self.config)
    sharding.params_shardings(specs, mesh)
    sharding.batch_shardings(packing.empty(self.shape), mesh)
    sampler = AbstractMesh((1, 1, self.sampler_tensor, 1), sharding.MESH_AXES)
    sharding.params_shardings(specs, sampler)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One traced program.

  Attributes:
    traced: to be lowered and compiled.
    mesh: of its devices; explicit axes are to be set while lowering.
    work: FLOPs of all devices, loops as often as they run.
    held: bytes a device of each kind of what is there while it runs.
  """

  traced: Any
  mesh: Mesh
  work: Work
  held: Mapping[str, int]

  def compile(self) -> Any:
    """Lowers and compiles for TPU; minutes, for a large program."""
    return self.traced.lower(lowering_platforms=("tpu",)).compile()


def programs(plan: Plan) -> dict[str, Callable[[], Program]]:
  """Lists what a policy runs; nothing is traced until it is called.

  Args:
    plan: what and where.

  Returns:
    Functions that trace: `accumulate` (a micro-batch's gradient), `apply`
    (the update), `prefill` and `decode` (a visit of the sampler).
  """
  return {
      name: functools.partial(function, plan)
      for name, function in (
          ("accumulate", _accumulate),
          ("apply", _apply),
          ("prefill", _prefill),
          ("decode", _decode),
      )
  }


def device_bytes(tree: Any) -> int:
  """Counts what one device holds of a tree.

  Args:
    tree: of shapes with shardings; without one, a device holds all of it.

  Returns:
    Bytes, without padding.
  """

  def count(leaf: Any) -> int:
    shape = leaf.shape
    if getattr(leaf, "sharding", None) is not None:
      shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(map(count, jax.tree.leaves(tree)))


def _accumulate(plan: Plan) -> Program:
  """Adds a micro-batch's gradient; see `update.accumulate`."""
  mesh = _train_mesh(plan)
  trained, base = _trained(plan, mesh)
  rows = packing.empty(shape_for(plan.shape, plan.objective))
  batch = _placed(rows, sharding.batch_shardings(rows, mesh))
  scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
  imitates = isinstance(plan.objective, objectives.ImitationLoss)
  gradient = update.Gradient(grads=trained, loss=scalar)
  with jax.set_mesh(mesh):
    traced = trainer.accumulate.trace(
        gradient,
        trained,
        base,
        batch,
        losses.Totals(scalar, scalar, scalar),
        objective=plan.objective,
        lora=plan.lora,
        config=plan.config,
        temperature=plan.temperature,
        most_wanted=0 if imitates else plan.shape.most_wanted,
    )
  held = {
      **_kept(plan, mesh),
      "parameters": trained,
      "gradients": gradient,
      "batch": batch,
  }
  return _program(traced, mesh, held)


def _apply(plan: Plan) -> Program:
  """Makes the update; see `update.apply`."""
  mesh = _train_mesh(plan)
  trained, _ = _trained(plan, mesh)
  step: Any = jax.ShapeDtypeStruct((), jnp.int32)
  rng: Any = jax.ShapeDtypeStruct((2,), jnp.uint32)
  scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
  with jax.set_mesh(mesh):
    begin = optim.adamw(plan.optimizer).init
    state = TrainState(
        params=trained,
        opt_state=jax.eval_shape(begin, trained),
        step=step,
        rng=rng,
        reference=trained if plan.reference == "moving" else None,
    )
    gradient = update.Gradient(grads=trained, loss=scalar)
    traced = trainer.apply.trace(
        state, gradient, scalar, optimizer=plan.optimizer
    )
  held = {
      **_kept(plan, mesh),
      "parameters": trained,
      "gradients": gradient,
      "optimizer": state.opt_state,
  }
  if state.reference is not None:
    held["reference"] = state.reference
  return _program(traced, mesh, held)


def _prefill(plan: Plan) -> Program:
  """Adds the longest pieces to the cache; see `sampler.device`."""
  width = max(plan.engine["prefill_buckets"])
  rows = max(1, plan.engine["prefill_tokens"] // width)
  tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
  each = jax.ShapeDtypeStruct((rows,), jnp.int32)
  mesh, weights, cache = _sampler(plan)
  traced = device.prefill.trace(
      weights,
      cache,
      tokens,
      each,
      each,
      each,
      config=plan.config,
      heads=device.split_heads(mesh),
  )
  return _program(traced, mesh, {"weights": weights, "cache": cache})


def _decode(plan: Plan) -> Program:
  """Samples a visit's tokens for every slot; see `sampler.device`."""
  mesh, weights, cache = _sampler(plan)
  steps, slots = plan.engine["decode_steps"], plan.engine["num_slots"]
  each = functools.partial(jax.ShapeDtypeStruct, (slots,))
  state = Slots(
      token=each(jnp.int32),
      length=each(jnp.int32),
      budget=each(jnp.int32),
      seed=jax.ShapeDtypeStruct((slots, 2), jnp.uint32),
      drawing=jax.eval_shape(lambda: sampling.plainly(slots)),
      stop_ids=jax.ShapeDtypeStruct((slots, sampling.MAX_STOP_IDS), jnp.int32),
  )
  traced = device.decode.trace(
      weights,
      cache,
      state,
      config=plan.config,
      num_steps=steps,
      num_rows=plan.engine["decode_rows"] or slots,
      heads=device.split_heads(mesh),
  )
  held = {"weights": weights, "cache": cache}
  return _program(traced, mesh, held, loops=steps)


def _program(
    traced: Any, mesh: Mesh, held: Mapping[str, Any], loops: int = 1
) -> Program:
  """Measures what can be known without compiling."""
  return Program(
      traced=traced,
      mesh=mesh,
      work=flops.traced(traced.jaxpr, loops=loops),
      held={name: device_bytes(tree) for name, tree in held.items()},
  )


def _train_mesh(plan: Plan) -> Mesh:
  """The learner's mesh."""
  number = math.prod(plan.mesh.values())
  return sharding.make_mesh(**plan.mesh, devices=plan.devices[:number])


def _kept(plan: Plan, mesh: Mesh) -> dict[str, Any]:
  """The weights that the run began with, where they are read again."""
  reads = plan.lora is not None or plan.reference == "first"
  return {"loaded": _loaded(plan, mesh)} if reads else {}


def _loaded(plan: Plan, mesh: Mesh) -> Any:
  """The weights that a run begins with, in their shards."""
  return sharding.shapes(params.param_specs(plan.config), mesh)


def _trained(plan: Plan, mesh: Mesh) -> tuple[Any, Any]:
  """What is trained, at rest, and the base that it adapts or None."""
  weights = _loaded(plan, mesh)
  if plan.lora is None:
    return weights, None
  specs = lora.adapter_specs(plan.config, plan.lora)
  return sharding.shapes(specs, mesh), weights


def _sampler(plan: Plan) -> tuple[Mesh, Any, Any]:
  """The mesh of one copy of the weights; weights and cache on it."""
  config = plan.config
  mesh = sharding.sampler_mesh(plan.devices[: plan.sampler_tensor])
  resting = jax.tree.map(
      lambda one: jax.ShapeDtypeStruct(
          one.shape, config.dtype, sharding=one.sharding
      ),
      _loaded(plan, mesh),
  )
  sizes = {
      "num_slots": plan.engine["num_slots"],
      "length": plan.engine["context"],
      "block": plan.engine["block"],
      "num_rows": plan.engine["decode_rows"] or plan.engine["num_slots"],
  }
  cache = jax.eval_shape(functools.partial(caching.init, config, **sizes))
  heads = device.split_heads(mesh)
  return mesh, resting, _placed(cache, jax.tree.map(lambda _: heads, cache))


def _placed(tree: Any, places: Any) -> Any:
  """Shapes with shardings."""
  return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
          np.shape(leaf), leaf.dtype, sharding=place
      ),
      tree,
      places,
  )
