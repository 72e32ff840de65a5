"""Tokens to text while they are sampled: whole characters, stop texts.

Tokens come in one at a time, so that what goes out does not depend on how many
a visit of the device yields, nor on whether anybody reads along.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

Decode = Callable[[Sequence[int]], str]

_BROKEN = "\ufffd"  # what a part of a character decodes to


class Decoder:
  """Spells tokens as soon as they make whole characters."""

  def __init__(self, decode: Decode) -> None:
    """Starts with nothing spelled.

    Args:
      decode: ids to text.
    """
    self._decode = decode
    self._ids: list[int] = []
    self._known = 0  # of the ids, decoded for what follows to join on to

  def push(self, token: int) -> str:
    """The text that a token completes; empty where it completes none."""
    self._ids.append(token)
    text = self._news()
    if not text or text.endswith(_BROKEN):
      return ""
    self._ids = self._ids[self._known :]
    self._known = len(self._ids)
    return text

  def flush(self) -> str:
    """The text that is left: characters which never became whole."""
    text = self._news()
    self._ids, self._known = [], 0
    return text

  def _news(self) -> str:
    """What the ids spell beyond those that are known."""
    known = self._decode(self._ids[: self._known])
    return self._decode(self._ids)[len(known) :]


class Cutter:
  """Lets text through up to the first stop text to be complete."""

  def __init__(self, stops: Collection[str]) -> None:
    """Starts with nothing held back.

    Args:
      stops: none empty.
    """
    self._stops = tuple(stops)
    self._held = ""
    self.rest: str | None = None  # from the stop text on, once there was one

  def push(self, text: str) -> str:
    """Lets a text through but for an end that may begin a stop text."""
    if self.rest is not None:
      self.rest += text
      return ""
    text = self._held + text
    found = [
        (text.find(stop) + len(stop), text.find(stop))
        for stop in self._stops
        if stop in text
    ]
    if found:
      _, start = min(found)
      self._held, self.rest = "", text[start:]
      return text[:start]
    held = max((_overlap(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held]

  def flush(self) -> str:
    """What was held back for nothing."""
    text, self._held = self._held, ""
    return text


class Spelling:
  """The text of one turn: decoded, cut at stop texts, calls held back."""

  def __init__(
      self,
      decode: Decode,
      *,
      stop_ids: Collection[int],
      stops: Collection[str],
      marks: Collection[str],
  ) -> None:
    """Starts with nothing said.

    Args:
      decode: ids to text.
      stop_ids: tokens that end a turn, and are not part of its text.
      stops: texts that do.
      marks: texts from which on the rest is held until the turn has ended,
        because it may be a call.
    """
    self._decoder = Decoder(decode)
    self._stop_ids = frozenset(stop_ids)
    self._stops = Cutter(stops)
    self._marks = Cutter(marks)

  @property
  def cut(self) -> bool:
    """Whether there was a stop text."""
    return self._stops.rest is not None

  def push(self, token: int) -> str:
    """The text that may be shown after a token.

    Args:
      token: its id.

    Returns:
      The text; empty where nothing more may be shown yet.
    """
    if token in self._stop_ids or self.cut:
      return ""
    return self._marks.push(self._stops.push(self._decoder.push(token)))

  def flush(self) -> tuple[str, str]:
    """Ends the turn.

    Returns:
      Text that follows what was shown, and text from a mark on.
    """
    shown = ""
    if not self.cut:
      shown = self._stops.push(self._decoder.flush()) + self._stops.flush()
    shown = self._marks.push(shown) + self._marks.flush()
    return shown, self._marks.rest or ""


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of a text that begins, but is not, a stop."""
  for length in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:length]):
      return length
  return 0
