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


def until_text(decode: Decode, stops: Collection[str]) -> Callable[[int], bool]:
  """Makes of stop texts what `Engine.generate` takes as `until`.

  The completion's last token is the first with which a stop text is complete:
  what the tokens spell may begin before that text, and go on after it by the
  rest of that token. No token is cut, and none is sampled again.

  Args:
    decode: ids to text.
    stops: none empty.

  Returns:
    A function to call with each token of one completion, in order; whether a
    stop text is complete.
  """
  decoder, cutter = Decoder(decode), Cutter(stops)

  def ends(token: int) -> bool:
    cutter.push(decoder.push(token))
    return cutter.rest is not None

  return ends


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of a text that begins, but is not, a stop."""
  for length in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:length]):
      return length
  return 0
