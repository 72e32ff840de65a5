"""Where arrays live: mesh axes, and one table from logical axes to them.

Every parameter and activation names its dimensions logically; `RULES` alone
knows which mesh axis, if any, a name is split over. Meshes have explicit axis
types: a sharding is part of an array's type, and an operation whose result is
ambiguous says it (`out`). Without a mesh all of this is the identity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)
from jaxtyping import Array

MESH_AXES = ("data", "fsdp", "tensor", "expert")

BATCH_AXES = ("data", "fsdp")

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,  # rows, trajectories
    "length": None,  # tokens of a row
    "hidden": None,  # E of activations, and of weights while in use
    "embed": "fsdp",  # E of weights and of optimizer state at rest
    "norm": None,
    "vocab": "tensor",
    "kv_heads": "tensor",
    "group": None,  # query heads that share a key head
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "router": None,  # experts, as columns of the router
    "rank": None,  # of a low-rank adapter
    "slot": None,  # token streams being sampled
}


class IndivisibleError(ValueError):
  """An array's dimension is no multiple of the devices it is split over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meshes:
  """Where a policy lives.

  Attributes:
    learner: of `make_mesh`, or None for the default device.
    sampler: of `sampler_mesh`, or None for the default device.
  """

  learner: Mesh | None
  sampler: Mesh | None


def make_mesh(
    *,
    data: int,
    fsdp: int,
    tensor: int,
    expert: int,
    devices: Sequence[jax.Device],
) -> Mesh:
  """Arranges devices on the four axes, with explicit types.

  Args:
    data: replicas of the weights.
    fsdp: pieces that weights and optimizer state are kept in.
    tensor: pieces that heads, feed-forward and vocabulary are computed in.
    expert: pieces that experts are computed in.
    devices: as many as the product of the four.

  Returns:
    The mesh; enter it with `jax.set_mesh`.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or the
      devices cannot be arranged so.
  """
  sizes = (data, fsdp, tensor, expert)
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    named = dict(zip(MESH_AXES, sizes, strict=True))
    raise ValueError(
        f"mesh {named} must have positive sizes whose product is the number"
        f" of devices, {len(devices)}"
    )
  grid = _arranged(sizes, devices)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)


def sampler_mesh(devices: Sequence[jax.Device]) -> Mesh:
  """Arranges devices on the tensor axis, with automatic types.

  What the sampler does with a cache (copying slots, attending to blocks that
  may be skipped, drawing tokens) splits over heads and vocabulary without
  choices to make, so the compiler splits it; `out` and its like, which speak
  of the mesh that is set, are the identity there.

  Args:
    devices: over which heads, feed-forward and vocabulary are split.

  Returns:
    The mesh, not to be set: arrays that are placed on it suffice.
  """
  grid = _arranged((1, 1, len(devices), 1), devices)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def spans_processes(mesh: Mesh) -> bool:
  """Says whether a mesh has devices of more than one process.

  Args:
    mesh: of devices that are there.

  Returns:
    Whether programs on it run in several processes at once.
  """
  return len({device.process_index for device in mesh.devices.flat}) > 1


def _arranged(sizes: tuple[int, ...], devices: Sequence[Any]) -> Any:
  """Lays devices out as a mesh, neighbours together where that can be."""
  slices = len(by_slice(devices))
  if slices > 1 and sizes[0] % slices:
    raise ValueError(
        f"a mesh over {slices} slices must have a multiple of {slices} data"
        f" replicas, between which little is exchanged, got {sizes[0]}"
    )
  within = (sizes[0] // slices, *sizes[1:])
  # Two tensor pieces of four in a row split one axis of the torus, which
  # `jax.make_mesh` refuses.
  arrange = functools.partial(
      mesh_utils.create_device_mesh, within, allow_split_physical_axes=True
  )
  if slices > 1:
    arrange = functools.partial(
        mesh_utils.create_hybrid_device_mesh,
        within,
        (slices, 1, 1, 1),
        allow_split_physical_axes=True,
    )
  try:
    return arrange(devices)
  except (AssertionError, NotImplementedError) as error:
    raise ValueError(
        f"{len(devices)} devices that do not stand in a block cannot become a"
        f" mesh of {sizes}; take 1, 2, 4, … or all of a slice"
    ) from error


def assign(
    needs: Mapping[str, int], devices: Sequence[Any], *, apart: bool = False
) -> dict[str, tuple[Any, ...]]:
  """Decides which devices each policy lives on.

  Where a policy needs more than one device and there are enough for all, the
  groups are disjoint. A policy that fits in one slice never straddles two.
  Where disjoint groups are not to be had, policies take turns on the devices.

  Args:
    needs: devices that each policy takes, by name.
    devices: all of them; slices are told apart by `slice_index`.
    apart: whether policies of one device each also get one of their own.

  Returns:
    Devices by name, as many as needed.

  Raises:
    ValueError: if a policy needs more devices than there are.
  """
  slices = by_slice(devices)
  for name, need in needs.items():
    if not 1 <= need <= len(devices):
      raise ValueError(
          f"{name} needs {need} devices, allowed: 1 to {len(devices)}"
      )
  if apart or max(needs.values(), default=1) > 1:
    free = [list(group) for group in slices]
    taken: dict[str, tuple[Any, ...]] = {}
    for name in sorted(needs, key=lambda name: -needs[name]):
      group = _take(needs[name], free, slices)
      if group is None:
        break
      taken[name] = group
    else:
      return {name: taken[name] for name in needs}
  shared = {
      name: _take(need, [list(group) for group in slices], slices)
      for name, need in needs.items()
  }
  return {name: group for name, group in shared.items() if group is not None}


def by_slice(devices: Sequence[Any]) -> list[list[Any]]:
  """Sorts devices by the slice that they belong to.

  Args:
    devices: told apart by `slice_index`, where they have one.

  Returns:
    Slices in order of their first device, each in the order given.
  """
  slices: dict[int, list[Any]] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
  return list(slices.values())


def spec(*logical_axes: str) -> PartitionSpec:
  """Looks logical axes up in `RULES`.

  Args:
    *logical_axes: a name for each dimension.

  Returns:
    The partition spec.
  """
  return PartitionSpec(*(RULES[axis] for axis in logical_axes))


def out(*logical_axes: str) -> PartitionSpec | None:
  """Gives the sharding of an operation's result under the current mesh.

  Args:
    *logical_axes: a name for each dimension of the result.

  Returns:
    A partition spec for `out_sharding`; None where no mesh is set.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return None
  return spec(*logical_axes)


def constrain(x: Array, *logical_axes: str) -> Array:
  """Moves an array to the sharding its axes have under the current mesh.

  Args:
    x: any array.
    *logical_axes: a name for each of its dimensions.

  Returns:
    The same values; x itself where no mesh is set.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.sharding.reshard(x, spec(*logical_axes))


def gather(weight: Array, *logical_axes: str) -> Array:
  """Brings a weight to where it is used, whole but for tensor axes.

  The weight's type then says `reduced` over the batch axes, so its gradient
  stays a sum not yet taken over them while it is accumulated, and is summed
  once, straight into the shards it rests in.

  Deviation: with bfloat16 activations that sum over devices is taken in
  bfloat16, like the products before it; only afterwards it is float32.

  Args:
    weight: a parameter that multiplies activations in an einsum.
    *logical_axes: a name for each dimension while in use.

  Returns:
    The same values; weight itself where no mesh is set.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return weight
  in_use = PartitionSpec(*spec(*logical_axes), reduced=set(BATCH_AXES))
  return jax.sharding.reshard(weight, in_use)


def params_shardings(specs: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Says where each parameter rests.

  Args:
    specs: pytree of `ParamSpec`, from `params.param_specs`.
    mesh: with the axes of `MESH_AXES`.

  Returns:
    The same tree of `NamedSharding`. Optimizer state that mirrors the
    parameters takes the same.

  Raises:
    IndivisibleError: if a dimension is not a multiple of the devices it is
      split over, naming the parameter.
  """

  def place(path: tuple[Any, ...], param: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path)
    return _place(name, param.shape, param.logical_axes, mesh)

  return jax.tree.map_with_path(place, specs)


def batch_shardings(batch: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Splits every array of a batch by its leading dimension.

  Args:
    batch: pytree of arrays (or their shapes) led by rows or trajectories.
    mesh: with the axes of `MESH_AXES`.

  Returns:
    The same tree of `NamedSharding`.

  Raises:
    IndivisibleError: if a leading dimension is not a multiple of the devices
      it is split over, naming the array.
  """

  def place(path: tuple[Any, ...], array: Any) -> NamedSharding:
    axes = ("batch",) + ("length",) * (len(array.shape) - 1)
    return _place(jax.tree_util.keystr(path), array.shape, axes, mesh)

  return jax.tree.map_with_path(place, batch)


def shapes(specs: Any, mesh: Mesh | AbstractMesh | None) -> Any:
  """Gives the parameters' shapes and where they rest, without values.

  Args:
    specs: pytree of `ParamSpec`, from `params.param_specs`.
    mesh: with the axes of `MESH_AXES`, or None for no place.

  Returns:
    The same tree of `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: see `params_shardings`.
  """
  if mesh is None:
    return jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), specs
    )
  return jax.tree.map(
      lambda one, where: jax.ShapeDtypeStruct(
          one.shape, one.dtype, sharding=where
      ),
      specs,
      params_shardings(specs, mesh),
  )


def _take(
    need: int, free: list[list[Any]], slices: list[list[Any]]
) -> tuple[Any, ...] | None:
  """Takes devices out of what is free: of one slice if the slice is enough."""
  for group in free:
    if len(group) >= need:
      taken, group[:] = tuple(group[:need]), group[need:]
      return taken
  if need <= max(map(len, slices)) or need > sum(map(len, free)):
    return None
  flat = [device for group in free for device in group]
  kept = set(flat[need:])
  for group in free:
    group[:] = [device for device in group if device in kept]
  return tuple(flat[:need])


def _place(
    name: str,
    shape: tuple[int, ...],
    logical_axes: tuple[str, ...],
    mesh: Mesh | AbstractMesh,
) -> NamedSharding:
  """Builds one sharding, checking that it divides the shape."""
  sharding = NamedSharding(mesh, spec(*logical_axes))
  for size, axis in zip(shape, logical_axes, strict=True):
    pieces = _pieces(axis, mesh)
    if size % pieces:
      raise IndivisibleError(
          f"{name}: {axis}={size} must be a multiple of {pieces}, the product"
          f" of mesh axes {RULES[axis]!r}"
      )
  return sharding


def _pieces(logical_axis: str, mesh: Mesh | AbstractMesh) -> int:
  """Counts the pieces that a logical axis is split into."""
  axes = RULES[logical_axis]
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)
