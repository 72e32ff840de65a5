"""Tokenizers of model families: text is never structure, nor changed."""

import unicodedata

import families
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo_jax.policy.load import load_tokenizer
from mgrpo_jax.policy.tokenizer import encode_with_specials, is_plain

NAMES = (
    *families.QWEN_SPECIAL,
    *families.QWEN_ADDED,
    *families.LLAMA_SPECIAL,
    *families.GEMMA_CONTROL,
    *families.GEMMA_PLAIN,
    *("<pad>", "<eos>", "<bos>", "<unk>", "<s>", "</s>", "<0x0A>"),
)
TEXTS = st.lists(
    st.one_of(st.sampled_from(NAMES), st.text(max_size=6), st.characters()),
    max_size=8,
).map("".join)
every = pytest.mark.parametrize("family", families.ALL)
thorough = settings(max_examples=300, deadline=None)


@every
@thorough
@given(text=TEXTS)
def test_text_survives_and_is_never_structure(family, text):
  tok = families.ALL[family]()
  ids = tok.encode(text)
  assert not set(ids) & set(tok.special_ids.values())
  written = text.encode("utf-16-le", "surrogatepass").decode(
      "utf-16-le", "replace"
  )
  if family == "qwen":  # its definition normalises
    written = unicodedata.normalize("NFC", written)
  assert tok.decode(ids) == written


@pytest.mark.parametrize(
    ("family", "special"),
    [
        ("qwen", (*families.QWEN_SPECIAL, *families.QWEN_ADDED)),
        ("llama", families.LLAMA_SPECIAL),
        ("llama2", ("<s>", "</s>", "<unk>")),
        ("gemma", ("<bos>", "<unk>", *families.GEMMA_CONTROL)),
        ("gemma_json", ("<bos>", "<unk>", *families.GEMMA_CONTROL)),
    ],
)
def test_control_tokens_are_special_and_spelled_out_in_text(family, special):
  tok = families.ALL[family]()
  assert set(special) <= set(tok.special_ids)
  for name in special:
    assert len(tok.encode(name)) > 1
    assert encode_with_specials(tok, name) == [tok.special_ids[name]]


@pytest.mark.parametrize("family", ["gemma", "gemma_json"])
def test_plain_symbols_of_gemma_stay_ordinary(family):
  tok = families.ALL[family]()
  for name in families.GEMMA_PLAIN:
    assert name not in tok.special_ids
  for text in ("\n\n", "\t", "<table>", "</td>", "\n\n\n"):
    assert len(tok.encode(text)) == 1, text
  assert (tok.pad_id, tok.eos_id, tok.bos_id) == (0, 1, 2)


@thorough
@given(text=TEXTS)
def test_both_forms_of_gemma_agree(text):
  assert families.gemma().encode(text) == families.gemma_json().encode(text)


@thorough
@given(text=TEXTS.filter(lambda text: "\u2581" not in text))
def test_llama2_begins_every_text_with_a_space(text):
  library = sentencepiece.SentencePieceProcessor()
  library.LoadFromSerializedProto(families.llama2_model())
  text = text.encode("utf-16-le", "surrogatepass").decode(
      "utf-16-le", "replace"
  )
  ids = families.llama2().encode(text)
  assert ids == library.encode(text)
  assert families.llama2().decode(ids) == library.decode(ids) == text


def test_the_space_of_llama2_is_no_part_of_the_text():
  tok = families.llama2()
  ids = [tok.bos_id, *tok.encode("user"), tok.eos_id, *tok.encode(" user")]
  assert tok.decode(ids) == "<s>user</s> user"
  assert "".join(map(tok.token_text, tok.encode("a user"))) == " a user"
  assert tok.encode("") == []
  assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 2)


def test_digits_go_by_one_in_qwen_and_by_three_in_llama():
  number = "1285216"
  assert len(families.qwen().encode(number)) == len(number)
  assert families.llama().bos_id == families.llama().special_ids[
      "<|begin_of_text|>"
  ]  # fmt: skip
  assert families.qwen().bos_id is None


def test_a_word_of_the_vocabulary_ignores_merges_in_llama():
  tok = families.llama()
  words = [
      w for w in ("answer", "Ġsystem", "Ġfunction") if tok._inner.token_to_id(w)
  ]
  assert words
  for word in words:
    assert tok.encode(word.replace("Ġ", " ")) == [tok._inner.token_to_id(word)]


@every
def test_a_directory_gives_the_same_tokenizer(family, tmp_path):
  tok = families.ALL[family]()
  for name, content in tok.files().items():
    (tmp_path / name).write_bytes(content)
  again = load_tokenizer(tmp_path)
  for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "special_ids"):
    assert getattr(again, field) == getattr(tok, field), field
  text = "<start_of_turn> <think>\n\n  one <table>"
  assert again.encode(text) == tok.encode(text)


@pytest.mark.parametrize(
    "name", ["\n", "\u2581\u2581", "\t ", "<h1>", "</sub>"]
)
def test_plain_names(name):
  assert is_plain(name)


@pytest.mark.parametrize(
    "name",
    ["<tool_call>", "<unused7>", "[x]", "<h7>", "", "<x>", "<b >", "a"],
)
def test_every_other_name_is_structure(name):
  assert not is_plain(name)
