"""Weights that are to be published, on one host or on many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from mgrpo_jax import chunks, deltas, leaves, stacks
from mgrpo_jax import manifest as manifests
from mgrpo_jax.bases import Base
from mgrpo_jax.chunks import Parts
from mgrpo_jax.manifest import Contents
from mgrpo_jax.store import Store


@runtime_checkable
class Offer(Protocol):
  """Weights that a publisher describes, then writes, or does not need to."""

  def describe(self, store: Store) -> Contents:
    """Says what is offered; may wait, for as long as the store may.

    Raises:
      StorageError: it cannot be said.
    """

  def write(
      self, store: Store, folder: str, base: Base | None, *, keeps: bool
  ) -> Mapping[str, Parts]:
    """Writes what was described, all of it or not at all well.

    Args:
      store: the bucket.
      folder: of the version.
      base: what to write the difference to; None to write the version whole.
      keeps: whether differences to it may be written later.

    Returns:
      What this process wrote, by name; of differences, what they make.

    Raises:
      StorageError: it cannot be written.
    """

  def close(self) -> None:
    """Nothing is asked of it any more."""


class Whole:
  """Weights that this process has all of."""

  def __init__(self, params: Any, *, short: bool) -> None:
    """Offers a pytree of arrays.

    Args:
      params: they must not change.
      short: whether float32 is rounded to bfloat16.
    """
    self._params = params
    self._short = short

  def describe(self, store: Store) -> Contents:
    """Brings the arrays to this host and takes their digests."""
    del store  # nobody else is waited for
    arrays, rounded = leaves.to_host(self._params), dict[str, str]()
    if self._short:
      arrays, rounded = manifests.round_off(arrays)
    grids = {name: chunks.grid(array) for name, array in arrays.items()}
    laid = stacks.plan(grids, {name: rounded.get(name) for name in grids})
    self._parts = stacks.gather(arrays, laid)
    return manifests.contents(self._parts, rounded, laid)

  def write(
      self, store: Store, folder: str, base: Base | None, *, keeps: bool
  ) -> Mapping[str, Parts]:
    """Writes the arrays, or their differences to a base."""
    del keeps  # no other process has to know
    parts = self._parts
    if base is not None:
      parts = deltas.between(parts, base.parts)
    store.write_arrays(folder, parts)
    return self._parts

  def close(self) -> None:
    """Leaves the arrays to whoever else has them."""
