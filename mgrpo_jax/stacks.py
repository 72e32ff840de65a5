"""Arrays of equal form, as the layers of a transformer have them, in one.

    layers/0/key [D, H], layers/1/key [D, H], …   ->   layers/all/key [L, D, H]

A version of a small model is thousands of small files otherwise, and files cost
more than their bytes: a server's price and answer each, a disk's inode. Arrays
of which no two fit a chunk stay as they are.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax import chunks
from mgrpo_jax.chunks import Grid, Parts, Pile

Stacks = Mapping[str, Sequence[str]]  # members of each, in order, by its name

_ANY = "all"  # in the name of a stack, where its members have numbers


def plan(grids: Mapping[str, Grid], kinds: Mapping[str, Any]) -> Stacks:
  """Finds which arrays to lay upon one another.

  Args:
    grids: how arrays are cut, by name.
    kinds: whatever else must be equal of a stack's members, by name.

  Returns:
    Stacks of two and more arrays whose names differ in numbers only.
  """
  groups: dict[str, list[str]] = {}
  for name in grids:
    parts = (_ANY if one.isdecimal() else one for one in name.split("/"))
    groups.setdefault("/".join(parts), []).append(name)

  def fit(stack: str, members: Sequence[str]) -> bool:
    first = members[0]
    return (
        len(members) > 1
        and 2 * chunks.nbytes(grids[first]) <= chunks.MAX_BYTES
        and all(grids[one] == grids[first] for one in members)
        and all(kinds[one] == kinds[first] for one in members)
        and not any(name.startswith(f"{stack}/") for name in grids)
    )

  return {name: group for name, group in groups.items() if fit(name, group)}


def members(names: Iterable[str], stacks: Stacks) -> dict[str, Sequence[str]]:
  """What is written: stacks, and arrays that are in none, in order.

  Args:
    names: of all arrays.
    stacks: of some of them.

  Returns:
    The names of each one's arrays; its own where it is no stack.
  """
  stack_of = {one: stack for stack, held in stacks.items() for one in held}
  return {
      stack_of.get(name, name): stacks.get(stack_of.get(name, ""), [name])
      for name in names
  }


def grid(member: Grid, count: int) -> Grid:
  """How a stack of so many arrays is cut: a chunk is of one chunk of some."""
  rows = chunks.rows(count, chunks.nbytes(member))
  return Grid(
      shape=(count, *member.shape),
      dtype=member.dtype,
      chunk=(rows, *member.chunk),
  )


def gather(
    arrays: Mapping[str, np.ndarray], stacks: Stacks
) -> dict[str, Parts]:
  """Lays arrays upon one another, without copying them.

  Args:
    arrays: by name.
    stacks: of some of them.

  Returns:
    All chunks of stacks and of the other arrays, by name.
  """
  found = {}
  for name, held in members(arrays, stacks).items():
    cut = chunks.grid(arrays[held[0]])
    if name not in stacks:
      found[name] = chunks.parts(arrays[name], cut)
      continue
    cut = grid(cut, len(held))
    pieces = {}
    for number in range(len(cut)):
      some, *box = cut.where(number)
      pieces[number] = Pile([arrays[one][*box] for one in held[some]])
    found[name] = Parts(grid=cut, pieces=pieces)
  return found


def scatter(
    found: Mapping[str, np.ndarray | Parts], stacks: Stacks
) -> dict[str, np.ndarray | Parts]:
  """Takes arrays from stacks, without copying them.

  Args:
    found: stacks and other arrays, or some chunks of them, by name.
    stacks: which they are.

  Returns:
    Arrays, or some chunks of them, by name.
  """
  taken: dict[str, np.ndarray | Parts] = {}
  for name, one in found.items():
    for at, member in enumerate(stacks.get(name, ())):
      taken[member] = (
          _member(one, at) if isinstance(one, Parts) else one[at, ...]
      )
    if name not in stacks:
      taken[name] = one
  return taken


def first(stack: Grid, member: int) -> int:
  """The number in a stack of the first chunk that has one of an array.

  Args:
    stack: how the stack is cut.
    member: which of its arrays.
  """
  return member // stack.chunk[0] * len(of_member(stack))


def of_member(stack: Grid) -> Grid:
  """How the arrays of a stack are cut."""
  return dataclasses.replace(
      stack, shape=stack.shape[1:], chunk=stack.chunk[1:]
  )


def _member(stack: Parts, at: int) -> Parts:
  """The chunks of one of a stack's arrays."""
  own = of_member(stack.grid)
  begin, row = first(stack.grid, at), at % stack.grid.chunk[0]
  pieces = {
      number - begin: np.asarray(piece)[row, ...]
      for number, piece in stack.pieces.items()
      if begin <= number < begin + len(own)
  }
  return Parts(grid=own, pieces=pieces)
