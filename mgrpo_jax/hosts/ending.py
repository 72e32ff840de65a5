"""The processes of a job end together: process 0 says how, and with what."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax

from mgrpo_jax.hosts.channel import Channel

END = "end"
FAIL = "fail"  # reason, code


@contextlib.contextmanager
def driving(
    channel: Channel | None,
    interrupted: Callable[[], int] = lambda: 128 + signal.SIGINT,
) -> Iterator[None]:
  """Has the other processes end with this one, and for the same reason.

  Args:
    channel: to them; None for a job of one process.
    interrupted: gives the code with which this one ends where it is told to.

  Yields:
    Nothing.
  """
  try:
    yield
    if channel is not None:
      channel.tell(END)
  except BaseException as error:
    if channel is not None:
      exits = isinstance(error, SystemExit)
      cause = (error.__context__ if exits else None) or error
      told = {
          "reason": str(cause) or type(cause).__name__,
          "code": _code(error, interrupted),
      }
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # they are gone
        channel.tell_last(FAIL, told)
    raise


def _code(error: BaseException, interrupted: Callable[[], int]) -> int:
  """With what the process will end."""
  if isinstance(error, SystemExit) and isinstance(error.code, int):
    return error.code
  return interrupted() if isinstance(error, KeyboardInterrupt) else 1
