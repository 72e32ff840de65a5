"""Arrays that lie on the devices of several processes.

Every process runs these functions at the same place, like any other program
over such devices. For what this process has alone they do what `jax.device_put`
does.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def is_spread(mesh: Mesh | None) -> bool:
  """Says whether a mesh has devices of other processes.

  Args:
    mesh: None for the default device.

  Returns:
    Whether it has.
  """
  if mesh is None:
    return False
  return any(d.process_index != jax.process_index() for d in mesh.devices.flat)


def put(tree: Any, shardings: Any) -> Any:
  """Places arrays.

  Args:
    tree: pytree of arrays: all of each on this host, the same on every host, or
      spread over the processes already.
    shardings: the same tree of `jax.sharding.Sharding`.

  Returns:
    The same values there; every host fills the parts that its devices hold.
  """
  leaves = jax.tree.leaves(shardings)
  if all(where.is_fully_addressable for where in leaves):
    return jax.device_put(tree, shardings)
  return jax.tree.map(_put, tree, shardings)


def gather(tree: Any) -> Any:
  """Brings all of each array to every host, one array after the other.

  Args:
    tree: pytree of `jax.Array`s.

  Returns:
    The same values, on this host's CPU.
  """
  return jax.tree.map(_gather, tree)


def everywhere(tree: Any) -> Any:
  """Gives every process all of each array, on its devices.

  Args:
    tree: pytree of arrays; those that this host has all of stay as they are.

  Returns:
    The same values, to be fetched by any process.
  """
  return jax.tree.map(_everywhere, tree)


def host() -> jax.Device:
  """This host's CPU as a device."""
  return jax.local_devices(backend="cpu")[0]


def _put(leaf: Any, where: Any) -> jax.Array:
  """Places one array."""
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return jax.device_put(leaf, where)
  whole = np.asarray(leaf)
  return jax.make_array_from_callback(
      whole.shape, where, lambda index: whole[index]
  )


def _everywhere(leaf: Any) -> Any:
  """Copies one array to all devices of its mesh."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    return leaf
  if leaf.is_fully_replicated:
    return leaf
  where = leaf.sharding
  assert isinstance(where, NamedSharding)  # as `sharding` makes them
  return jax.device_put(leaf, NamedSharding(where.mesh, PartitionSpec()))


def _gather(leaf: jax.Array) -> jax.Array:
  """Brings one array here."""
  return jax.device_put(np.asarray(_everywhere(leaf)), host())
