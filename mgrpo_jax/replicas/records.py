"""Which samplers of a policy there are, and what they sample from.

    <bucket>/replicas/<policy>/<id>.json

Clocks of different machines are never compared: a sampler lives while its
record changes. It removes the record when it leaves. The record holds no
secret.
"""

from __future__ import annotations

import dataclasses
import json
import urllib.parse
from typing import Any

from mgrpo_jax import atomic, leaves
from mgrpo_jax.keys import check_name
from mgrpo_jax.store import Store

FORMAT = 1
_LONGEST = 200  # characters of a text
_NUMBERS = ("slots", "version", "beat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """What a sampler says of itself.

  Attributes:
    policy: that it samples.
    id: another one for every process.
    address: http://host:port, where it is asked.
    slots: requests that it samples at a time.
    version: number of the weights that it samples from.
    weights: their digest, as they were published; empty for the first ones.
    beat: counts up while it lives.
    time: seconds since 1970 by its own clock, for people.
  """

  policy: str
  id: str
  address: str
  slots: int
  version: int
  weights: str
  beat: int
  time: float


def write(store: Store, entry: Entry) -> None:
  """Writes a record.

  Args:
    store: the bucket.
    entry: what it says.

  Raises:
    StorageError: it cannot be written.
  """
  record = leaves.seal({"format": FORMAT, **dataclasses.asdict(entry)})
  store.put(_key(entry.policy, entry.id), json.dumps(record).encode())


def remove(store: Store, policy: str, id: str) -> None:
  """Removes a record.

  Args:
    store: the bucket.
    policy: that was sampled.
    id: of the sampler.

  Raises:
    StorageError: it cannot be removed.
  """
  store.delete(_key(policy, id))


def read(store: Store, policy: str) -> dict[str, Entry]:
  """Reads all records of a policy's samplers; damaged ones are left out.

  Args:
    store: the bucket.
    policy: that they sample.

  Returns:
    What they say, by id.

  Raises:
    StorageError: the bucket cannot be read.
  """
  found: dict[str, Entry] = {}
  root = f"replicas/{check_name(policy, 'policy')}"
  for key in store.list(root):
    id = key.removeprefix(f"{root}/").removesuffix(".json")
    try:
      if key != _key(policy, id):
        continue
    except ValueError:  # another program's
      continue
    entry = _parsed(store.get(key))
    if entry is not None and (entry.policy, entry.id) == (policy, id):
      found[id] = entry
  return found


def _parsed(value: bytes | None) -> Entry | None:
  """A record; None where it is none, which only costs help."""
  try:
    body = leaves.check_seal(json.loads(value or b"null"))
    if body.pop("format", None) != FORMAT:
      return None
    entry = Entry(**body)
    check_name(entry.id, "id")
  except (
      AttributeError,
      RecursionError,
      TypeError,
      ValueError,
      atomic.CorruptError,
  ):
    return None
  return entry if _is_sound(dataclasses.asdict(entry)) else None


def _is_sound(fields: dict[str, Any]) -> bool:
  """Whether fields have the types and ranges that they should."""
  texts = [fields[name] for name in ("policy", "id", "address", "weights")]
  numbers = [fields[name] for name in _NUMBERS]
  if not all(type(text) is str and len(text) <= _LONGEST for text in texts):
    return False
  if not all(type(n) is int and n >= 0 for n in numbers) or not fields["slots"]:
    return False
  try:
    url = urllib.parse.urlsplit(fields["address"])
    return url.scheme == "http" and bool(url.hostname) and bool(url.port)
  except ValueError:
    return False


def _key(policy: str, id: str) -> str:
  """Where a record lies."""
  return f"replicas/{check_name(policy, 'policy')}/{check_name(id, 'id')}.json"
