"""Which process writes which chunks of arrays that are spread over several.

Every process finds the same from what all know, the arrays' shapes and
shardings: a shard is a chunk (or, where it is large, a few), and of those that
hold the same one writes it, so that each process gets about as many bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mgrpo_jax import chunks, leaves
from mgrpo_jax import manifest as manifests
from mgrpo_jax.chunks import Grid, Parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """How an array is cut, and who writes what.

  Attributes:
    grid: of the array as it is written.
    owners: process of each chunk, in C order.
  """

  grid: Grid
  owners: tuple[int, ...]

  def of(self, process: int) -> list[int]:
    """Numbers of the chunks that a process writes, ascending."""
    return [n for n, owner in enumerate(self.owners) if owner == process]


def shares(tree: Any, *, short: bool) -> dict[str, Share]:
  """Shares the writing of arrays out.

  Args:
    tree: pytree of `jax.Array`s, on devices of any processes.
    short: whether float32 is written as bfloat16.

  Returns:
    By name, in the tree's order; the same in every process.
  """
  found = {}
  load: dict[int, int] = {}  # bytes by process, so far
  for name, leaf in leaves.named(tree).items():
    dtype = np.dtype(leaf.dtype)
    dtype = manifests.narrowed(dtype) if short else dtype
    shape = tuple(leaf.shape)
    shard = leaf.sharding.shard_shape(shape)
    grid = Grid(
        shape=shape, dtype=dtype, chunk=chunks.finer(shard, dtype.itemsize)
    )
    owners = [0] * len(grid)
    for region, holders in _regions(shape, leaf.sharding):
      owner = min(holders, key=lambda one: (load.get(one, 0), one))
      size = int(np.prod(shard)) * dtype.itemsize
      load[owner] = load.get(owner, 0) + size
      for number in grid.within(region):
        owners[number] = owner
    found[name] = Share(grid=grid, owners=tuple(owners))
  return found


def held(
    tree: Any, shared: Mapping[str, Share], process: int
) -> dict[str, Parts]:
  """Brings the chunks that a process writes to its host.

  Args:
    tree: what `shares` was given.
    shared: what it returned.
    process: this one.

  Returns:
    Its chunks of each array by name, as they are written.
  """
  mine: dict[str, list[tuple[list[int], jax.Shard]]] = {}
  for name, leaf in leaves.named(tree).items():
    one, seen = shared[name], set[int]()
    mine[name] = []
    for shard in leaf.addressable_shards:
      numbers = one.grid.within(shard.index)
      own = [n for n in numbers if one.owners[n] == process]
      if own and seen.isdisjoint(own):
        seen.update(own)
        shard.data.copy_to_host_async()  # all of them at the same time
        mine[name].append((own, shard))
  return {
      name: Parts(
          grid=shared[name].grid, pieces=_pieces(shared[name].grid, shards)
      )
      for name, shards in mine.items()
  }


def nbytes(shared: Mapping[str, Share], process: int) -> int:
  """Bytes that a process writes."""
  return sum(
      int(np.prod([one.stop - one.start for one in share.grid.where(number)]))
      * share.grid.dtype.itemsize
      for share in shared.values()
      for number in share.of(process)
  )


def process_of(device: jax.Device) -> int:
  """Which process a device is of."""
  return device.process_index


@functools.lru_cache(maxsize=4096)
def _regions(
    shape: tuple[int, ...], where: Any
) -> list[tuple[tuple[slice, ...], list[int]]]:
  """The different shards of an array, and the processes that have each."""
  found: dict[Any, tuple[tuple[slice, ...], set[int]]] = {}
  for device, region in where.devices_indices_map(shape).items():
    key = tuple(
        one.indices(size) for one, size in zip(region, shape, strict=True)
    )
    found.setdefault(key, (region, set()))[1].add(process_of(device))
  return [
      (region, sorted(holders))
      for _, (region, holders) in sorted(found.items())
  ]


def _pieces(
    grid: Grid, shards: Sequence[tuple[list[int], jax.Shard]]
) -> dict[int, np.ndarray]:
  """Cuts shards into chunks."""
  found = {}
  for numbers, shard in shards:
    whole = np.asarray(shard.data)
    starts = [
        one.indices(size)[0]
        for one, size in zip(shard.index, grid.shape, strict=True)
    ]
    for number in numbers:
      part = tuple(
          slice(one.start - start, one.stop - start)
          for one, start in zip(grid.where(number), starts, strict=True)
      )
      found[number] = whole[part].astype(grid.dtype, copy=False)
  return dict(sorted(found.items()))
