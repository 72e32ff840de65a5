"""LATEST: which version of a policy's weights is the newest.

    policies/<policy>/LATEST      number, path, digest (the manifest's)

It is written last, so it names a version that is whole; the digest says which
one, for a run that resumes writes another under the same number.
"""

import json

from mgrpo_jax import atomic
from mgrpo_jax import manifest as manifests
from mgrpo_jax.store import Record, Store
from mgrpo_jax.types import PolicyVersion


def key(policy: str) -> str:
  """Returns where the pointer lies."""
  return f"policies/{policy}/LATEST"


def parse(store: Store, policy: str, pointer: bytes) -> PolicyVersion:
  """Returns the version that a pointer names.

  Args:
    store: the bucket.
    policy: the policy's name.
    pointer: what lies there.

  Returns:
    The version, which may be corrupt.

  Raises:
    CorruptError: the pointer is corrupt.
  """
  try:
    found = json.loads(pointer)
    number, path, digest = (found[k] for k in ("number", "path", "digest"))
  except (ValueError, KeyError, TypeError, RecursionError):
    number, path, digest = None, "", ""
  if (
      type(number) is not int
      or not 0 <= number < 2**63
      or path != manifests.path(policy, number)
      or type(digest) is not str
  ):
    raise atomic.CorruptError(f"pointer {store.url}/{key(policy)} is corrupt")
  return PolicyVersion(policy=policy, number=number, path=path, digest=digest)


def move(store: Store, before: Record, version: PolicyVersion) -> bool:
  """Points at a version, unless another publisher has moved the pointer.

  Where there is no compare-and-swap, or the pointer says so already, it is
  looked at before it is written, and read back. That finds who published
  meanwhile; of two that write at the same moment one is told, or none.

  Args:
    store: the bucket.
    before: the pointer as it was read before the version was written.
    version: what it is to name.

  Returns:
    Whether it names the version now.

  Raises:
    StorageError: the store cannot be read or written.
  """
  said = {
      "number": version.number,
      "path": version.path,
      "digest": version.digest,
  }
  value = json.dumps(said).encode()
  if store.can_swap and value != before.value:
    return store.replace(before, value)
  if store.get(before.key) != before.value:
    return False
  return store.replace(before, value) and store.get(before.key) == value
