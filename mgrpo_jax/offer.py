"""Weights that are to be published, on one host or on many."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from mgrpo_jax import leaves
from mgrpo_jax import manifest as manifests
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

  def write(self, store: Store, folder: str) -> None:
    """Writes what was described, all of it or not at all well.

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
    self._arrays = arrays
    return manifests.contents(arrays, rounded)

  def write(self, store: Store, folder: str) -> None:
    """Writes the arrays."""
    store.write_arrays(folder, self._arrays)

  def close(self) -> None:
    """Leaves the arrays to whoever else has them."""
