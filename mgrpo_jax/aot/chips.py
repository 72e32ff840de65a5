"""TPU chips, and the names that slices of them go by.

Imports no jax: a compiler for a machine that is elsewhere is set up by
environment variables that must stand before jax is imported (`environment`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One generation of TPU chips.

  Attributes:
    name: as users say it, `v5p`.
    flops: peak, bfloat16, FLOP/s.
    hbm: bytes of memory.
    hbm_bandwidth: bytes/s.
    link: bytes/s that one link to a neighbour carries, one way.
    axes: dimensions of the torus; a chip has two links in each.
    clock: cycles/s of the matrix units.
    named_cores: what the number in a slice's name counts a chip as.
    type_name: how accelerator types begin, before the number.
    config_name: how jax sees a chip, `megacore` where two cores are one
      device.
  """

  name: str
  flops: float
  hbm: int
  hbm_bandwidth: float
  link: float
  axes: int
  clock: float
  named_cores: int
  type_name: str
  config_name: str


# flops, hbm, hbm_bandwidth: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. link:
# jax-ml.github.io/scaling-book/tpus, one way, what collectives reach. clock:
# flops / (2 · multipliers): 8 matrix units of 128² in v4 and v5p, 4 in v5e, 4
# of 256² in v6e.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops=275e12,
            hbm=32 * GIB,
            hbm_bandwidth=1.228e12,
            link=45e9,
            axes=3,
            clock=1.05e9,
            named_cores=2,
            type_name="v4",
            config_name="megacore",
        ),
        Chip(
            name="v5e",
            flops=197e12,
            hbm=16 * GIB,
            hbm_bandwidth=0.819e12,
            link=45e9,
            axes=2,
            clock=1.5e9,
            named_cores=1,
            type_name="v5litepod",
            config_name="default",
        ),
        Chip(
            name="v5p",
            flops=459e12,
            hbm=95 * GIB,
            hbm_bandwidth=2.765e12,
            link=90e9,
            axes=3,
            clock=1.75e9,
            named_cores=2,
            type_name="v5p",
            config_name="megacore",
        ),
        Chip(
            name="v6e",
            flops=918e12,
            hbm=32 * GIB,
            hbm_bandwidth=1.64e12,
            link=90e9,
            axes=2,
            clock=1.75e9,
            named_cores=1,
            type_name="v6e",
            config_name="default",
        ),
    )
}
_NAME = re.compile(r"(?:(\d+)x)?([a-z0-9]+)-(\d+)")
_MOST = {2: 256, 3: 4096}  # chips of a slice whose torus has so many axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """Equal slices of one kind of chip.

  Attributes:
    chip: the kind.
    chips: in one slice.
    sides: of a slice, chips along each axis.
    slices: how many.
  """

  chip: Chip
  chips: int
  sides: tuple[int, ...]
  slices: int

  @property
  def name(self) -> str:
    """How users call it, `2xv5p-128`."""
    one = f"{self.chip.name}-{self.chips * self.chip.named_cores}"
    return one if self.slices == 1 else f"{self.slices}x{one}"

  def environment(self) -> dict[str, str]:
    """Variables that must be set before jax is imported."""
    number = self.chips * self.chip.named_cores
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{self.chip.type_name}-{number}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # No chip is opened, so several compilers may run at a time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }

  def description(self) -> dict[str, Any]:
    """Arguments of `jax.experimental.topologies.get_topology_desc`."""
    sides = "x".join(str(side) for side in self.sides)
    host = tuple(min(2, side) for side in self.sides[:2])
    return {
        "platform": "tpu",
        "topology_name": f"{self.chip.name}:{sides}",
        "chips_per_host_bounds": (*host, 1),
        "chip_config_name": self.chip.config_name,
        "num_slices": self.slices,
        "wrap": (False,) * 3,
    }

  def links(self, group: int) -> int:
    """Counts the links that a chip can use to reach a group of chips.

    Args:
      group: chips of one slice that exchange something, itself included.

    Returns:
      Two for every axis that a group of this size can spread over; the most
      there can be, as befits a bound.
    """
    factors, rest = 0, group
    for prime in (p for p in range(2, group + 1) if group % p == 0):
      while rest % prime == 0:
        factors, rest = factors + 1, rest // prime
    axes = sum(side > 1 for side in self.sides)
    return 2 * max(1, min(axes, factors))


def parse(name: str) -> Topology:
  """Reads a name such as `v5p-128`, `v5e-16` or `2xv5p-128`.

  The number counts what Google's names count: cores of v4 and v5p, of which a
  chip has two, and chips of v5e and v6e.

  Args:
    name: chip, number, and how many slices of it.

  Returns:
    The topology.

  Raises:
    ValueError: no such chip, or no slice of this size; says what there is.
  """
  match = _NAME.fullmatch(name)
  if not match or match[2] not in CHIPS or not int(match[1] or 1):
    raise ValueError(
        f"topology {name!r}, must be CHIP-NUMBER or SLICESxCHIP-NUMBER of chip"
        f" {', '.join(CHIPS)}, such as v5e-16 or 2xv5p-128"
    )
  chip = CHIPS[match[2]]
  slices, number = int(match[1] or 1), int(match[3])
  allowed = [
      4 * 2**power * chip.named_cores
      for power in range(int(math.log2(_MOST[chip.axes] // 4)) + 1)
  ]
  if number not in allowed:
    numbers = ", ".join(map(str, allowed))
    raise ValueError(f"topology {name!r}: {chip.name} has slices of {numbers}")
  chips = number // chip.named_cores
  return Topology(
      chip=chip, chips=chips, sides=_sides(chips, chip.axes), slices=slices
  )


def _sides(chips: int, axes: int) -> tuple[int, ...]:
  """The shape of a slice: 2 × 2 grown by doubling the shortest side."""
  sides = [2, 2, 1][:axes]
  while math.prod(sides) < chips:
    shortest = max(axis for axis in range(axes) if sides[axis] == min(sides))
    sides[shortest] *= 2
  return tuple(sorted(sides) if min(sides) > 1 else sides)
