"""Compiled programs as text: collectives, cycles and bytes, loops unrolled.

XLA's cost analysis counts the body of a loop once; a transformer that scans
its layers would seem L times cheaper than it is. Here the text of the program
is walked from its entry, and what stands in a loop counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONSTANT = re.compile(r"s32\[\][^ ]* constant\((\d+)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)"
)
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One exchange between devices.

  Attributes:
    kind: one of `KINDS`.
    size: bytes of the whole array on a device: what a gather gives, what a
      reduction takes.
    group: devices that take part.
    times: how often it runs.
  """

  kind: str
  size: int
  group: int
  times: int

  @property
  def sent(self) -> float:
    """Bytes a device has to send, each time, by the best algorithm."""
    share = (self.group - 1) / max(self.group, 1)
    if self.kind == "collective-permute":
      return float(self.size)
    return self.size * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """What one run of a program costs a device.

  Attributes:
    cycles: the compiler's estimate, of everything but waiting for others.
    bytes: moved between memory and chip; an estimate, because what an
      instruction reads of a large array is guessed from what it writes.
    collectives: everything that is exchanged.
    unknown_loops: loops whose length is not in the text, counted once.
  """

  cycles: float
  bytes: float
  collectives: tuple[Collective, ...]
  unknown_loops: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Instruction:
  """One line of a computation."""

  name: str
  shape: str
  kind: str
  line: str


def parse(text: str) -> Costs:
  """Reads a compiled program.

  Args:
    text: of `compiled.as_text()`.

  Returns:
    Its costs.

  Raises:
    ValueError: there is no entry in the text.
  """
  program, entry = _computations(text)
  if entry is None:
    raise ValueError("text of a compiled program must have an ENTRY")
  walk = _Walk(program)
  walk.visit(entry, 1)
  return Costs(
      cycles=walk.cycles,
      bytes=walk.bytes,
      collectives=tuple(walk.collectives.values()),
      unknown_loops=walk.unknown_loops,
  )


def num_bytes(shape: str, *, memory_only: bool = False) -> int:
  """Counts the bytes of an array, or of a tuple of them.

  Args:
    shape: as programs write it, `(bf16[8,128]{1,0:T(8,128)}, u32[])`.
    memory_only: leave out what lives on the chip, in space 1 or above.

  Returns:
    Bytes without padding.
  """
  total = 0
  for kind, sizes, layout in _ARRAY.findall(shape):
    if memory_only and re.search(r"S\([1-9]", layout):
      continue
    bits = int(re.sub(r"\D", "", kind) or 8)  # pred has no number
    total += bits * math.prod(int(n) for n in sizes.split(",") if n) // 8
  return total


def group_size(line: str) -> int:
  """Reads how many devices exchange something.

  Args:
    line: an instruction with `replica_groups`, in any of its three forms.

  Returns:
    The size of a group; 1 where the line names none.
  """
  if match := _LISTED.search(line):
    return match[1].count(",") + 1
  if match := _COUNTED.search(line):
    return int(match[1])
  if match := _NAMED.search(line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"\w+", match[2]))
  return 1


class _Walk:
  """Adds up costs over the instructions that a program runs."""

  def __init__(self, program: Mapping[str, list[_Instruction]]) -> None:
    """Starts at nothing."""
    self.cycles = 0.0
    self.bytes = 0.0
    self.collectives: dict[str, Collective] = {}
    self.unknown_loops = 0
    self._program = program

  def visit(self, name: str, times: int, *, fused: bool = False) -> None:
    """Adds a computation that runs a number of times."""
    shapes = {one.name: one.shape for one in self._program.get(name, ())}
    for one in self._program.get(name, ()):
      if kind := _collective(one, name):
        self._exchange(one, kind, times)
      if not fused:
        match = _CYCLES.search(one.line)
        self.cycles += times * int(match[1]) if match else 0
        self.bytes += times * _moved(one, shapes, self._program)
      self._enter(one, times, fused)

  def _enter(self, one: _Instruction, times: int, fused: bool) -> None:
    """Goes on to what an instruction runs."""
    if one.kind == "while":
      times *= self._trips(one.line)
    if one.kind == "conditional":
      names = [a or b for a, b in _BRANCHES.findall(one.line)]
      for name in re.findall(r"[\w.\-]+", ",".join(names)):
        self.visit(name, times, fused=fused)
      return
    for name in _CALLED.findall(one.line):
      inside = fused or one.kind not in ("while", "call", "async-start")
      self.visit(name, times, fused=inside)

  def _trips(self, line: str) -> int:
    """Reads how often a loop runs: its condition compares with a constant."""
    match = re.search(r"condition=%?([\w.\-]+)", line)
    body = self._program.get(match[1], []) if match else []
    limits = [
        int(found[1])
        for one in self._reached(body)
        if (found := _CONSTANT.search(one.line))
    ]
    if not limits:
      self.unknown_loops += 1
    return max(limits, default=1)

  def _reached(self, body: list[_Instruction]) -> Iterator[_Instruction]:
    """Instructions of a computation and of what it calls."""
    for one in body:
      yield one
      for name in _CALLED.findall(one.line):
        yield from self._reached(self._program.get(name, []))

  def _exchange(self, one: _Instruction, kind: str, times: int) -> None:
    """Adds a collective, once though its parts stand in many places."""
    channel = _CHANNEL.search(one.line)
    key = channel[1] if channel else one.name
    if key in self.collectives:
      return
    size, group = num_bytes(one.shape), group_size(one.line)
    if one.kind.endswith("-start") and kind == "all-gather":
      size = size * group // (group + 1)  # the tuple holds input and output
    elif one.kind.endswith("-start") and kind == "collective-permute":
      size //= 2
    elif one.kind.startswith("reduce-scatter"):
      size *= group
    self.collectives[key] = Collective(
        kind=kind, size=size, group=group, times=times
    )


def _computations(
    text: str,
) -> tuple[dict[str, list[_Instruction]], str | None]:
  """Splits a program into its computations; names the entry."""
  program: dict[str, list[_Instruction]] = {}
  entry, current = None, ""
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = head[2]
      program[current] = []
      entry = current if head[1] else entry
    elif current and (match := _INSTRUCTION.match(line)):
      name, shape, kind = match.groups()
      one = _Instruction(name=name, shape=shape, kind=kind, line=line)
      program[current].append(one)
  return program, entry


def _collective(one: _Instruction, computation: str) -> str | None:
  """Says which exchange an instruction begins, if any."""
  kind = one.kind.removesuffix("-start")
  if kind not in KINDS:
    return None
  # How TPUs write it: a reduction of which everyone keeps a piece.
  if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
    return "reduce-scatter"
  return kind


def _moved(
    one: _Instruction,
    shapes: Mapping[str, str],
    program: Mapping[str, list[_Instruction]],
) -> int:
  """Estimates the bytes that an instruction reads and writes."""
  if one.kind == "copy-start":  # fetched ahead, or written back
    return num_bytes(one.shape, memory_only=True)
  if one.kind in _FREE or one.kind.endswith(("-start", "-done")):
    return 0
  written = num_bytes(one.shape, memory_only=True)
  whole = num_bytes(one.shape)
  read = [
      num_bytes(shapes[name], memory_only=True)
      for name in _arguments(one)
      if name in shapes
  ]
  called = _CALLED.search(one.line)
  if one.kind == "fusion" and called and called[1] in program:
    return _fused(program[called[1]], written, read)
  if "dynamic-update-slice" in one.name:  # in place
    inner = sum(size for size in read if size < whole)
    return 2 * inner
  if "dynamic-slice" in one.name:
    read = [min(size, whole) for size in read]
  return written + sum(read)


def _fused(inside: list[_Instruction], written: int, read: list[int]) -> int:
  """Estimates the bytes of a fusion, of whose arguments it may need a part.

  A loop that adds to one piece of a large sum does not move the sum.
  """
  shapes = {one.name: one.shape for one in inside}
  parameters = {
      int(match[1]): one.name
      for one in inside
      if (match := _PARAMETER.search(one.line))
  }
  total = 0
  for number, size in enumerate(read):
    name = parameters.get(number)
    users = [one for one in inside if name in _arguments(one)]
    total += min(size, sum(_needed(one, name, size) for one in users))
  root = next((one for one in inside if "ROOT " in one.line), None)
  if root is not None and root.kind == "dynamic-update-slice":
    update = _arguments(root)[1]
    written = min(written, num_bytes(shapes.get(update, root.shape)))
  return total + written


def _needed(user: _Instruction, name: str | None, size: int) -> int:
  """Bytes of an argument of so many bytes that one of its users reads."""
  if user.kind == "dynamic-update-slice" and _arguments(user)[0] == name:
    return 0  # what it leaves alone
  if user.kind in ("dynamic-slice", "slice", "gather", "fusion"):
    return num_bytes(user.shape)
  return size


def _arguments(one: _Instruction) -> list[str]:
  """The names of what an instruction takes."""
  inside = one.line.partition(f" {one.kind}(")[2].partition("), ")[0]
  return _OPERANDS.findall(inside)
