"""Stage 7: versions of a policy's weights, written and read.

    policies/<policy>/v<N>/<array>/…           zarr3: a parameter, or a stack
    policies/<policy>/v<N>/published.json      when, by the publisher's clock
    policies/<policy>/v<N>/manifest.json       shapes, dtypes, digests
    policies/<policy>/LATEST                   one pointer, written last
    policies/<policy>/leases/v<N>/<holder>     keeps a version from deletion

A version is visible whole or not at all, also where what is stored is only its
difference to an earlier one (`bases`): its manifest is written after its
arrays, and the pointer after the manifest. Readers check every digest and
never mix versions; where the newest is corrupt they fall back to the previous
good one and say so. Each policy has one publisher at a time, the job that
trains it; of two, the second to finish is told. docs/bucket.md has the format.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from mgrpo_jax import (
    atomic,
    contents,
    leases,
    leaves,
    pointer,
    retention,
    stacks,
)
from mgrpo_jax import manifest as manifests
from mgrpo_jax.bases import Base, Bases
from mgrpo_jax.keys import check_name
from mgrpo_jax.offer import Offer, Whole
from mgrpo_jax.store import Store
from mgrpo_jax.types import PolicyVersion

_ATTEMPTS = 5  # reads overtaken by the publisher's retention
_READINGS = 2  # of a version, before what was damaged counts as stored so
_NO_NUMBER = -1  # stands for LATEST itself among what was skipped
_LOG = logging.getLogger(__name__)


class OvertakenError(atomic.StorageError):
  """Two processes publish the same policy; the text says which and where."""


class NoVersionError(LookupError):
  """There is no (good) version to read; the text says of what and where."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """Weights as they were read.

  Attributes:
    params: pytree of `jax.Array`s, shaped like what was asked for.
    version: which version they are.
    meta: what the publisher wrote beside them.
    skipped: newer versions found corrupt, what is wrong with each, as tried.
  """

  params: Any
  version: PolicyVersion
  meta: Mapping[str, Any]
  skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """What was written.

  Attributes:
    version: the version.
    damaged: leases that cannot be read, a line each; their versions stay.
  """

  version: PolicyVersion
  damaged: tuple[str, ...]


def publish(
    store: Store,
    policy: str,
    number: int,
    params: Any,
    *,
    keep: int,
    meta: Mapping[str, Any],
    short: bool = False,
    bases: Bases | None = None,
    sure: Callable[[], None] = lambda: None,
) -> Published:
  """Writes a version of a policy's weights and points LATEST at it.

  Publishing equal weights under the same number again writes nothing but the
  pointer, so a run that resumes may repeat itself. But a difference that would
  be whole this time, as the first after a start is, is written anew. Versions
  newer than `number` belong to a past that a resumed run has left; retention
  removes them.

  Args:
    store: the bucket.
    policy: the policy's name, one path segment.
    number: version number, ≥ 0.
    params: pytree of arrays, or an `Offer` of weights that lie elsewhere.
    keep: how many versions stay, ≥ 1; leased ones stay besides.
    meta: JSON kept beside the weights (step, stage, …).
    short: whether float32 is rounded to bfloat16, and read as float32 again.
    bases: whose differences may be written in place of whole versions, and
      which remembers this one; arrays must not change while it does. None: the
      version is whole.
    sure: raises where this process may publish no more.

  Returns:
    The version, and what was found damaged.

  Raises:
    OvertakenError: another process published this policy meanwhile.
    StorageError: the store cannot be written; LATEST is then as before.
    ValueError: a name, number or count is out of range.
  """
  offer = params if isinstance(params, Offer) else Whole(params, short=short)
  bases = bases or Bases(1)
  with contextlib.closing(offer):
    _check(policy, number)
    if keep < 1:
      raise ValueError(f"keep: {keep} must be at least 1")
    held = offer.describe(store)
    base = bases.choose(store, policy, number, held)
    manifest = manifests.make(
        policy, number, held, meta=meta, base=base.version if base else None
    )
    path = manifests.path(policy, number)
    version = PolicyVersion(
        policy=policy, number=number, path=path, digest=manifest["digest"]
    )
    store.settle()
    before = store.read(pointer.key(policy))
    if not _is_whole(store, version):
      _write(store, offer, version, manifest, base, bases, sure)
  sure()
  if not pointer.move(store, before, version):
    sure()  # whose job another process has taken is told that
    raise OvertakenError(
        f"{before.key} in {store.url} was changed while version {number} was"
        " written: another process publishes this policy"
    )
  needed = functools.partial(bases.needed, store, policy)
  damaged = retention.retain(store, policy, number, keep, needed, sure)
  return Published(version=version, damaged=damaged)


def read(
    store: Store,
    policy: str,
    number: int | Literal["latest"],
    *,
    like: Any,
    held: contents.Held | None = None,
) -> Weights:
  """Reads one version of a policy's weights, checked against its digests.

  Args:
    store: the bucket.
    policy: the policy's name.
    number: a version, or `latest`: the version LATEST points at or, where that
      is corrupt or another by its digest, the newest good one before it.
    like: pytree of arrays or `jax.ShapeDtypeStruct`s, as `policy.abstract`
      gives; weights go to its shardings. Where those are of several processes
      each reads, by number, only chunks that its devices take.
    held: what this reader keeps, to read what differs and no more.

  Returns:
    The weights, all of one version.

  Raises:
    CorruptError: the version asked for by number is corrupt.
    NoVersionError: there is no such version, or none is good.
    StorageError: the store cannot be read.
    MismatchError: the weights do not fit `like`.
    ValueError: a name is out of range.
  """
  if number != "latest":
    _check(policy, number)
    return _read_number(store, policy, number, like, held)
  _check(policy, 0)
  skipped: dict[int, str] = {}
  for _ in range(_ATTEMPTS):
    skipped.clear()  # who has published since may have mended what was
    found = store.get(pointer.key(policy))
    for candidate, digest in _candidates(store, policy, found, skipped):
      try:
        weights = _read_number(store, policy, candidate, like, held, digest)
      except (NoVersionError, atomic.CorruptError) as error:
        if store.get(pointer.key(policy)) != found:
          break  # retention overtook us: start from where LATEST points now
        skipped[candidate] = str(error)
        _LOG.warning("%s; trying the version before it", error)
        continue
      return dataclasses.replace(weights, skipped=tuple(skipped.values()))
    else:
      break
  why = "; ".join(skipped.values()) or "versions vanish while being read"
  raise NoVersionError(f"no good version of {policy} in {store.url}: {why}")


def latest(store: Store, policy: str) -> PolicyVersion | None:
  """Returns what LATEST points at, None where nothing is published.

  Args:
    store: the bucket.
    policy: the policy's name.

  Returns:
    The version, which may be corrupt.

  Raises:
    CorruptError: the pointer is corrupt.
    StorageError: the store cannot be read.
    ValueError: the name is out of range.
  """
  _check(policy, 0)
  found = store.get(pointer.key(policy))
  return None if found is None else pointer.parse(store, policy, found)


def versions(store: Store, policy: str) -> list[int]:
  """Returns the numbers of all versions that have a manifest, ascending."""
  root = f"policies/{check_name(policy, 'policy')}/"
  keys = [key.removeprefix(root) for key in store.list(root.rstrip("/"))]
  return sorted(retention.whole_among(keys))


def lease(
    store: Store, policy: str, number: int, *, holder: str, seconds: float
) -> None:
  """Keeps a version from being deleted, for a time; call again to prolong.

  Clocks may differ by `leases.SKEW` seconds; so may a lease be longer.

  Args:
    store: the bucket.
    policy: the policy's name.
    number: the version.
    holder: who wants it, one path segment.
    seconds: for how long from now; infinity for good.

  Raises:
    NoVersionError: there is no such version.
    StorageError: the store cannot be written.
    ValueError: a name or number is out of range.
  """
  _check(policy, number)
  root = f"policies/{policy}"
  leases.write(store, root, number, holder=holder, seconds=seconds)
  if store.get(f"{manifests.path(policy, number)}/manifest.json") is None:
    release(store, policy, number, holder=holder)
    raise NoVersionError(f"{policy} has no version {number} in {store.url}")


def release(store: Store, policy: str, number: int, *, holder: str) -> None:
  """Gives a lease back; one that does not exist is left so."""
  _check(policy, number)
  leases.remove(store, f"policies/{policy}", number, holder=holder)


def _write(
    store: Store,
    offer: Offer,
    version: PolicyVersion,
    manifest: Mapping[str, Any],
    base: Base | None,
    bases: Bases,
    sure: Callable[[], None],
) -> None:
  """Writes a version, its manifest last; what lay there goes before."""
  path, keeps = version.path, bases.keeps and base is None
  if base is None:
    bases.forget(version.policy)
  sure()
  retention.remove(store, path)
  store.settle()
  sure()  # after each wait in which another process may have come
  try:
    parts = offer.write(store, path, base, keeps=keeps)
    when = json.dumps({"time": time.time()}).encode()
    store.put(f"{path}/published.json", when)
    store.put(f"{path}/manifest.json", json.dumps(manifest).encode())
    bases.wrote(version, base, parts)
  except atomic.StorageError:
    with contextlib.suppress(atomic.StorageError):
      sure()  # else it is another process's by now
      retention.remove(store, path)  # on a full disk, it only harms
    raise


def _read_number(
    store: Store,
    policy: str,
    number: int,
    like: Any,
    held: contents.Held | None,
    digest: str | None = None,
) -> Weights:
  """Reads one version; what changed while being read is read again.

  A digest is that of the manifest it must have: another one's is of a version
  that is not published yet, or of a publisher that came second.
  """
  path = manifests.path(policy, number)
  error: atomic.CorruptError | None = None
  seen = collections.Counter[bytes]()
  for _ in range(_ATTEMPTS):
    found = store.get(f"{path}/manifest.json")
    if found is None:
      raise NoVersionError(f"{policy} has no version {number} in {store.url}")
    if seen[found] == _READINGS:
      break  # it did not change while we read it: it is corrupt
    seen[found] += 1
    try:
      manifest = manifests.parse(found, policy, number)
      own = json.loads(found)["digest"]
      if digest is not None and own != digest:
        raise atomic.CorruptError("its digest is not the one that LATEST names")
      arrays = contents.read(store, manifest, like, held)
    except atomic.CorruptError as caught:
      error = caught
      continue
    what = f"{store.url}/{path}"
    return Weights(
        params=leaves.from_host(
            stacks.scatter(
                manifests.widened(arrays, manifest), manifest.get("stacks", {})
            ),
            like,
            what=what,
        ),
        version=PolicyVersion(
            policy=policy, number=number, path=path, digest=own
        ),
        meta=manifest["meta"],
        skipped=(),
    )
  raise atomic.CorruptError(
      f"version {number} of {policy} in {store.url} is corrupt: {error}"
  ) from error


def _candidates(
    store: Store, policy: str, found: bytes | None, skipped: dict[int, str]
) -> Iterator[tuple[int, str | None]]:
  """Yields versions to try, newest first, with the digest that LATEST names.

  They are listed only when needed.
  """
  if found is None:
    raise NoVersionError(f"nothing is published for {policy} in {store.url}")
  try:
    newest = pointer.parse(store, policy, found)
    yield newest.number, newest.digest
    older = [n for n in versions(store, policy) if n < newest.number]
  except atomic.CorruptError as error:
    _LOG.warning("%s; starting from the newest version", error)
    skipped[_NO_NUMBER] = str(error)
    older = versions(store, policy)
  yield from ((n, None) for n in reversed(older))


def _is_whole(store: Store, version: PolicyVersion) -> bool:
  """Returns whether exactly this version already lies in the store."""
  found = store.get(f"{version.path}/manifest.json")
  if found is None:
    return False
  try:
    manifest = manifests.parse(found, version.policy, version.number)
    if json.loads(found)["digest"] != version.digest:
      return False
    contents.read(store, manifest, None)
  except atomic.CorruptError:
    return False
  return True


def _check(policy: str, number: int) -> None:
  """Raises ValueError unless a version can be called this."""
  check_name(policy, "policy")
  if isinstance(number, bool) or not isinstance(number, int) or number < 0:
    raise ValueError(f"number: {number!r} must be an integer of at least 0")
