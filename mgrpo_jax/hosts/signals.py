"""Signals to end that are heeded late: not amid what others take part in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence

_TO_END = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held() -> Iterator[Sequence[int]]:
  """Heeds signals to end when the body is over, and not before.

  Only the main thread is ever disturbed by one: in others this does nothing.

  Yields:
    The numbers of those that came, so far.
  """
  came: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield came
    return

  def note(number: int, frame: object) -> None:
    del frame
    came.append(number)

  before = {
      number: signal.signal(number, note)
      for number in _TO_END
      if signal.getsignal(number) is not signal.SIG_IGN
  }
  try:
    yield came
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    for late in came:
      signal.raise_signal(late)
