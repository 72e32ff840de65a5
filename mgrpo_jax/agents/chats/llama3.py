"""Llama 3 and 3.1 to 3.3."""

import functools
from collections.abc import Callable

from mgrpo_jax.agents.chat import Chat, Tokenizer, reader, specials, speller
from mgrpo_jax.agents.protocol import Mark, Pieces, spelled, trimmed

# The date that the template of 3.1 gives where nobody else gives one.
TEMPLATE_DATE = "26 Jul 2024"

_BOS, _END = "<|begin_of_text|>", "<|eot_id|>"
_OPEN, _CLOSE = "<|start_header_id|>", "<|end_header_id|>"
_DATES = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
_TOOLS = "Environment: ipython\n"


def llama3(tokenizer: Tokenizer) -> Chat:
  r"""Llama 3.0: `<|start_header_id|>role<|end_header_id|>\n\ntext<|eot_id|>`.

  Results come as messages of the user. Messages lose the white space around
  them.

  Deviation: a sampled turn keeps the white space around it, which the template
  would trim.

  Args:
    tokenizer: must hold `<|begin_of_text|>`, `<|start_header_id|>`,
      `<|end_header_id|>` and `<|eot_id|>` as control tokens.

  Returns:
    The chat format.

  Raises:
    ValueError: a control token is missing.
  """
  return _llama3(tokenizer, name="llama3", about=trimmed, result_role="user")


def llama3_1(tokenizer: Tokenizer, *, date: str) -> Chat:
  """Llama 3.1 to 3.3: every system message begins with two dates.

  Otherwise, and in its deviation, as `llama3`.

  Args:
    tokenizer: as for `llama3`.
    date: today's, such as `26 Jul 2024`; the same in all of a run.

  Returns:
    The chat format.

  Raises:
    ValueError: a control token is missing.
  """

  def about(system: Pieces) -> Pieces:
    return (_DATES.format(date=date), *trimmed(system))

  return _llama3(tokenizer, name="llama3_1", about=about, result_role="user")


def llama3_1_tools(tokenizer: Tokenizer, *, date: str) -> Chat:
  """Llama 3.1 to 3.3 with its own tool calls, for the protocol `llama`.

  The system message names the environment `ipython`, and results come as its
  messages: the template with tools and `tools_in_user_message=False`.

  Deviation: as `llama3`; and the environment is named to a role without
  functions too.

  Args:
    tokenizer: as for `llama3`.
    date: as for `llama3_1`.

  Returns:
    The chat format.

  Raises:
    ValueError: a control token is missing.
  """

  def about(system: Pieces) -> Pieces:  # the protocol has trimmed the prompt
    return (_TOOLS + _DATES.format(date=date), *system)

  return _llama3(
      tokenizer, name="llama3_1_tools", about=about, result_role="ipython"
  )


def _llama3(
    tokenizer: Tokenizer,
    *,
    name: str,
    about: Callable[[Pieces], Pieces],
    result_role: str,
) -> Chat:
  """Llama 3, given what the system message says and who brings results."""
  special = specials(tokenizer, (_BOS, _OPEN, _CLOSE, _END), name)
  end = special[_END]
  spell = speller(tokenizer)

  def head(role: str) -> Pieces:
    return (Mark(_OPEN), role, Mark(_CLOSE), "\n\n")

  def message(role: str, pieces: Pieces) -> Pieces:
    return (*head(role), *pieces, Mark(_END))

  def opening(system: Pieces, request: str) -> list[int]:
    text = about(system)
    told = message("system", text) if spelled(text) else ()
    ask = message("user", request.strip())
    return spell((Mark(_BOS), *told, *ask, *head("assistant")))

  def extension(role: str, ended: bool, pieces: Pieces) -> list[int]:
    close = [] if ended else [end]
    told = message(role, trimmed(pieces))
    return [*close, *spell((*told, *head("assistant")))]

  def write(pieces: Pieces) -> list[int]:
    return [*spell(trimmed(pieces)), end]

  return Chat(
      name=name,
      stop_ids=(end,),
      open=opening,
      extend=functools.partial(extension, result_role),
      ask=functools.partial(extension, "user"),
      read=reader(tokenizer, stop=end, tagged=False, words=()),
      write=write,
  )
