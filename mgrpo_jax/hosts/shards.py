"""Which process writes which chunks of arrays that are spread over several.

Every process finds the same from what all know, the arrays' shapes and
shardings: a shard is a chunk (or, where it is large, a few; or, of arrays that
are laid upon one another, one with the same shard of the next few), and of
those that hold the same one writes it, so that each process gets about as many
bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mgrpo_jax import chunks, leaves, stacks
from mgrpo_jax import manifest as manifests
from mgrpo_jax.chunks import Grid, Parts

# A chunk's number, where in a shard it is, and the shard.
_Piece = tuple[int, tuple[slice, ...], jax.Shard]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """How an array, or a stack of some, is cut, and who writes what.

  Attributes:
    grid: of the array as it is written.
    owners: process of each chunk, in C order.
    stack: names of the arrays that are laid upon one another, if any are.
  """

  grid: Grid
  owners: tuple[int, ...]
  stack: Sequence[str] = ()

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
  named = leaves.named(tree)
  grids = {name: _grid(leaf, short=short) for name, leaf in named.items()}
  kinds = {name: (leaf.sharding, leaf.dtype) for name, leaf in named.items()}
  laid = stacks.plan(grids, kinds)
  for name, members in stacks.members(named, laid).items():
    leaf, own = named[members[0]], grids[members[0]]
    grid = stacks.grid(own, len(members)) if name in laid else own
    owners = [0] * len(grid)
    regions = _regions(own.shape, leaf.sharding)
    for first in range(0, len(grid), len(own) or 1):  # of the next arrays
      for region, holders in regions:
        owner = min(holders, key=lambda one: (load.get(one, 0), one))
        for number in own.within(region):
          owners[first + number] = owner
          load[owner] = load.get(owner, 0) + chunks.nbytes(grid)
    found[name] = Share(
        grid=grid, owners=tuple(owners), stack=laid.get(name, ())
    )
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
  named = leaves.named(tree)
  begun: dict[str, list[_Piece]] = {}
  for name, one in shared.items():
    begun[name] = []
    own = stacks.of_member(one.grid) if one.stack else one.grid
    for at, member in enumerate(one.stack or [name]):
      first = stacks.first(one.grid, at) if one.stack else 0
      owners = one.owners[first : first + len(own)]
      mine = {n for n, owner in enumerate(owners) if owner == process}
      begun[name] += _begin(named[member], own, mine, first)
  return {
      name: Parts(grid=one.grid, pieces=_pieces(one, begun[name]))
      for name, one in shared.items()
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


def _grid(leaf: Any, *, short: bool) -> Grid:
  """How an array is cut that is in no stack."""
  dtype = np.dtype(leaf.dtype)
  dtype = manifests.narrowed(dtype) if short else dtype
  shape = tuple(leaf.shape)
  shard = leaf.sharding.shard_shape(shape)
  return Grid(
      shape=shape, dtype=dtype, chunk=chunks.finer(shard, dtype.itemsize)
  )


def _begin(leaf: Any, cut: Grid, mine: set[int], first: int) -> list[_Piece]:
  """Starts bringing chunks of an array here; the stack's number is `first`."""
  begun, left = [], set(mine)
  for shard in leaf.addressable_shards:
    numbers = [n for n in cut.within(shard.index) if n in left]
    if not numbers:
      continue
    left.difference_update(numbers)
    shard.data.copy_to_host_async()  # all of them at the same time
    starts = [
        one.indices(size)[0]
        for one, size in zip(shard.index, cut.shape, strict=True)
    ]
    for number in numbers:
      part = tuple(
          slice(one.start - start, one.stop - start)
          for one, start in zip(cut.where(number), starts, strict=True)
      )
      begun.append((first + number, part, shard))
  return begun


def _pieces(
    share: Share, begun: Sequence[_Piece]
) -> dict[int, np.ndarray | chunks.Pile]:
  """Cuts shards into chunks, and lays those of a stack upon one another."""
  found: dict[int, list[np.ndarray]] = {}
  for number, part, shard in begun:
    piece = np.asarray(shard.data)[part].astype(share.grid.dtype, copy=False)
    found.setdefault(number, []).append(piece)
  return {
      number: chunks.Pile(pieces) if share.stack else pieces[0]
      for number, pieces in sorted(found.items())
  }
