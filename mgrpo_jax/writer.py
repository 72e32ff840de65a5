"""Versions of weights on their way to the store while training goes on."""

import concurrent.futures
import logging
from collections.abc import Callable, Mapping
from typing import Any

from mgrpo_jax import leaves, publish
from mgrpo_jax.bases import Bases
from mgrpo_jax.publish import Published
from mgrpo_jax.store import Store
from mgrpo_jax.types import PolicyVersion

_LAST = 30.0  # seconds for what is under way when the run leaves
_LOG = logging.getLogger(__name__)


class Writer:
  """Publishes in a thread of its own, one version after the other.

  Weights are read where they are, so nothing is copied first: they must not be
  donated (`trainer` does not). They are held until they are written, and those
  of a policy's last whole version while differences to it may be; whoever hands
  over faster than the store takes waits in `settle`.
  """

  def __init__(
      self,
      store: Store,
      *,
      keep: int,
      short: bool,
      whole_every: int,
      tell: Callable[[PolicyVersion], None],
  ) -> None:
    """Starts with nothing to write.

    Args:
      store: where to.
      keep: how many versions of a policy stay.
      short: whether float32 is rounded to bfloat16.
      whole_every: of how many versions of a policy that follow each other one
        is written whole, the others as differences to it; see `bases`.
      tell: takes every version that is in the store, from the thread.
    """
    self._store = store
    self._keep = keep
    self._short = short
    self._bases = Bases(whole_every)
    self._tell = tell
    self._thread = concurrent.futures.ThreadPoolExecutor(
        1, thread_name_prefix="publish"
    )
    self._pending: list[concurrent.futures.Future] = []
    self._sure: Callable[[], None] = _always

  def guard(self, sure: Callable[[], None]) -> None:
    """Publishes from now on only where this process still may.

    Args:
      sure: raises where it may not; see `publish.publish`.
    """
    self._sure = sure

  def write(
      self, policy: str, number: int, params: Any, *, meta: Mapping[str, Any]
  ) -> None:
    """Hands a version over and returns at once; see `publish.publish`.

    Args:
      policy: the policy's name.
      number: of the version.
      params: pytree of arrays that do not change, or an `Offer`.
      meta: JSON kept beside them.
    """
    leaves.list_shards(params)
    self._pending.append(
        self._thread.submit(self._publish, policy, number, params, meta)
    )

  def settle(self) -> list[str]:
    """Waits until everything handed over is in the store.

    Returns:
      What was found damaged in the store, a line each.

    Raises:
      StorageError: a version cannot be written; those after it are.
    """
    pending, self._pending = self._pending, []
    concurrent.futures.wait(pending)
    return [line for one in pending for line in one.result().damaged]

  def close(self) -> None:
    """Waits for what is under way, not for ever; `settle` says how it went."""
    if any(not one.done() for one in self._pending):
      _LOG.warning(
          "%s: writing the last versions, for %.0f s at most",
          self._store.url,
          _LAST,
      )
      self._store.hurry(_LAST)
    self._thread.shutdown()

  def _publish(
      self, policy: str, number: int, params: Any, meta: Mapping[str, Any]
  ) -> Published:
    """Writes a version, in the thread."""
    published = publish.publish(
        self._store,
        policy,
        number,
        params,
        keep=self._keep,
        short=self._short,
        bases=self._bases,
        meta=meta,
        sure=self._sure,
    )
    self._tell(published.version)
    return published


def _always() -> None:
  """Lets everything be published."""
