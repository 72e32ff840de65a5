"""Tokens to text one by one: what comes out is what went in, up to a stop."""

import functools
import pathlib

from hypothesis import given
from hypothesis import strategies as st

from mgrpo_jax.policy.load import load_tokenizer
from mgrpo_jax.sampler.spelling import Cutter, Decoder, until_text
from mgrpo_jax.testing.tokens import NUM_BYTES, ByteTokenizer

TOKENIZER = ByteTokenizer(("<end>",))


@functools.cache
def words():
  """The quickstart's tokenizer: pieces of words, bytes, control tokens."""
  weights = pathlib.Path(__file__).parents[1] / "configs/quickstart_weights"
  return load_tokenizer(weights / "main")


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


@given(
    st.text("aé€", max_size=12),
    st.sets(st.text("aé€", min_size=1, max_size=3), min_size=1),
)
def test_the_last_token_is_the_first_to_complete_a_stop_text(text, stops):
  ids = TOKENIZER.encode(text)
  ends = until_text(TOKENIZER.decode, stops)
  told = [ends(token) for token in ids]
  complete = [
      any(stop in TOKENIZER.decode(ids[: n + 1]) for stop in stops)
      for n in range(len(ids))
  ]
  assert told == complete
