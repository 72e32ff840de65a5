"""The text of a turn: up to its stop, calls held back."""

import pytest

from mgrpo_jax.serving.text import Spelling
from mgrpo_jax.testing.tokens import ByteTokenizer

TOKENIZER = ByteTokenizer(("<end>",))
END = TOKENIZER.special_ids["<end>"]


def spelled(ids, **more):
  spelling = Spelling(
      TOKENIZER.decode,
      **({"stop_ids": (END,), "stops": (), "marks": ()} | more),
  )
  shown = [spelling.push(token) for token in ids]
  return shown, *spelling.flush(), spelling.cut


def test_a_turn_ends_before_its_stop_token():
  shown, rest, held, cut = spelled([*b"Lima", END])
  assert ("".join(shown), rest, held, cut) == ("Lima", "", "", False)


def test_half_a_character_is_shown_when_nothing_follows():
  shown, rest, _, _ = spelled("é".encode()[:1])
  assert ("".join(shown), rest) == ("", "\ufffd")


def test_a_stop_text_cuts_across_tokens():
  shown, rest, _, cut = spelled(list(b"one, two."), stops=(", t",))
  assert ("".join(shown) + rest, cut) == ("one", True)


@pytest.mark.parametrize(
    ("text", "shown", "held"),
    [
        ("so <tool_call>{}", "so ", "<tool_call>{}"),
        ("so <tool", "so <tool", ""),
        ("plain", "plain", ""),
    ],
)
def test_what_may_be_a_call_is_held(text, shown, held):
  pieces, rest, kept, _ = spelled(text.encode(), marks=("<tool_call>",))
  assert ("".join(pieces) + rest, kept) == (shown, held)
