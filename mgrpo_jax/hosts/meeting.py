"""Opens the connections between processes that programs will take.

gloo, which CPUs compute together by, connects the devices of a collective when
they first meet in one, and gives up after 30 seconds where one process is late:
as it may be that still reads its data or compiles. So all meet here first, when
each of them has a program ready.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def meet(mesh: Mesh, wait: Callable[[str], None]) -> None:
  """Sums over every choice of a mesh's axes, once; every process does.

  Args:
    mesh: over devices of several processes.
    wait: waits until all processes have called it with a name.
  """
  axes = [name for name in mesh.axis_names if mesh.shape[name] > 1]
  for count in range(1, len(axes) + 1):
    for chosen in itertools.combinations(axes, count):
      ones = np.ones([mesh.shape[name] for name in chosen], np.float32)
      with jax.set_mesh(mesh):
        placed = jax.make_array_from_callback(
            ones.shape,
            NamedSharding(mesh, PartitionSpec(*chosen)),
            ones.__getitem__,
        )
        total = jax.jit(jnp.sum).lower(placed).compile()
      wait("-".join(chosen))
      total(placed).block_until_ready()
