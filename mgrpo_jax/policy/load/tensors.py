"""Stored tensors to parameters and back, a shard at a time.

Files store a kernel as a matrix [outputs, inputs]; a parameter has its inputs
first and its heads apart (`params.Layer`). Formats and families differ in what
tensors are called (`names`), not in this layout. A parameter is read straight
into the shards it rests in: no host holds more of the model than its own
shards and one tensor's part.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mgrpo_jax import sharding
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load.names import Names
from mgrpo_jax.policy.params import Layer, Params, ParamSpec, param_specs

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file, not read yet.

  Attributes:
    shape: as a matrix [outputs, inputs], a stack of them, or a vector.
    read: one slice a dimension -> the values there, floats of any width.
  """

  shape: tuple[int, ...]
  read: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
  """One parameter and the tensors that hold it.

  Attributes:
    names: of its tensor, or of one a slice of its leading axis (an expert).
    stacked: whether a leading axis counts experts.
    offset: what the parameter has and the tensor lacks.
    spec: of the parameter.
  """

  names: tuple[str, ...]
  stacked: bool
  offset: float
  spec: ParamSpec

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the parameter, of one expert where there are several."""
    return self.spec.shape[1:] if self.stacked else self.spec.shape

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """Of each tensor."""
    shape, inputs = self.shape, self.spec.inputs
    stored: tuple[int, ...]
    if inputs:
      stored = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    elif self.spec.logical_axes[0] == "kv_heads":  # a bias
      stored = (math.prod(shape),)
    else:
      stored = shape
    in_one = self.stacked and len(self.names) == 1
    return (self.spec.shape[0], *stored) if in_one else stored


def assemble(
    stored: Mapping[str, StoredTensor],
    config: TransformerConfig,
    names: Names,
    source: str,
    mesh: jax.sharding.Mesh | None,
) -> Params:
  """Reads parameters from the tensors of a file.

  Args:
    stored: name to tensor; nothing is read before all of them are checked.
    config: sizes that the tensors must have.
    names: of the tensors in this format.
    source: names the file in errors.
    mesh: whose devices hold the parameters, as `sharding` says; None for the
      default device.

  Returns:
    Float32 parameters.

  Raises:
    ValueError: listing every missing, unexpected and misshaped tensor, or
      every one that holds NaN or infinity; or a parameter cannot be split over
      the mesh.
  """
  entries = _entries(config, names)
  wanted = {
      name: entry for entry in jax.tree.leaves(entries) for name in entry.names
  }
  problems = [f"missing {name}" for name in wanted if name not in stored]
  problems += [f"unexpected {name}" for name in stored if name not in wanted]
  problems += [
      f"{name} has shape {tuple(stored[name].shape)}, not {entry.stored_shape}"
      for name, entry in wanted.items()
      if name in stored and tuple(stored[name].shape) != entry.stored_shape
  ]
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  if mesh is None:
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: alone, entries)
  else:
    places = sharding.params_shardings(param_specs(config), mesh)
  broken: dict[str, None] = {}  # names, in order
  load = functools.partial(_load, _watched(stored, broken))
  params = jax.tree.map(load, entries, places)
  if broken:
    listed = "; ".join(f"{name} holds NaN or infinity" for name in broken)
    raise ValueError(f"{source}: {listed}")
  return params


def _watched(
    stored: Mapping[str, StoredTensor], broken: dict[str, None]
) -> dict[str, StoredTensor]:
  """The same tensors; names of those that are not finite are noted."""

  def watch(name: str, tensor: StoredTensor) -> StoredTensor:
    def read(*index: slice) -> np.ndarray:
      value = tensor.read(*index)
      if not np.isfinite(value).all():
        broken[name] = None
      return value

    return dataclasses.replace(tensor, read=read)

  return {name: watch(name, tensor) for name, tensor in stored.items()}


def disassemble(
    params: Params, config: TransformerConfig, names: Names
) -> Iterator[tuple[str, np.ndarray]]:
  """Names parameters as a file does, one by one; the inverse of `assemble`.

  Args:
    params: parameters.
    config: their sizes.
    names: of the tensors in the format.

  Returns:
    Names with contiguous float32 matrices or vectors, fetched to the host when
    they are asked for.

  Raises:
    ValueError: at once, listing every parameter whose shape is not the
      config's.
  """
  tree = _entries(config, names)
  declared: Any = jax.tree.structure(tree)
  if declared != jax.tree.structure(params):
    raise ValueError("params: not the parameters that the config declares")
  pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True))
  problems = [
      f"{entry.names[0]}: parameter has shape {np.shape(value)}, not"
      f" {entry.spec.shape}"
      for entry, value in pairs
      if np.shape(value) != entry.spec.shape
  ]
  if problems:
    raise ValueError(f"params: {'; '.join(problems)}")
  return (tensor for entry, value in pairs for tensor in _tensors(entry, value))


def _entries(config: TransformerConfig, names: Names) -> Params:
  """Gives `Params` whose leaves are `_Entry`."""
  specs = param_specs(config)

  def entry(field: str, spec: ParamSpec | None, *layer: int) -> Any:
    if spec is None:
      return None
    stacked = spec.logical_axes[0] == "expert"
    name = (names.experts if stacked else names.tensors)[field]
    each = spec.shape[0] if name.count("{}") == 2 else 1
    return _Entry(
        names=tuple(name.format(*layer, number) for number in range(each)),
        stacked=stacked,
        offset=names.norm_offset if spec.logical_axes == ("norm",) else 0.0,
        spec=spec,
    )

  layers = tuple(
      Layer(
          **{
              field.name: entry(field.name, getattr(layer, field.name), i)
              for field in dataclasses.fields(layer)
          }
      )
      for i, layer in enumerate(specs.layers)
  )
  return Params(
      embedding=entry("embedding", specs.embedding),
      layers=layers,
      final_norm=entry("final_norm", specs.final_norm),
      unembedding=entry("unembedding", specs.unembedding),
  )


def _load(
    stored: Mapping[str, StoredTensor],
    entry: _Entry,
    place: jax.sharding.Sharding,
) -> jax.Array:
  """Reads a parameter into its shards, what several devices hold once."""
  parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

  def part(index: Index | None) -> np.ndarray:
    ends = tuple(
        one.indices(size)[:2]
        for one, size in zip(index or (), entry.spec.shape, strict=True)
    )
    if ends not in parts:
      parts[ends] = _read(entry, stored, [slice(*one) for one in ends])
    return parts[ends]

  return jax.make_array_from_callback(entry.spec.shape, place, part)


def _read(
    entry: _Entry, stored: Mapping[str, StoredTensor], ranges: list[slice]
) -> np.ndarray:
  """Reads the part of a parameter that a device holds."""
  if not entry.stacked:
    return _read_one(entry, stored[entry.names[0]].read, ranges)
  experts = range(ranges[0].start, ranges[0].stop)
  if len(entry.names) > 1:
    readers = [stored[entry.names[number]].read for number in experts]
  else:
    readers = [
        _expert(stored[entry.names[0]].read, number) for number in experts
    ]
  return np.stack([_read_one(entry, read, ranges[1:]) for read in readers])


def _expert(
    read: Callable[..., np.ndarray], number: int
) -> Callable[..., np.ndarray]:
  """Reads one matrix of a stack."""
  return lambda rows, columns: read(slice(number, number + 1), rows, columns)[0]


def _read_one(
    entry: _Entry, read: Callable[..., np.ndarray], ranges: list[slice]
) -> np.ndarray:
  """Reads a part of a matrix or vector as a part of the parameter."""
  shape, inputs = entry.shape, entry.spec.inputs
  if inputs:
    rows = _flat(ranges[inputs:], shape[inputs:])
    columns = _flat(ranges[:inputs], shape[:inputs])
    value = read(rows, columns).T
  elif len(entry.stored_shape) == len(shape):
    value = read(*ranges)
  else:
    value = read(_flat(ranges, shape))
  # One copy: what a file maps into memory must not become a parameter.
  part = np.array(value, np.float32, order="C")
  part += np.float32(entry.offset)
  return part.reshape([one.stop - one.start for one in ranges])


def _flat(ranges: list[slice], shape: tuple[int, ...]) -> slice:
  """The flat range of axes of which only the first may be cut."""
  whole = [slice(0, size) for size in shape[1:]]
  if ranges[1:] != whole:
    raise ValueError(f"only the first axis of {shape} can be cut, got {ranges}")
  width = math.prod(shape[1:])
  return slice(ranges[0].start * width, ranges[0].stop * width)


def _tensors(
    entry: _Entry, value: jax.Array
) -> Iterator[tuple[str, np.ndarray]]:
  """Turns a parameter into the tensors that a file stores."""
  whole = np.asarray(value, np.float32) - np.float32(entry.offset)
  if not entry.stacked:
    yield entry.names[0], _to_stored(entry, whole)
  elif len(entry.names) == 1:
    yield entry.names[0], np.stack([_to_stored(entry, one) for one in whole])
  else:
    for name, one in zip(entry.names, whole, strict=True):
      yield name, _to_stored(entry, one)


def _to_stored(entry: _Entry, value: np.ndarray) -> np.ndarray:
  """Turns one matrix or vector into what a file stores."""
  if not entry.spec.inputs:
    return np.ascontiguousarray(value.reshape(entry.stored_shape))
  outputs, inputs = entry.stored_shape[-2:]
  return np.ascontiguousarray(value.reshape(inputs, outputs).T)
