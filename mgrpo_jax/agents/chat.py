"""Messages to tokens, only ever extending the stream.

A chat format is a value: functions over one tokenizer; `agents/chats` has one
file per family. Text is encoded piece by piece between control tokens, so what
a page or a user writes can never become a control token, and nothing already
in the stream is encoded again.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from mgrpo_jax.agents.protocol import Mark, Pieces, Utterance, joined, scrub


class Tokenizer(Protocol):
  """What a chat format needs of a tokenizer."""

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""

  @property
  def bos_id(self) -> int | None:
    """What every stream has to start with, if anything."""

  @property
  def special_ids(self) -> Mapping[str, int]:
    """Control tokens by name."""

  def encode(self, text: str) -> list[int]:
    """Ordinary tokens of a text; never control tokens."""

  def decode(self, ids: Sequence[int]) -> str:
    """Text of the tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
  """How a call's messages become tokens.

  Attributes:
    name: for records and messages.
    stop_ids: tokens that end a turn.
    open: (system, request) to the ids before the first sampled token.
    extend: (whether the turn ended with a stop token, result) to the ids
      that follow the sampled ones, up to the next sampled token.
    ask: the same for the user's next message.
    read: sampled ids to the utterance they spell.
    write: pieces of a turn to the ids that `read` reads as it, stop id
      included.
  """

  name: str
  stop_ids: tuple[int, ...]
  open: Callable[[Pieces, str], list[int]]
  extend: Callable[[bool, Pieces], list[int]]
  ask: Callable[[bool, Pieces], list[int]]
  read: Callable[[Sequence[int]], Utterance]
  write: Callable[[Pieces], list[int]]


def specials(
    tokenizer: Tokenizer, names: Sequence[str], chat: str
) -> dict[str, int]:
  """Looks up control tokens.

  Args:
    tokenizer: where.
    names: what the chat format cannot do without.
    chat: name of the chat format, for the message.

  Returns:
    Ids by name.

  Raises:
    ValueError: some are missing; names them all.
  """
  known = tokenizer.special_ids
  missing = [name for name in names if name not in known]
  if missing:
    raise ValueError(
        f"tokenizer: lacks the control tokens {missing} of the {chat} chat "
        f"format; it holds {sorted(known)}"
    )
  return {name: known[name] for name in names}


def speller(tokenizer: Tokenizer) -> Callable[[Pieces], list[int]]:
  """Makes a function that encodes pieces, each run of text at once.

  Args:
    tokenizer: whose control tokens the marks become.

  Returns:
    Pieces to ids; a mark without a control token counts as text.
  """
  known = tokenizer.special_ids

  def resolve(piece: str | Mark) -> str | Mark:
    if isinstance(piece, Mark) and piece.name not in known:
      return piece.name
    return piece

  def spell(pieces: Pieces) -> list[int]:
    ids: list[int] = []
    for piece in joined([resolve(piece) for piece in pieces]):
      if isinstance(piece, Mark):
        ids.append(known[piece.name])
      else:
        ids += tokenizer.encode(scrub(piece))
    return ids

  return spell


def reader(
    tokenizer: Tokenizer, *, stop: int, tagged: bool, words: Collection[str]
) -> Callable[[Sequence[int]], Utterance]:
  """Makes a function that sets a turn's control tokens apart from its text.

  Args:
    tokenizer: decodes.
    stop: ends a turn.
    tagged: whether the first token may be a control token that says what the
      turn is.
    words: control tokens that a turn may hold anywhere; they appear in the
      text as their names.

  Returns:
    Sampled ids to the utterance.
  """
  names = {
      token: name
      for name, token in tokenizer.special_ids.items()
      if name not in words
  }

  def read(ids: Sequence[int]) -> Utterance:
    ended = len(ids) > 0 and ids[-1] == stop
    rest = list(ids[:-1] if ended else ids)
    tag = names.get(rest[0], "") if tagged and rest else ""
    if tag:
      rest = rest[1:]
    plain, stray = [], []
    for token in rest:
      if token in names:
        stray.append(names[token])
      elif 0 <= token < tokenizer.vocab_size:
        plain.append(token)
      else:
        stray.append(f"token {token}")
    text = tokenizer.decode(plain)
    return Utterance(tag=tag, text=text, ended=ended, stray=tuple(stray))

  return read


def first(tokenizer: Tokenizer) -> list[int]:
  """The beginning of every stream."""
  return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
