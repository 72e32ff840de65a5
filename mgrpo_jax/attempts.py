"""How long an operation of the store may take, and what is tried again.

TensorStore retries what a server answers with 500 or 503, and connections that
break, a few times each. Whatever is left of that, and answers that never come,
is tried again here until the operation's patience ends. A disk's errors are
final: it would say the same again.

An attempt that was given up may still reach the server later. So a pointer is
written by compare-and-swap where there is one (`Store.replace`).
"""

import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any, Protocol

import tensorstore as ts

from mgrpo_jax import atomic

PATIENCE = 120.0  # seconds that a small operation may take, retries included
SLOWEST = 1 << 20  # bytes/s; what moves slower than that counts as stuck
_RETRIES: dict[str, Any] = {  # a handful of quick retries, the rest is ours
    f"{driver}_request_retries": {
        "max_retries": 4,
        "initial_delay": "100ms",
        "max_delay": "2s",
    }
    for driver in ("gcs", "s3")
}
_ATTEMPT = 30.0  # seconds until an attempt without an answer is given up
_LOOK = 1.0  # seconds between looks at the limit
_PAUSE = 0.2, 5.0  # seconds between attempts, at first and at most
_TRANSIENT = re.compile("ABORTED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE")
_OUTSIDE = re.compile(  # failures that say nothing about what was stored
    f"{_TRANSIENT.pattern}|CANCELLED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED"
)


class Pending(Protocol):
  """An attempt under way; TensorStore's futures are."""

  def result(self, timeout: float) -> Any:
    """Waits so many seconds; raises TimeoutError when they are over."""

  def cancel(self) -> Any:
    """Gives it up."""


class UndecodedError(atomic.StorageError):
  """The store answered, but not with what was written."""


@functools.cache
def context() -> ts.Context:
  """Returns this process's context, where buckets in memory live."""
  return ts.Context(_RETRIES)


def wait(
    start: Callable[[], Pending],
    *,
    what: str,
    patience: float,
    nbytes: int = 0,
    started: Pending | None = None,
    limit: Callable[[], float] = lambda: math.inf,
) -> Any:
  """Waits for an operation, beginning it again where a server failed.

  Args:
    start: begins an attempt; doing it twice must do no harm.
    what: what is attempted, for the error (`write gs://b/k`).
    patience: seconds in all that an operation without data may take.
    nbytes: of data that it moves, for which more is allowed.
    started: the first attempt, where it is under way already.
    limit: when to give up at the latest, by `time.monotonic`; asked again and
      again.

  Returns:
    The result of the attempt that worked.

  Raises:
    StorageError: none worked; the text says why and, where it was tried
      again, after how many attempts in how many seconds.
    UndecodedError: what is stored is not what was written.
  """
  begun = time.monotonic()
  more = nbytes / SLOWEST
  tries, pause, problem = 0, _PAUSE[0], ""
  while True:
    tries += 1
    future = start() if started is None else started
    started = None
    left = begun + patience + more - time.monotonic()
    try:
      return _result(future, min(left, _ATTEMPT + more), limit)
    except TimeoutError:
      future.cancel()
      problem = problem or "no answer"
    except (ValueError, OSError, RuntimeError) as error:
      future.cancel()  # what is left of it
      problem = atomic.reason(error)
      if isinstance(error, OSError) or not _TRANSIENT.match(str(error)):
        raise _kind(error)(f"cannot {what}: {problem}") from error
    took = time.monotonic() - begun
    over = time.monotonic() + pause >= limit()
    if over or took + pause >= patience + more:
      attempts = f"{tries} attempt{'s' * (tries > 1)}"
      raise atomic.StorageError(
          f"cannot {what}: {problem} ({attempts} in {took:.0f} s)"
      )
    time.sleep(pause)
    pause = min(2 * pause, _PAUSE[1])


def _result(future: Pending, seconds: float, limit: Callable[[], float]) -> Any:
  """Waits for an attempt; raises TimeoutError when it is to be given up."""
  end = time.monotonic() + seconds
  while True:
    left = min(end, limit()) - time.monotonic()
    try:
      return future.result(timeout=max(0.0, min(left, _LOOK)))
    except TimeoutError:
      if left <= _LOOK:
        raise


def _kind(error: BaseException) -> type[atomic.StorageError]:
  """Returns which error TensorStore's is."""
  outside = isinstance(error, OSError) or _OUTSIDE.match(str(error))
  return atomic.StorageError if outside else UndecodedError
