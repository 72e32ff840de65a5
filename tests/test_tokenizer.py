"""Round trips, determinism, and text that tries to be structure."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from mgrpo_jax.policy import tokenizer
from mgrpo_jax.policy.load import load_tokenizer

SPECIALS = ("<task>", "<result>", "<end>", "<answer>", "the", "<| x |>", "né")
RESERVED = ("<pad>", "<unk>", "<eos>", "<0x41>", "<s>", "</s>")
HARD = (
    "",
    " ",
    "   ",
    "  two leading, two trailing  ",
    "\n\n a \n",
    "\t\r\n\x00\x1b\x7f",
    "\u2581 and \u2581\u2581",
    "\u2047 \ufffd \ufeff \u200b\u00a0\u3000",
    "e\u0301 is not \u00e9, \ufb01 is not fi",
    "日本語 العربية 🙂👨‍👩‍👧",
    "\U0010ffff\U000f0000",
    "<0x0A><unk><pad>",
)


def lines():
  syllables = ("lima", "qui", "tos", "bogotá", "paz", "the")
  words = map("".join, itertools.product(syllables, repeat=3))
  return [f"{word} of {word[::-1]}; no. 12" for word in words]


@functools.cache
def pieces(vocab_size=340):
  model = tokenizer.train_sentencepiece(
      lines(), vocab_size=vocab_size, special_tokens=SPECIALS
  )
  return tokenizer.SentencePieceTokenizer(model)


# Texts made of names of special tokens, pieces of them and anything else.
injections = st.lists(
    st.one_of(
        st.sampled_from(SPECIALS + RESERVED + HARD + ("Lima",)),
        st.text(max_size=6),
        st.characters(),
    ),
    max_size=8,
).map("".join)
fast = hypothesis.settings(
    max_examples=300, deadline=None, derandomize=True, database=None
)


@pytest.mark.parametrize("text", HARD)
def test_sentencepiece_round_trip_of_hard_texts(text):
  assert pieces().decode(pieces().encode(text)) == text


@fast
@hypothesis.given(injections)
def test_sentencepiece_text_survives_and_is_never_structure(text):
  ids = pieces().encode(text)
  assert pieces().decode(ids) == text
  assert not set(ids) & set(pieces().special_ids.values())


def test_special_names_in_text_are_spelled_out():
  tok = pieces()
  for name in SPECIALS:
    ids = tok.encode(name)
    assert tok.special_ids[name] not in ids
    assert tok.decode(ids) == name
    assert tokenizer.encode_with_specials(tok, name) == [tok.special_ids[name]]


def test_unpaired_surrogates_become_replacement_characters():
  tok = pieces()
  assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
  assert tok.decode(tok.encode("\ud83d\ude42")) == "🙂"


def test_template_parses_specials_and_keeps_text_between():
  tok = pieces()
  ids = tokenizer.encode_with_specials(tok, "<task>  the Lima <end>")
  assert ids[0] == tok.special_ids["<task>"]
  assert ids[-1] == tok.special_ids["<end>"]
  assert tok.special_ids["the"] in ids  # a template may name any special
  assert tok.decode(ids) == "<task>  the Lima <end>"


def test_sentencepiece_ids_and_size():
  tok = pieces()
  assert tok.vocab_size == 340
  assert (tok.pad_id, tok.eos_id, tok.bos_id) == (0, 2, None)
  names = ("<pad>", "<unk>", "<eos>", *SPECIALS)
  assert dict(tok.special_ids) == {name: i for i, name in enumerate(names)}


def test_sentencepiece_learns_pieces_of_words():
  text = "limaquitos of bogotálima"
  assert len(pieces().encode(text)) < 0.6 * len(text)


def test_sentencepiece_never_joins_digits():
  numbers = [f"19{a}{b} {b}" for a in "015" for b in range(10, 99)]
  words = [
      f"{word} {n}"
      for word, n in zip(lines(), itertools.cycle(numbers), strict=False)
  ]
  model = tokenizer.train_sentencepiece(
      words + numbers * 20, vocab_size=340, special_tokens=()
  )
  tok = tokenizer.SentencePieceTokenizer(model)
  assert len(tok.encode("1915 2016")) == 9


def test_training_is_deterministic():
  again = tokenizer.train_sentencepiece(
      iter(lines()), vocab_size=340, special_tokens=SPECIALS
  )
  assert pieces().files() == {"tokenizer.model": again}


def test_token_text_shows_text_names_and_bytes():
  tok = pieces()
  assert tok.token_text(tok.special_ids["<end>"]) == "<end>"
  assert [tok.token_text(i) for i in tok.encode("ü")] == ["<0xC3>", "<0xBC>"]
  assert "".join(map(tok.token_text, tok.encode("La Paz\n"))) == "La Paz\n"


def test_decode_shows_broken_bytes_and_unknown_ids_are_errors():
  tok = pieces()
  first, second = tok.encode("ü")
  assert tok.decode([first, tok.eos_id, second]) == "\ufffd<eos>\ufffd"
  for wrong in (-1, tok.vocab_size):
    with pytest.raises(ValueError, match=f"token id {wrong}"):
      tok.decode([wrong])


@pytest.mark.parametrize("names", [["<pad>"], ["<0x41>"], ["x"], ["ab", "ab"]])
def test_wrong_special_names_are_errors(names):
  with pytest.raises(ValueError, match="special_tokens"):
    tokenizer.train_sentencepiece(lines(), vocab_size=340, special_tokens=names)


@pytest.mark.parametrize("size", [200, 100_000])
def test_impossible_vocabulary_is_an_error(size):
  with pytest.raises(ValueError, match=f"vocab_size {size}"):
    tokenizer.train_sentencepiece(lines(), vocab_size=size, special_tokens=[])


def test_models_that_change_text_are_refused(tmp_path):
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines()),
      model_prefix=str(tmp_path / "other"),
      vocab_size=330,
      byte_fallback=True,
      pad_id=3,
      minloglevel=2,
  )
  with pytest.raises(ValueError, match="changes text"):
    tokenizer.SentencePieceTokenizer((tmp_path / "other.model").read_bytes())


def test_unreadable_models_are_errors(tmp_path):
  with pytest.raises(ValueError, match="cannot be read"):
    tokenizer.SentencePieceTokenizer(b"abc")
  model = pieces().files()["tokenizer.model"]
  (tmp_path / "tokenizer.model").write_bytes(model[: len(model) // 2])
  with pytest.raises(ValueError, match=str(tmp_path)):
    load_tokenizer(tmp_path)


def test_a_directory_gives_the_same_tokenizer(tmp_path):
  for name, content in pieces().files().items():
    (tmp_path / name).write_bytes(content)
  again = load_tokenizer(tmp_path)
  for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "special_ids"):
    assert getattr(again, field) == getattr(pieces(), field), field
  assert again.encode("La Paz <end>") == pieces().encode("La Paz <end>")
  assert again.files() == pieces().files()


def test_directory_without_tokenizer(tmp_path):
  assert load_tokenizer(tmp_path) is None
