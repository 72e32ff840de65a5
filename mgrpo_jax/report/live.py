"""A line that says how far something is, rewritten in place on terminals."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import TextIO

# Importance, 0 first, and wordings, from the longest to the shortest.
Field = tuple[int, tuple[str, ...]]

SEPARATOR = " · "
_FALLBACK_WIDTH = 80
_CLEAR = "\r\x1b[K"
_WORDINGS = 4  # at most


class Line:
  """The line, and notes above it.

  Anywhere but on a terminal (a file, a pipe) plain lines come at most every few
  seconds.
  """

  def __init__(
      self,
      stream: TextIO,
      *,
      every_seconds: float,
      clock: Callable[[], float] = time.monotonic,
  ):
    """Writes nothing yet.

    Args:
      stream: where the line goes, such as sys.stderr.
      every_seconds: least time between plain lines, seconds.
      clock: seconds that never go backwards; another one in tests.
    """
    self._stream = stream
    self._tty = stream.isatty()
    self._every = every_seconds
    self._clock = clock
    self._line = ""
    self._next_plain = -math.inf

  def show(self, fields: Sequence[Field], *, force: bool) -> None:
    """Rewrites the line, or prints a plain one when it is time.

    Args:
      fields: what it says.
      force: prints a plain line even if it is not time.
    """
    if self._tty:
      # One column less than there are: a full line would wrap.
      self._line = fit(fields, _width(self._stream) - 1)
      self._stream.write(_CLEAR + self._line)
    elif force or self._clock() >= self._next_plain:
      self._next_plain = self._clock() + self._every
      self._stream.write(_joined(fields, 0) + "\n")
    self._stream.flush()

  def note(self, text: str) -> None:
    """Prints a line of its own above the live one.

    Args:
      text: what to say.
    """
    if self._tty:
      self._stream.write(f"{_CLEAR}{text}\n{self._line}")
    else:
      self._stream.write(f"{text}\n")
    self._stream.flush()

  def close(self) -> None:
    """Leaves the last line standing; what is printed next starts below."""
    if self._tty and self._line:
      self._stream.write("\n")
      self._stream.flush()
    self._line = ""


def fit(fields: Sequence[Field], width: int) -> str:
  """Joins fields, in shorter and shorter words until they fit.

  Where the shortest words are too long, the least important fields are left
  out.

  Args:
    fields: what the line says.
    width: columns there are.

  Returns:
    A line of at most `width` characters, without control characters.
  """
  for wording in range(_WORDINGS):
    line = _joined(fields, wording)
    if len(line) <= width:
      return line
  kept = list(fields)
  while len(kept) > 1 and len(_joined(kept, _WORDINGS)) > width:
    kept.remove(max(kept, key=lambda field: field[0]))
  line = _joined(kept, _WORDINGS)
  return line if len(line) <= width else (line[: width - 1] + "…")[:width]


def printable(text: str) -> str:
  """Replaces control characters, which could move the cursor.

  Args:
    text: anything.

  Returns:
    The same text, `?` for each of them.
  """
  return "".join(c if c.isprintable() else "?" for c in text)


def _joined(fields: Sequence[Field], wording: int) -> str:
  """Fields as a line, each in the wording of a number or its shortest one."""
  texts = (forms[min(wording, len(forms) - 1)] for _, forms in fields)
  return printable(SEPARATOR.join(texts))


def _width(stream: TextIO) -> int:
  """Columns of the terminal, asked anew each time: windows are resized."""
  try:
    return os.get_terminal_size(stream.fileno()).columns or _FALLBACK_WIDTH
  except OSError:
    return shutil.get_terminal_size((_FALLBACK_WIDTH, 24)).columns
