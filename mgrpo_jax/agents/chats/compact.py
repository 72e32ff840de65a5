"""The compact chat format, for small models trained from scratch."""

from collections.abc import Sequence

from mgrpo_jax.agents.chat import (
    Chat,
    Tokenizer,
    first,
    reader,
    specials,
    speller,
)
from mgrpo_jax.agents.protocol import Mark, Pieces, spelled


def compact(tokenizer: Tokenizer, *, tags: Sequence[str]) -> Chat:
  """One control token a tag.

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
  special = specials(tokenizer, tuple(wanted), "compact")
  end = special["<end>"]
  spell = speller(tokenizer)

  def opening(system: Pieces, request: str) -> list[int]:
    head = (*system, "\n") if spelled(system) else ()
    ids = [special["<task>"], *spell((*head, request)), end]
    return [*first(tokenizer), *ids]

  def extension(ended: bool, result: Pieces) -> list[int]:
    close = [] if ended else [end]
    return [*close, special["<result>"], *spell(result), end]

  def write(pieces: Pieces) -> list[int]:
    tag = pieces[0] if pieces else ""
    if not isinstance(tag, Mark) or tag.name not in special:
      raise ValueError(
          f"pieces: begin with {tag!r}, must with a mark of {sorted(special)}"
      )
    return [*spell(pieces), end]

  return Chat(
      name="compact",
      stop_ids=(end,),
      open=opening,
      extend=extension,
      ask=extension,
      read=reader(tokenizer, stop=end, tagged=True, words=()),
      write=write,
  )
