"""Which versions of a policy lie in the store, and which of them go."""

import re
from collections.abc import Callable, Iterable

from mgrpo_jax import leases
from mgrpo_jax import manifest as manifests
from mgrpo_jax.store import Store

_VERSION = re.compile(r"v(\d+)/")


def whole_among(keys: Iterable[str]) -> set[int]:
  """The versions that have a manifest, of keys below a policy's folder."""
  found = [_VERSION.match(k) for k in keys if k.endswith("/manifest.json")]
  return {int(match[1]) for match in found if match}


def retain(
    store: Store,
    policy: str,
    number: int,
    keep: int,
    needed: Callable[[int], int | None],
    sure: Callable[[], None],
) -> tuple[str, ...]:
  """Deletes what is neither new, nor leased, nor pointed to, nor their base.

  Versions go before those that they need, so that what can be seen is whole.

  Args:
    store: the bucket.
    policy: whose versions.
    number: that LATEST points to.
    keep: how many of the newest stay.
    needed: says which other version a version needs, None for none.
    sure: raises where this process may delete no more.

  Returns:
    A line for each lease that cannot be read.

  Raises:
    StorageError: the store cannot be read or written.
  """
  root = f"policies/{policy}"
  keys = [key.removeprefix(f"{root}/") for key in store.list(root)]
  present = {int(m[1]) for m in map(_VERSION.match, keys) if m}
  past = sorted(n for n in whole_among(keys) if n <= number)
  held = leases.held(store, root)
  gone = set(held.over.values()) - present
  stay = {number, *past[-keep:], *held.versions} & present
  if going := sorted(present - stay, reverse=True):
    stay |= {base for one in stay if (base := needed(one)) is not None}
  for old in going:
    if old in stay:
      continue
    path = manifests.path(policy, old)
    sure()
    manifest = store.get(f"{path}/manifest.json")
    if manifest is not None:
      store.delete(f"{path}/manifest.json")
      if old in leases.held(store, root, old).versions:  # taken in between
        store.put(f"{path}/manifest.json", manifest)
        if (base := needed(old)) is not None:
          stay.add(base)
        continue
    store.discard(path)  # gone by the next publication
    gone.add(old)
  for key in (k for k, old in held.over.items() if old in gone):
    store.delete(key)
  return held.damaged


def remove(store: Store, path: str) -> None:
  """Removes a version; its manifest first, so that nobody starts on it."""
  if store.get(f"{path}/manifest.json") is not None:
    store.delete(f"{path}/manifest.json")
  store.discard(path)
