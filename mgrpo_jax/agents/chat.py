"""Messages to tokens, only ever extending the stream.

A chat format is a value: functions over one tokenizer. Text is encoded piece
by piece between control tokens, so what a page or a user writes can never
become a control token, and nothing already in the stream is encoded again.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mgrpo_jax.agents.protocol import Utterance, scrub


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
    read: sampled ids to the utterance they spell.
    write: utterance to the ids that `read` reads as it, stop id included.
  """

  name: str
  stop_ids: tuple[int, ...]
  open: Callable[[str, str], list[int]]
  extend: Callable[[bool, str], list[int]]
  read: Callable[[Sequence[int]], Utterance]
  write: Callable[[Utterance], list[int]]


def chatml(tokenizer: Tokenizer, *, default_system: str) -> Chat:
  r"""ChatML, the format of SmolLM2 and Qwen.

  A message is `<|im_start|>role\ntext<|im_end|>\n`; a turn is sampled behind
  `<|im_start|>assistant\n`. Results come as messages of the user.

  Args:
    tokenizer: must hold `<|im_start|>` and `<|im_end|>` as control tokens.
    default_system: system message where a call has none; empty for none.

  Returns:
    The chat format.

  Raises:
    ValueError: a control token is missing.
  """
  special = _specials(tokenizer, ("<|im_start|>", "<|im_end|>"), "chatml")
  start, end = special["<|im_start|>"], special["<|im_end|>"]

  def encode(text: str) -> list[int]:
    return tokenizer.encode(scrub(text))

  def message(role: str, text: str) -> list[int]:
    return [start, *encode(f"{role}\n{text}"), end, *encode("\n")]

  def opening(system: str, request: str) -> list[int]:
    system = system or default_system
    head = message("system", system) if system else []
    tail = [start, *encode("assistant\n")]
    return [*_bos(tokenizer), *head, *message("user", request), *tail]

  def extension(ended: bool, result: str) -> list[int]:
    close = [] if ended else [end]
    middle = [*encode("\n"), *message("user", result)]
    return [*close, *middle, start, *encode("assistant\n")]

  def write(utterance: Utterance) -> list[int]:
    return [*encode(utterance.text), end]

  return Chat(
      name="chatml",
      stop_ids=(end,),
      open=opening,
      extend=extension,
      read=_reader(tokenizer, stop=end, tagged=False),
      write=write,
  )


def compact(tokenizer: Tokenizer, *, tags: Sequence[str]) -> Chat:
  """One control token a tag, for small models trained from scratch.

  `<task>request<end>`, then sampled turns `<tag>text<end>`, each followed by
  `<result>text<end>`. A system message, if any, stands before the request.

  Args:
    tokenizer: must hold every tag as a control token.
    tags: what the team needs, `compact.compact_tags(team)`.

  Returns:
    The chat format.

  Raises:
    ValueError: tags are missing from the tokenizer.
  """
  wanted = dict.fromkeys(("<task>", "<result>", "<end>", *tags))
  special = _specials(tokenizer, tuple(wanted), "compact")
  end = special["<end>"]

  def encode(text: str) -> list[int]:
    return tokenizer.encode(scrub(text))

  def opening(system: str, request: str) -> list[int]:
    text = f"{system}\n{request}" if system else request
    return [*_bos(tokenizer), special["<task>"], *encode(text), end]

  def extension(ended: bool, result: str) -> list[int]:
    close = [] if ended else [end]
    return [*close, special["<result>"], *encode(result), end]

  def write(utterance: Utterance) -> list[int]:
    if utterance.tag not in special:
      raise ValueError(
          f"utterance.tag: {utterance.tag!r} is not one of {sorted(special)}"
      )
    return [special[utterance.tag], *encode(utterance.text), end]

  return Chat(
      name="compact",
      stop_ids=(end,),
      open=opening,
      extend=extension,
      read=_reader(tokenizer, stop=end, tagged=True),
      write=write,
  )


def _specials(
    tokenizer: Tokenizer, names: Sequence[str], chat: str
) -> dict[str, int]:
  """Ids of control tokens, raising with all that are missing."""
  known = tokenizer.special_ids
  missing = [name for name in names if name not in known]
  if missing:
    raise ValueError(
        f"tokenizer: lacks the control tokens {missing} of the {chat} chat "
        f"format; it holds {sorted(known)}"
    )
  return {name: known[name] for name in names}


def _bos(tokenizer: Tokenizer) -> list[int]:
  """The beginning of every stream."""
  return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _reader(
    tokenizer: Tokenizer, *, stop: int, tagged: bool
) -> Callable[[Sequence[int]], Utterance]:
  """A function that sets the control tokens of a turn apart from its text."""
  names = {token: name for name, token in tokenizer.special_ids.items()}

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
