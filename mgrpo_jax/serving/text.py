"""The text of a turn while it is sampled: stop texts cut off, calls held."""

from __future__ import annotations

from collections.abc import Collection

from mgrpo_jax.sampler.spelling import Cutter, Decode, Decoder


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
