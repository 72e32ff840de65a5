"""Gemma 3."""

from mgrpo_jax.agents.chat import Chat, Tokenizer, reader, specials, speller
from mgrpo_jax.agents.protocol import Mark, Pieces, spelled, trimmed

_BOS, _START, _END = "<bos>", "<start_of_turn>", "<end_of_turn>"


def gemma3(tokenizer: Tokenizer) -> Chat:
  r"""Gemma 3: `<start_of_turn>role\ntext<end_of_turn>\n`, user and model.

  There is no system role: the system message, an empty line and the request
  are the first message of the user. There are no tools either: results come
  as messages of the user. Messages lose the white space around them.

  Deviation: a sampled turn keeps the white space around it, which the template
  would trim.

  Args:
    tokenizer: must hold `<bos>`, `<start_of_turn>` and `<end_of_turn>` as
      control tokens.

  Returns:
    The chat format.

  Raises:
    ValueError: a control token is missing.
  """
  special = specials(tokenizer, (_BOS, _START, _END), "gemma3")
  end = special[_END]
  spell = speller(tokenizer)
  prompt: Pieces = (Mark(_START), "model\n")

  def message(pieces: Pieces) -> Pieces:
    return (Mark(_START), "user\n", *pieces, Mark(_END), "\n")

  def opening(system: Pieces, request: str) -> list[int]:
    head = (*system, "\n\n") if spelled(system) else ()
    ask = message((*head, request.strip()))
    return spell((Mark(_BOS), *ask, *prompt))

  def extension(ended: bool, result: Pieces) -> list[int]:
    close = [] if ended else [end]
    return [*close, *spell(("\n", *message(trimmed(result)), *prompt))]

  def write(pieces: Pieces) -> list[int]:
    return [*spell(trimmed(pieces)), end]

  return Chat(
      name="gemma3",
      stop_ids=(end,),
      open=opening,
      extend=extension,
      ask=extension,
      read=reader(tokenizer, stop=end, tagged=False, words=()),
      write=write,
  )
