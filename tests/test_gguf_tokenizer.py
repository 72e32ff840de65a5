"""Tokenizers out of GGUF files against those that went into them."""

import copy
import functools
import json
import re
import tempfile

import families
import gguf_vocabularies
import pytest
import sentencepiece
import test_family_tokenizers
import tokenizers
from hypothesis import given

from mgrpo_jax.policy.bpe import CONFIG_FILE, DEFINITION_FILE
from mgrpo_jax.policy.load import load_tokenizer
from mgrpo_jax.policy.load.gguf_tokenizer import read_tokenizer

PADDED = 7  # ids that a vocabulary has beyond its tokenizer's
PRE = {"llama": "llama-bpe", "qwen": "qwen2"}
SENTENCEPIECE = {"llama2": families.llama2_model, "gemma": families.gemma_model}
HARD = (
    "I'LL don't I'\u017f\r\n  x\u00a0\u3000\n \n",
    "  1,285,216 km\u00b2 e\u0301 \ufb01 </b>\t\t",
    *families.lines(),
)
every = pytest.mark.parametrize("family", [*PRE, *SENTENCEPIECE])
byte_level = pytest.mark.parametrize("family", PRE)


def size_of(family):
  return families.ALL[family]().vocab_size + PADDED


def definition_of(family):
  return json.loads(families.ALL[family]().files()[DEFINITION_FILE])


def vocabulary(family):
  """What `gguf_vocabularies.add` writes for a family of `families`."""
  tok = families.ALL[family]()
  named = {"bos": tok.bos_id, "eos": tok.eos_id, "pad": tok.pad_id}
  if family in PRE:
    tokens, types, merges = gguf_vocabularies.byte_level(
        definition_of(family), vocab_size=size_of(family)
    )
    rest = {"model": "gpt2", "pre": PRE[family], "merges": merges}
  else:
    controls = (*families.GEMMA_CONTROL, *families.GEMMA_PLAIN)
    shown = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
    names = {name: name in shown for name in controls}
    names |= dict.fromkeys(("<pad>", "<bos>", "<eos>", "<unk>"), True)
    model = SENTENCEPIECE[family]()
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    added = {library.piece_to_id(n): (n, is_it) for n, is_it in names.items()}
    tokens, scores, types = gguf_vocabularies.pieces(
        model,
        vocab_size=size_of(family),
        added=added if family == "gemma" else {},
    )
    rest = {"model": "llama", "scores": scores, "unk": library.unk_id()}
    rest["add_space"] = False if family == "gemma" else None
  return {"tokens": tokens, "types": types, **named, **rest}


@functools.cache
def metadata(family):
  with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
    return gguf_vocabularies.metadata(file.name, **vocabulary(family))


@pytest.fixture
def fields(family):
  return copy.deepcopy(metadata(family))


@every
def test_control_tokens_and_named_ones(family, fields):
  tok, wanted = read_tokenizer(fields, "x.gguf"), families.ALL[family]()
  unused = {
      f"[PAD{i}]": i for i in range(wanted.vocab_size, size_of(family))
  }  # sentencepiece knows by itself that they are not used
  known = unused if family in PRE else {}
  assert dict(tok.special_ids) == {**wanted.special_ids, **known}
  for name in ("eos_id", "pad_id", "bos_id"):
    assert getattr(tok, name) == getattr(wanted, name), name
  assert tok.vocab_size == size_of(family)
  for name in (*wanted.special_ids, *unused):
    assert not set(tok.encode(name)) & {*tok.special_ids.values()}
    assert max(tok.encode(name)) < wanted.vocab_size
    assert tok.decode(tok.encode(name)) == name


@every
def test_hostile_text_has_the_ids_of_the_original(family, fields):
  tok, wanted = read_tokenizer(fields, "x.gguf"), families.ALL[family]()

  @test_family_tokenizers.thorough
  @given(text=test_family_tokenizers.TEXTS)
  def check(text):
    ids = tok.encode(text)
    assert ids == wanted.encode(text)
    assert tok.decode(ids) == wanted.decode(ids)
    assert not set(ids) & set(tok.special_ids.values())

  check()


@every
@pytest.mark.parametrize("text", HARD)
def test_text_has_the_ids_that_the_libraries_give_it(family, fields, text):
  """The libraries find control tokens in text, so names are taken out."""
  tok = read_tokenizer(fields, "x.gguf")
  names = sorted(tok.special_ids, key=len, reverse=True)
  text = re.sub("|".join(map(re.escape, names)), "", text)
  if family in PRE:
    definition = json.dumps(definition_of(family))
    library = tokenizers.Tokenizer.from_str(definition)
    wanted = library.encode(text, add_special_tokens=False).ids
  else:
    model = SENTENCEPIECE[family]()
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    wanted = library.encode(text)
  assert tok.encode(text) == wanted


@every
def test_a_directory_gives_the_same_tokenizer(family, fields, tmp_path):
  tok = read_tokenizer(fields, "x.gguf")
  for name, content in tok.files().items():
    (tmp_path / name).write_bytes(content)
  again = load_tokenizer(tmp_path)
  for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "special_ids"):
    assert getattr(again, field) == getattr(tok, field), field
  for text in HARD:
    assert again.encode(text) == tok.encode(text)


@pytest.mark.parametrize(
    ("family", "begins"),
    [("llama", True), ("qwen", False), ("llama2", True), ("gemma", True)],
)
def test_who_begins_a_sequence(family, fields, begins):
  fields["tokenizer.ggml.bos_token_id"] = token = (
      families.ALL[family]().bos_id or families.ALL[family]().eos_id
  )
  for said in (None, True, False):
    if said is not None:
      fields["tokenizer.ggml.add_bos_token"] = said
    tok = read_tokenizer(fields, "x.gguf")
    added = begins if said is None else said
    assert tok.bos_id == (token if added else None)


@every
def test_the_end_token_pads_where_nothing_does(family, fields):
  del fields["tokenizer.ggml.padding_token_id"]
  tok = read_tokenizer(fields, "x.gguf")
  assert tok.pad_id == tok.eos_id


@pytest.mark.parametrize("family", ["llama2"])
def test_the_space_before_texts_can_be_declined(family, fields):
  fields["tokenizer.ggml.add_space_prefix"] = False
  tok, wanted = read_tokenizer(fields, "x.gguf"), families.llama2()
  assert tok.encode(" user") == wanted.encode("user")
  assert tok.decode(tok.encode(" user")) == " user"


def rename(fields, token, name, kind):
  """Gives a token another name and type; its merges go."""
  fields["tokenizer.ggml.tokens"][token] = name
  fields["tokenizer.ggml.token_type"][token] = kind
  words = {*fields["tokenizer.ggml.tokens"]}
  fields["tokenizer.ggml.merges"] = [
      merge
      for merge in fields["tokenizer.ggml.merges"]
      if {*merge.split(" "), merge.replace(" ", "")} <= words
  ]


@byte_level
def test_user_defined_white_space_stays_ordinary(family, fields):
  rename(fields, 300, "\n\n\n", gguf_vocabularies.USER_DEFINED)
  rename(fields, 301, "<tool_result>", gguf_vocabularies.USER_DEFINED)
  tok = read_tokenizer(fields, "x.gguf")
  assert 300 in tok.encode("a\n\n\nb")
  assert tok.special_ids["<tool_result>"] == 301
  assert 301 not in tok.encode("<tool_result>")


@byte_level
def test_a_word_of_the_vocabulary_ignores_merges_in_llama(family, fields):
  rename(fields, 300, "\u0120zebra", gguf_vocabularies.NORMAL)
  tok = read_tokenizer(fields, "x.gguf")
  assert (tok.encode(" zebra") == [300]) == (family == "llama")


@pytest.mark.parametrize("family", ["gemma"])
def test_the_unknown_token_is_needed(family, fields):
  del fields["tokenizer.ggml.unknown_token_id"]
  with pytest.raises(ValueError, match=r"x: missing .*\.unknown_token_id"):
    read_tokenizer(fields, "x")


@every
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "model = 't5', must be one of"),
        ({"model": [1]}, r"model = \[1\], must be one of"),
        ({"tokens": 7}, "tokens must be a list of str"),
        ({"token_type": "x"}, "token_type must be a list of int"),
        ({"eos_token_id": "x"}, "eos_token_id = 'x', must be an integer"),
        ({"token_type": [1]}, r"token_type has 1 entries, tokens \d+"),
        ({"eos_token_id": 9999}, "eos_token_id = 9999, must be in"),
        ({"eos_token_id": None}, "missing tokenizer.ggml.eos_token_id"),
    ],
)
def test_what_is_refused(family, fields, changes, message):
  changes = {f"tokenizer.ggml.{key}": x for key, x in changes.items()}
  fields = {k: x for k, x in (fields | changes).items() if x is not None}
  with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
    read_tokenizer(fields, "x.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"pre": "tekken"}, "pre = 'tekken', must be one of"),
        ("llama", {"merges": ["t nowhere"]}, "tokenizer: .*nowhere"),
        ("llama", {"eos_token_id": 65}, f"{CONFIG_FILE}: eos_token"),
        ("llama2", {"eos_token_id": 300}, "needs an end token"),
        ("llama2", {"token_type": 2}, "cannot be read"),
        ("llama2", {"token_type": 7}, "enum"),
        ("llama2", {"scores": -1000.0}, "scores are all equal"),
    ],
)
def test_what_a_kind_refuses(family, fields, changes, message):
  for key, value in changes.items():
    name = f"tokenizer.ggml.{key}"
    if isinstance(value, int | float) and not key.endswith("_id"):
      value = [value] * size_of(family)
    fields[name] = value
  with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
    read_tokenizer(fields, "x.gguf")
