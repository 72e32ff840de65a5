"""ChatML, the format of SmolLM2 and Qwen, and what Qwen 3 makes of it."""

from collections.abc import Callable, Sequence

from mgrpo_jax.agents.chat import (
    Chat,
    Tokenizer,
    first,
    reader,
    specials,
    speller,
)
from mgrpo_jax.agents.protocol import Mark, Pieces, Utterance, spelled

_START, _END = "<|im_start|>", "<|im_end|>"
_THINK, _UNTHINK = "<think>", "</think>"
_EMPTY_THOUGHT: Pieces = (Mark(_THINK), "\n\n", Mark(_UNTHINK), "\n\n")
_WORDS = ("<tool_call>", "</tool_call>")  # control tokens of Qwen 2.5 and 3


def chatml(tokenizer: Tokenizer, *, default_system: str) -> Chat:
  r"""ChatML, the format of SmolLM2, Qwen 2.5 and Qwen 3 Instruct 2507.

  A message is `<|im_start|>role\ntext<|im_end|>\n`; a turn is sampled behind
  `<|im_start|>assistant\n`. Results come as messages of the user. Under the
  hermes protocol the stream is what these models' templates make of system
  message, tools, tool calls and tool results.

  Args:
    tokenizer: must hold `<|im_start|>` and `<|im_end|>` as control tokens.
    default_system: system message where a call has none; empty for none.

  Returns:
    The chat format.

  Raises:
    ValueError: a control token is missing.
  """
  return _chatml(
      tokenizer, name="chatml", default_system=default_system, lead=()
  )


def qwen3(tokenizer: Tokenizer) -> Chat:
  r"""Qwen 3, thinking: ChatML whose turns may begin with their reasoning.

  A turn is `<think>\nreasoning\n</think>\n\ntext<|im_end|>`; what it means is
  in the text, the reasoning is only read over. Reasoning that does not end is
  a stray control token.

  Deviation: the template drops the reasoning before the last request, adds an
  empty one to a last turn that has none, and trims line ends around reasoning
  and text. Here the stream keeps what was sampled. A call has one request, and
  wrapped results are no requests to the template, so for turns written as above
  both give the same tokens.

  Args:
    tokenizer: must hold the control tokens of ChatML, `<think>`, `</think>`.

  Returns:
    The chat format.

  Raises:
    ValueError: a control token is missing.
  """
  special = specials(tokenizer, (_THINK, _UNTHINK), "qwen3")
  start, end = special[_THINK], special[_UNTHINK]

  def said(ids: Sequence[int]) -> Sequence[int]:
    reasons = len(ids) > 0 and ids[0] == start and end in ids
    return ids[list(ids).index(end) + 1 :] if reasons else ids

  return _chatml(tokenizer, name="qwen3", default_system="", lead=(), said=said)


def qwen3_direct(tokenizer: Tokenizer) -> Chat:
  r"""Qwen 3, not thinking: every turn is sampled behind an empty reasoning.

  The template's `enable_thinking=False`: `<think>\n\n</think>\n\n` follows
  `<|im_start|>assistant\n` and belongs to the prompt.

  Deviation: the template leaves this out again where results follow the turn,
  so that its prompts do not extend each other. Here it stays, and the last
  turn alone is as the template has it.

  Args:
    tokenizer: must hold the control tokens of ChatML, `<think>`, `</think>`.

  Returns:
    The chat format.

  Raises:
    ValueError: a control token is missing.
  """
  specials(tokenizer, (_THINK, _UNTHINK), "qwen3_direct")
  return _chatml(
      tokenizer, name="qwen3_direct", default_system="", lead=_EMPTY_THOUGHT
  )


def _all(ids: Sequence[int]) -> Sequence[int]:
  """The whole turn."""
  return ids


def _chatml(
    tokenizer: Tokenizer,
    *,
    name: str,
    default_system: str,
    lead: Pieces,
    said: Callable[[Sequence[int]], Sequence[int]] = _all,
) -> Chat:
  """ChatML with something in front of every turn and a part of it to read."""
  special = specials(tokenizer, (_START, _END), name)
  end = special[_END]
  spell = speller(tokenizer)
  understand = reader(tokenizer, stop=end, tagged=False, words=_WORDS)
  prompt: Pieces = (Mark(_START), "assistant\n", *lead)

  def message(role: str, pieces: Pieces) -> Pieces:
    return (Mark(_START), f"{role}\n", *pieces, Mark(_END), "\n")

  def opening(system: Pieces, request: str) -> list[int]:
    system = system if spelled(system) else default_system
    head = message("system", system) if system else ()
    ids = spell((*head, *message("user", request), *prompt))
    return [*first(tokenizer), *ids]

  def extension(ended: bool, result: Pieces) -> list[int]:
    close = [] if ended else [end]
    return [*close, *spell(("\n", *message("user", result), *prompt))]

  def read(ids: Sequence[int]) -> Utterance:
    return understand(said(ids))

  def write(pieces: Pieces) -> list[int]:
    return [*spell(pieces), end]

  return Chat(
      name=name,
      stop_ids=(end,),
      open=opening,
      extend=extension,
      ask=extension,
      read=read,
      write=write,
  )
