"""What a publisher remembers of the versions that it wrote."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

from mgrpo_jax import atomic, chunks, deltas, leaves, zarr
from mgrpo_jax import manifest as manifests
from mgrpo_jax.chunks import Grid, Parts
from mgrpo_jax.manifest import Contents
from mgrpo_jax.store import Store
from mgrpo_jax.types import PolicyVersion

_READINGS = 2  # of a manifest, before what was damaged counts as stored so


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
  """A whole version, of which this process has what it wrote in memory.

  Attributes:
    version: which it is.
    parts: what this process wrote, by name, as it was written.
  """

  version: PolicyVersion
  parts: Mapping[str, Parts]


class Bases:
  """Decides which versions of policies are whole.

  Of `whole_every` versions that are written one after the other the first is,
  and the others are differences to it. So none needs more than one other.

  Attributes:
    whole_every: 1 where all are whole; then nothing is kept of them.
  """

  def __init__(self, whole_every: int) -> None:
    """Remembers nothing, so that the first versions are whole.

    Args:
      whole_every: at least 1.

    Raises:
      ValueError: it is less.
    """
    if whole_every < 1:
      raise ValueError(f"whole_every: {whole_every} must be at least 1")
    self.whole_every = whole_every
    self._bases: dict[str, Base] = {}
    self._since: dict[str, int] = {}  # versions since the base, by policy
    self._needed: dict[tuple[str, int], int | None] = {}

  @property
  def keeps(self) -> bool:
    """Whether whole versions are kept in memory."""
    return self.whole_every > 1

  def choose(
      self, store: Store, policy: str, number: int, held: Contents
  ) -> Base | None:
    """Returns what a version is to be the difference to; None for nothing.

    Args:
      store: where the base has to lie, as it was written.
      policy: whose version.
      number: of the version.
      held: what it holds; cut like the base, in chunks that can be packed.

    Raises:
      StorageError: the store cannot be read.
    """
    base = self._bases.get(policy)
    if base is None or self._since[policy] + 1 >= self.whole_every:
      return None
    cuts = manifests.grids(held.arrays)
    if base.version.number >= number or not _alike(cuts, base):
      return None
    found = store.get(f"{base.version.path}/manifest.json")
    same = found and _digest(found) == base.version.digest
    return base if same else None

  def forget(self, policy: str) -> None:
    """Frees what is kept of a policy's base; the next version is whole."""
    self._bases.pop(policy, None)

  def wrote(
      self,
      version: PolicyVersion,
      base: Base | None,
      parts: Mapping[str, Parts],
  ) -> None:
    """Remembers a version that is in the store.

    Args:
      version: which.
      base: what it is the difference to, None where it is whole.
      parts: what this process wrote of it; kept while others may be
        differences to it.
    """
    policy = version.policy
    number = None if base is None else base.version.number
    self._needed[policy, version.number] = number
    if base is not None:
      self._since[policy] += 1
    elif self.keeps:
      self._bases[policy] = Base(version=version, parts=parts)
      self._since[policy] = 0

  def needed(self, store: Store, policy: str, number: int) -> int | None:
    """Returns which other version a version needs, None for none.

    Args:
      store: is asked about versions that were not written here.
      policy: whose.
      number: of the version.

    Raises:
      StorageError: the store cannot be read.
    """
    place = policy, number
    for _ in range(_READINGS if place not in self._needed else 0):
      found = store.get(f"{manifests.path(policy, number)}/manifest.json")
      if found is None:
        break
      with contextlib.suppress(atomic.CorruptError):
        base = manifests.base(manifests.unsealed(found))
        self._needed[place] = None if base is None else base[0]
        break
    return self._needed.get(place)  # of what nobody can read, None


def _alike(cuts: Mapping[str, Grid], base: Base) -> bool:
  """Whether a version can be the difference to a base."""
  return cuts == {name: held.grid for name, held in base.parts.items()} and all(
      chunks.nbytes(grid) <= zarr.MOST_PACKED
      and grid.dtype.itemsize in deltas.SIZES
      for grid in cuts.values()
  )


def _digest(found: bytes) -> str | None:
  """The digest of a manifest; None where it is none."""
  try:
    return leaves.digest(manifests.unsealed(found))
  except atomic.CorruptError:
    return None
