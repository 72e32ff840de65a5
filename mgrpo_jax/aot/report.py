"""What a compiled program says, as numbers, as a table and as advice."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax.aot import hlo
from mgrpo_jax.aot.chips import GIB, Topology
from mgrpo_jax.aot.flops import Work

_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Collectives = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
  """One program on one device of its mesh.

  Attributes:
    name: of the program.
    devices: that run it together.
    held: bytes of what is there while it runs, by kind.
    outputs: bytes of results that replace no argument.
    temporaries: bytes it needs while it runs.
    code: bytes of the program itself.
    flops: of matrix products, loops as often as they run.
    bytes_moved: between memory and chip, an estimate.
    counted_once: the compiler's `flops` and `bytes accessed`, which count
      the body of a loop once.
    collectives: kind -> `count`, `bytes` of the arrays, `seconds` on the links
      that the groups can use at most.
    seconds: lower bounds of the time of a run, by what limits it: `flops` at
      the chip's peak, `compiler` from its cycle estimates and kernels at the
      peak, `links`.
  """

  name: str
  devices: int
  held: Mapping[str, int]
  outputs: int
  temporaries: int
  code: int
  flops: float
  bytes_moved: float
  counted_once: Mapping[str, float]
  collectives: Collectives
  seconds: Mapping[str, float]

  @property
  def bound(self) -> float:
    """Seconds that a run takes at least: all overlaps with the longest."""
    return max(self.seconds.values())

  @property
  def limit(self) -> str:
    """What the bound comes from."""
    return max(self.seconds, key=lambda name: self.seconds[name])

  @property
  def peak(self) -> int:
    """Bytes of a device while it runs, all that is held included."""
    held = sum(self.held.values())
    return held + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class TooLarge:
  """A program that does not fit.

  Attributes:
    name: of the program.
    used: bytes of a device that it needs.
    available: bytes that there are.
  """

  name: str
  used: float
  available: float


def read(
    name: str,
    compiled: Any,
    *,
    held: Mapping[str, int],
    work: Work,
    devices: int,
    topology: Topology,
) -> ProgramReport:
  """Reads a compiled program.

  Args:
    name: of the program.
    compiled: from `lower().compile()`.
    held: bytes a device of what is there while it runs, by kind.
    work: FLOPs on all devices.
    devices: of its mesh.
    topology: that it was compiled for.

  Returns:
    The report.
  """
  chip = topology.chip
  memory, once = compiled.memory_analysis(), compiled.cost_analysis()
  costs = hlo.parse(compiled.as_text())
  collectives = summarise(costs.collectives, topology)
  kernels = work.kernels / devices
  flops = work.products / devices + kernels
  return ProgramReport(
      name=name,
      devices=devices,
      held=dict(held),
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      code=memory.generated_code_size_in_bytes,
      flops=flops,
      bytes_moved=costs.bytes,
      counted_once={
          key: float(once.get(key, 0.0)) for key in ("flops", "bytes accessed")
      },
      collectives=collectives,
      seconds={
          "flops": flops / chip.flops,
          "compiler": costs.cycles / chip.clock + kernels / chip.flops,
          "links": sum(one["seconds"] for one in collectives.values()),
      },
  )


def summarise(
    collectives: Sequence[hlo.Collective], topology: Topology
) -> dict[str, dict[str, float]]:
  """Adds up collectives by kind.

  Args:
    collectives: of one run of a program.
    topology: whose links they use.

  Returns:
    Kind -> `count`, `bytes`, `seconds`.
  """
  kinds: dict[str, dict[str, float]] = {}
  for one in collectives:
    entry = kinds.setdefault(one.kind, {"count": 0, "bytes": 0, "seconds": 0.0})
    rate = topology.chip.link * topology.links(one.group)
    entry["count"] += one.times
    entry["bytes"] += one.times * one.size
    entry["seconds"] += one.times * one.sent / rate
  return kinds


def too_large(name: str, message: str) -> TooLarge | None:
  """Reads the compiler's complaint that a program needs too much memory.

  Args:
    name: of the program.
    message: of the error.

  Returns:
    What it needs; None if the message is about something else.
  """
  match = _USED.search(message)
  if not match:
    return None
  used, used_unit, available, available_unit = match.groups()
  return TooLarge(
      name=name,
      used=float(used) * _UNITS[used_unit],
      available=float(available) * _UNITS[available_unit],
  )


def resident(programs: Sequence[ProgramReport]) -> dict[str, int]:
  """Adds up what a policy's device holds when it trains and samples.

  Args:
    programs: of the policy.

  Returns:
    Bytes by kind; `working` is the most that a program needs beside what is
    held all the time, and `total` the sum.
  """
  held: dict[str, int] = {}
  for one in programs:
    held |= one.held
  working = max(
      (one.outputs + one.temporaries + one.code for one in programs), default=0
  )
  return held | {"working": working, "total": sum(held.values()) + working}


def mfu_bound(
    model_flops: float, programs: Sequence[ProgramReport], topology: Topology
) -> float:
  """Computes the utilisation that a train step cannot exceed.

      model FLOPs / (seconds · peak · devices)

  Args:
    model_flops: of the step, see `flops.training`.
    programs: that make the step, run one after another.
    topology: whose peak it is.

  Returns:
    In 0..1, for one micro-batch and one update.
  """
  seconds = sum(one.bound for one in programs)
  return model_flops / (
      seconds * topology.chip.flops * max(one.devices for one in programs)
  )


def table(rows: Sequence[Sequence[str]]) -> str:
  """Lays text out in columns.

  Args:
    rows: the heading first; equally long.

  Returns:
    Lines; the first column to the left, the others to the right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
      "  ".join(
          cell.rjust(width) if place else cell.ljust(width)
          for place, (cell, width) in enumerate(zip(row, widths, strict=True))
      ).rstrip()
      for row in rows
  )


def program_rows(programs: Sequence[ProgramReport]) -> list[list[str]]:
  """Describes programs, a row each, with a heading.

  Args:
    programs: of one policy.

  Returns:
    Cells for `table`.
  """
  heading = "program devices temporaries outputs TFLOP GB time limit links"
  rows = [heading.split()]
  for one in programs:
    rows.append(
        [
            one.name,
            str(one.devices),
            gib(one.temporaries),
            gib(one.outputs),
            f"{one.flops / 1e12:.3g}",
            f"{one.bytes_moved / 1e9:.3g}",
            milliseconds(one.bound),
            one.limit,
            milliseconds(one.seconds["links"]),
        ]
    )
  return rows


def collective_rows(programs: Sequence[ProgramReport]) -> list[list[str]]:
  """Describes what programs exchange, a row for each kind, with a heading.

  Args:
    programs: of one policy.

  Returns:
    Cells for `table`.
  """
  rows = ["program collective count GiB time".split()]
  for one in programs:
    for kind, entry in sorted(one.collectives.items()):
      seconds = milliseconds(entry["seconds"])
      rows.append(
          [
              one.name,
              kind,
              f"{entry['count']:.0f}",
              gib(entry["bytes"]),
              seconds,
          ]
      )
  return rows


def advice(
    one: TooLarge, *, mesh: Mapping[str, int], rows: int, remat: bool
) -> str:
  """Says by how much a program is too large, and what to change.

  Args:
    one: the program.
    mesh: of the learner.
    rows: of a micro-batch.
    remat: whether the backward pass recomputes all of a layer.

  Returns:
    One line.
  """
  over = one.used - one.available
  line = (
      f"{one.name} needs {gib(one.used)} GiB a device, {gib(over)} GiB more"
      f" than the {gib(one.available)} GiB there are"
  )
  if one.name in ("prefill", "decode"):
    return f"{line}: raise sampler_tensor, or lower engine.num_slots"
  shards = mesh["data"] * mesh["fsdp"]
  ways = []
  if not remat:
    ways.append("set execution.remat to 'layer'")
  if mesh["data"] > 1:
    ways.append("use mesh.fsdp in place of mesh.data")
  ways.append("raise mesh.fsdp or mesh.tensor")
  if rows > shards:
    ways.append(f"lower batch.rows ({rows}) to {shards}")
  return f"{line}: {', or '.join([*ways, 'lower execution.logit_columns'])}"


def gib(size: float) -> str:
  """Writes bytes as GiB.

  Args:
    size: bytes.

  Returns:
    Three digits or so.
  """
  return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def milliseconds(seconds: float) -> str:
  """Writes a duration.

  Args:
    seconds: the duration.

  Returns:
    Milliseconds, with their unit.
  """
  return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
