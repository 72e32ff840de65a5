"""Text while it is sampled: what comes out is what went in, up to a stop."""

import functools
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo_jax.policy.load import load_tokenizer
from mgrpo_jax.serving.text import Cutter, Decoder, Spelling
from mgrpo_jax.testing.tokens import NUM_BYTES, ByteTokenizer

TOKENIZER = ByteTokenizer(("<end>",))
END = TOKENIZER.special_ids["<end>"]


@functools.cache
def words():
  """The quickstart's tokenizer: pieces of words, bytes, control tokens."""
  weights = pathlib.Path(__file__).parents[1] / "configs/quickstart_weights"
  return load_tokenizer(weights / "main")


def spelled(ids, **more):
  spelling = Spelling(
      TOKENIZER.decode,
      **({"stop_ids": (END,), "stops": (), "marks": ()} | more),
  )
  shown = [spelling.push(token) for token in ids]
  return shown, *spelling.flush(), spelling.cut


@given(st.lists(st.integers(0, NUM_BYTES - 1), max_size=40))
def test_any_tokens_decode_as_they_do_together(ids):
  decoder = Decoder(TOKENIZER.decode)
  pieces = [decoder.push(token) for token in ids]
  assert "".join(pieces) + decoder.flush() == TOKENIZER.decode(ids)


@given(st.lists(st.integers(0, 511), max_size=20))
def test_pieces_of_words_do_too(ids):
  tokenizer = words()
  ids = [token % tokenizer.vocab_size for token in ids]
  decoder = Decoder(tokenizer.decode)
  pieces = [decoder.push(token) for token in ids]
  assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@given(st.text(max_size=20))
def test_characters_come_whole_and_at_once(text):
  decoder = Decoder(TOKENIZER.decode)
  for character in (
      text.replace("\ufffd", "").encode("utf-8", "ignore").decode()
  ):
    pieces = [decoder.push(token) for token in TOKENIZER.encode(character)]
    assert pieces == [""] * (len(pieces) - 1) + [character]


@given(
    st.text("ab", max_size=12), st.sets(st.text("ab", min_size=1, max_size=4))
)
def test_stop_texts_cut_as_if_letters_came_one_by_one(text, stops):
  ends = [
      end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))
  ]
  expected = text
  if stops and ends:
    seen = text[: ends[0]]
    expected = seen[: -max(len(s) for s in stops if seen.endswith(s))]
  for size in (1, 2, 5, 12):
    cutter = Cutter(stops)
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    shown = "".join(map(cutter.push, parts)) + cutter.flush()
    assert shown == expected
    assert (cutter.rest is not None) == (shown != text)


def test_nothing_is_held_back_that_cannot_be_a_stop_text():
  cutter = Cutter(("END",))
  pieces = [cutter.push(letter) for letter in "aEbEN."]
  assert pieces == ["a", "", "Eb", "", "", "EN."]


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
