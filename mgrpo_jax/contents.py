"""The arrays of one version, read from where they lie, whole or as differences.

A difference is read together with its base, which is always a whole version.
What comes of it is checked by the digests of the version that was asked for, so
that nothing of the base is believed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mgrpo_jax import atomic, chunks, deltas, leaves, stacks
from mgrpo_jax import manifest as manifests
from mgrpo_jax.chunks import Grid
from mgrpo_jax.stacks import Stacks
from mgrpo_jax.store import Store

Wanted = Mapping[str, tuple[Grid, list[int]]]  # chunks of arrays, by name
Seen = Callable[[str, Any], object]  # is told of each array that is here


class Held:
  """A base that one reader keeps, to read it once for all its differences.

  It takes the memory of one copy of the weights, where there are differences.
  """

  def __init__(self) -> None:
    """Keeps nothing."""
    self._what: tuple[str, Wanted] | None = None
    self._arrays: dict[str, Any] = {}

  def find(self, digest: str, wanted: Wanted) -> dict[str, Any] | None:
    """Returns the arrays of a base, None where they are not kept.

    Args:
      digest: of its manifest.
      wanted: the chunks of arrays that are enough.
    """
    return self._arrays if self._what == (digest, wanted) else None

  def keep(self, digest: str, wanted: Wanted, arrays: dict[str, Any]) -> None:
    """Keeps a base in place of the one before; see `find`."""
    self._what, self._arrays = (digest, wanted), arrays

  def clear(self) -> None:
    """Frees what is kept."""
    self._what, self._arrays = None, {}


def read(
    store: Store,
    manifest: Mapping[str, Any],
    like: Any,
    held: Held | None = None,
) -> dict[str, Any]:
  """Reads and checks a version's arrays.

  Args:
    store: the bucket.
    manifest: of the version.
    like: pytree of what is wanted; of arrays for the devices of several
      processes only chunks are read that those of this one take. None for
      all of all arrays.
    held: what the reader keeps; None for nothing.

  Returns:
    Arrays or `Parts` by name.

  Raises:
    CorruptError: an array differs from what was written, or is missing, or the
      base is missing or another by now.
    MismatchError: the base is of another format.
    StorageError: the store cannot be read.
  """
  grids = manifests.grids(manifest["arrays"])
  wanted = _wanted(grids, manifest.get("stacks", {}), like)
  path = manifests.path(manifest["policy"], manifest["number"])
  base, held = manifests.base(manifest), held or Held()
  if base is None:
    held.clear()
    with manifests.checker(manifest) as checker:
      return _fetch(store, path, grids, wanted, checker.add)
  number, digest = base
  found: dict[str, Any] = {}
  try:
    before = held.find(digest, wanted)
    if before is None or not _fits(before, grids):
      where = _base(store, manifest["policy"], number, digest, grids)
      before = _fetch(store, where, grids, wanted, lambda *_: None)
    with manifests.checker(manifest) as checker:

      def change(name: str, words: Any) -> None:
        found[name] = deltas.apply(before[name], words)
        checker.add(name, found[name])

      if any(one.dtype.itemsize not in deltas.SIZES for one in grids.values()):
        raise atomic.CorruptError("its arrays can have no differences")
      words = {name: deltas.words(grid) for name, grid in grids.items()}
      _fetch(store, path, words, _changed(wanted), change)
  except atomic.CorruptError as error:
    held.clear()  # what is kept may be what is damaged
    raise atomic.CorruptError(
        f"{error} (it is the difference to version {number})"
    ) from error
  held.keep(digest, wanted, before)
  return found


def _fits(arrays: Mapping[str, Any], grids: Mapping[str, Grid]) -> bool:
  """Whether arrays have the forms that they should have."""
  forms = {name: (one.shape, one.dtype) for name, one in arrays.items()}
  return forms == {name: (one.shape, one.dtype) for name, one in grids.items()}


def _base(
    store: Store,
    policy: str,
    number: int,
    digest: str,
    grids: Mapping[str, Grid],
) -> str:
  """Returns where a base lies; raises CorruptError where it does not."""
  path = manifests.path(policy, number)
  data = store.get(f"{path}/manifest.json")
  if data is None:
    raise atomic.CorruptError("its base is not in the store")
  if leaves.digest(manifests.unsealed(data)) != digest:
    raise atomic.CorruptError("its base is another one by now")
  manifest = manifests.parse(data, policy, number)
  if manifests.base(manifest) is not None:
    raise atomic.CorruptError("its base is not whole")
  if manifests.grids(manifest["arrays"]) != grids:
    raise atomic.CorruptError("its base is cut otherwise")
  return path


def _changed(wanted: Wanted) -> Wanted:
  """The chunks of differences to chunks that are wanted."""
  return {
      name: (deltas.words(grid), numbers)
      for name, (grid, numbers) in wanted.items()
  }


def _wanted(grids: Mapping[str, Grid], laid: Stacks, like: Any) -> Wanted:
  """Which chunks of arrays for several processes this one's devices take."""
  tree = leaves.named(like)
  wanted: dict[str, tuple[Grid, list[int]]] = {}
  for name, grid in grids.items():
    numbers = set[int]()
    own = stacks.of_member(grid) if name in laid else grid
    for at, member in enumerate(laid.get(name, [name])):
      leaf: Any = tree.get(member)
      where = getattr(leaf, "sharding", None)
      if where is None or where.is_fully_addressable or leaf.shape != own.shape:
        break  # all of it; what has another shape is told of in a moment
      begin = stacks.first(grid, at) if name in laid else 0
      numbers.update(begin + one for one in chunks.touched(own, where))
    else:
      wanted[name] = grid, sorted(numbers)
  return wanted


def _fetch(
    store: Store,
    path: str,
    forms: Mapping[str, Grid],
    wanted: Wanted,
    seen: Seen,
) -> dict[str, Any]:
  """Reads arrays of these forms, of some of them only chunks."""
  whole = {n: form for n, form in forms.items() if n not in wanted}
  found: dict[str, Any] = store.read_arrays(path, whole, seen, whole)
  return found | store.arrays.read_parts(path, wanted, seen)
