"""Leases: who wants which version of a policy kept, and until when.

    policies/<policy>/leases/v<N>/<holder>     {"until": seconds since 1970}

The holder writes its own clock, the publisher compares it with its own. So a
lease is honoured for `SKEW` seconds longer than it says: two clocks that differ
by less than that never cost a version.
"""

import dataclasses
import json
import math
import re
import time

from mgrpo_jax.keys import check_name
from mgrpo_jax.store import Store

SKEW = 600.0  # seconds that the clocks of two machines may differ by
_KEY = re.compile(r"v(\d+)/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
  """What leases say.

  Attributes:
    versions: that are kept.
    over: versions of the leases that ran out, by the lease's key.
    damaged: a line for each lease that cannot be read; its version is kept.
  """

  versions: frozenset[int]
  over: dict[str, int]
  damaged: tuple[str, ...]


def write(
    store: Store, root: str, number: int, *, holder: str, seconds: float
) -> None:
  """Takes or prolongs a lease.

  Args:
    store: the bucket.
    root: folder of the policy.
    number: the version.
    holder: who wants it, one path segment.
    seconds: for how long from now; infinity for good.

  Raises:
    StorageError: the store cannot be written.
    ValueError: the holder's name is out of range.
  """
  until = json.dumps({"until": time.time() + seconds}).encode()
  store.put(_key(root, number, holder), until)


def remove(store: Store, root: str, number: int, *, holder: str) -> None:
  """Gives a lease back; one that does not exist is left so."""
  store.delete(_key(root, number, holder))


def until(value: bytes) -> float:
  """Returns when a lease ends, seconds since 1970; NaN if it does not say."""
  try:
    return float(json.loads(value)["until"])
  except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError):
    return math.nan


def held(store: Store, root: str, number: int | None = None) -> Held:
  """Reads which versions are kept by leases, and removes none.

  A lease that ran out may be prolonged at any moment, so it goes only after
  its version: whoever prolongs it then sees that there is no manifest.

  Args:
    store: the bucket.
    root: folder of the policy.
    number: the only version that is asked for; None for all.

  Returns:
    What they say.

  Raises:
    StorageError: the store cannot be read.
  """
  leased, over, damaged = set[int](), dict[str, int](), list[str]()
  folder = f"{root}/leases"
  for key in store.list(folder if number is None else f"{folder}/v{number}"):
    if (value := store.get(key)) is None:
      continue
    found = _KEY.match(key.removeprefix(f"{folder}/"))
    end = until(value) if found else math.nan
    if math.isnan(end):
      damaged.append(f"lease {store.url}/{key}: it cannot be read")
    if found and not end + SKEW <= time.time():
      leased.add(int(found[1]))
    elif found:
      over[key] = int(found[1])
  return Held(versions=frozenset(leased), over=over, damaged=tuple(damaged))


def _key(root: str, number: int, holder: str) -> str:
  """Returns where a lease lies."""
  return f"{root}/leases/v{number}/{check_name(holder, 'holder')}"
