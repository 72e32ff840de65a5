"""The processes of a job end together: process 0 says how, and with what."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import jax

from mgrpo_jax.hosts.channel import Channel

END = "end"
FAIL = "fail"  # reason, code


@contextlib.contextmanager
def driving(channel: Channel | None) -> Iterator[None]:
  """Has the other processes end with this one, and for the same reason.

  Args:
    channel: to them; None for a job of one process.

  Yields:
    Nothing.
  """
  try:
    yield
    if channel is not None:
      channel.tell(END)
  except BaseException as error:
    if channel is not None:
      cause = error.__context__ if isinstance(error, SystemExit) else error
      told = {
          "reason": str(cause) or type(cause).__name__,
          "code": _code(error),
      }
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # they are gone
        channel.tell(FAIL, told, waits=False)
    raise


def _code(error: BaseException) -> int:
  """With what the process will end."""
  if isinstance(error, SystemExit) and isinstance(error.code, int):
    return error.code
  interrupted = isinstance(error, KeyboardInterrupt)
  return 128 + signal.SIGINT if interrupted else 1
