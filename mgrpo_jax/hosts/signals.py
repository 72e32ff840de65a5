"""Signals to end that are heeded late: not amid what others take part in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_TO_END = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def unheld() -> Iterator[None]:
  """Lets signals end the process at once, also where Python would not see them.

  For a long wait in other than Python's code, when nothing is to be closed yet.
  In other threads than the main one this does nothing.

  Yields:
    Nothing.
  """
  with _handled(signal.SIG_DFL):
    yield


@contextlib.contextmanager
def held() -> Iterator[list[int]]:
  """Heeds signals to end when the body is over, and not before.

  However many came, one is heeded: SIGTERM before SIGINT. Only the main thread
  is ever disturbed by one: in others this does nothing.

  Yields:
    The numbers of those that came, so far; who clears it heeds none.
  """
  came: list[int] = []

  def note(number: int, frame: object) -> None:
    del frame
    came.append(number)

  try:
    with _handled(note):
      yield came
  finally:
    if came:
      signal.raise_signal(max(came))


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
  """Has signals to end handled so; those that are ignored stay so."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {
      number: signal.signal(number, handler)
      for number in _TO_END
      if signal.getsignal(number) is not signal.SIG_IGN
  }
  try:
    yield
  finally:
    # SIGTERM's first: it may raise SIGINT, which must find a handler as well.
    for number, earlier in sorted(before.items(), reverse=True):
      signal.signal(number, earlier)
