"""Definitions of the tokenizers library, special tokens taken out."""

import json

import pytest

from mgrpo_jax.policy import bpe, tokenizer
from mgrpo_jax.policy.load import load_tokenizer


def toy_bpe(added, *, ignore_merges=False, config=None, post_processor=None):
  vocab = ["a", "b", "c", "Ġ", "<", ">", "ab", "abc", "<a", "<a>", "ba"]
  fields = {
      "version": "1.0",
      "added_tokens": [
          {
              "id": i,
              "content": t,
              "single_word": False,
              "lstrip": False,
              "rstrip": False,
              "normalized": False,
              "special": True,
          }
          for t, i in added.items()
      ],
      "normalizer": None,
      "pre_tokenizer": {
          "type": "ByteLevel",
          "add_prefix_space": False,
          "trim_offsets": True,
          "use_regex": True,
      },
      "post_processor": post_processor,
      "decoder": {
          "type": "ByteLevel",
          "add_prefix_space": False,
          "trim_offsets": True,
          "use_regex": True,
      },
      "model": {
          "type": "BPE",
          "vocab": {t: i for i, t in enumerate(vocab)},
          "merges": [["a", "b"], ["ab", "c"]],
          "ignore_merges": ignore_merges,
      },
  }
  config = {"eos_token": next(iter(added))} if config is None else config
  return bpe.BPETokenizer(json.dumps(fields), config)


def test_a_directory_gives_the_same_tokenizer(tmp_path):
  tok = toy_bpe({"<eos>": 11, "<a>": 9})
  for name, content in tok.files().items():
    (tmp_path / name).write_bytes(content)
  again = load_tokenizer(tmp_path)
  for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "special_ids"):
    assert getattr(again, field) == getattr(tok, field), field
  assert again.encode(" abc <a> ab") == tok.encode(" abc <a> ab")
  assert again.files() == tok.files()


def test_tokens_are_shown_as_text_or_as_pieces():
  tok = toy_bpe({"<eos>": 11})
  assert "".join(map(tok.token_text, tok.encode("abc a"))) == "abc a"
  assert tok.token_text(11) == "<eos>"


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_specials_cannot_come_from_a_word_of_the_vocabulary(ignore_merges):
  tok = toy_bpe({"ba": 10, "<a>": 9}, ignore_merges=ignore_merges)
  assert tok.encode("ba") == [1, 0]
  assert tok.decode(tok.encode("<a>abc ba")) == "<a>abc ba"
  assert not {9, 10} & set(tok.encode("<a>abc ba"))
  assert tok.decode([7, 9]) == "abc<a>"


def test_merges_that_spell_a_special_token_are_left_out():
  assert toy_bpe({"<eos>": 11}).encode("abc") == [7]
  assert toy_bpe({"abc": 7}).encode("abc") == [6, 2]
  assert toy_bpe({"ab": 6}).encode("abc") == [0, 1, 2]


def test_templates_take_the_longest_name():
  tok = toy_bpe({"<a": 8, "<a>": 9})
  assert tokenizer.encode_with_specials(tok, "a<a>b<ab") == [0, 9, 1, 8, 1]


def test_named_tokens_in_both_forms():
  config = {
      "eos_token": {"content": "<eos>"},
      "bos_token": "<bos>",
      "pad_token": "<pad>",
      "add_bos_token": True,
  }
  added = {"<eos>": 11, "<bos>": 12, "<pad>": 13}
  tok = toy_bpe(added, config=config)
  assert (tok.eos_id, tok.bos_id, tok.pad_id) == (11, 12, 13)
  assert tok.vocab_size == 14
  silent = toy_bpe(added, config=config | {"add_bos_token": False})
  assert silent.bos_id is None
  no_pad = toy_bpe(added, config=config | {"pad_token": None})
  assert no_pad.pad_id == 11


@pytest.mark.parametrize("bos", ["<bos>", {"content": "<bos>"}])
def test_a_template_that_begins_with_bos_adds_it(bos):
  config = {"eos_token": "<eos>", "bos_token": bos}
  added = {"<eos>": 11, "<bos>": 12}
  template = {
      "type": "TemplateProcessing",
      "single": [
          {"SpecialToken": {"id": "<bos>", "type_id": 0}},
          {"Sequence": {"id": "A", "type_id": 0}},
      ],
  }
  assert toy_bpe(added, config=config).bos_id is None
  tok = toy_bpe(added, config=config, post_processor=template)
  assert tok.bos_id == 12
  assert tok.encode("a") == [0]  # whoever makes a stream puts it there


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "eos_token is missing"),
        ({"eos_token": "<x>"}, "'<x>' is no added token"),
    ],
)
def test_config_errors(config, message):
  with pytest.raises(ValueError, match=message):
    toy_bpe({"<eos>": 11}, config=config)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model": {"type": "BPE"}}']
)
def test_definition_errors(text):
  with pytest.raises(ValueError, match=r"tokenizer\.json"):
    bpe.BPETokenizer(text, {"eos_token": "<eos>"})


def test_without_its_config_is_an_error(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
    load_tokenizer(tmp_path)


def changed(model=None, **changes):
  """The toy's definition with some of its fields replaced."""
  fields = json.loads(toy_bpe({"<eos>": 11}).files()["tokenizer.json"])
  fields = fields | changes
  fields["model"] = model if model == 3 else fields["model"] | (model or {})
  return bpe.BPETokenizer(json.dumps(fields), {"eos_token": "<eos>"})


def test_text_is_neither_cut_nor_filled_up():
  cut = {
      "direction": "Right",
      "max_length": 2,
      "strategy": "LongestFirst",
      "stride": 0,
  }
  fill = {
      "strategy": {"Fixed": 9},
      "direction": "Right",
      "pad_to_multiple_of": None,
      "pad_id": 0,
      "pad_type_id": 0,
      "pad_token": "a",
  }
  tok = changed(truncation=cut, padding=fill)
  assert tok.encode("cbcbc") == [2, 1, 2, 1, 2]


def added(*tokens):
  return [
      {"id": i, "content": name, "special": True, "normalized": False}
      | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
      for name, i in tokens
  ]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([("<eos>", 11), ("<x>", 5)], "'<x>' and '>' have id 5"),
        ([("<eos>", 11), ("<x>", 11)], "'<eos>' and '<x>' have id 11"),
        ([("<eos>", 11), ("<eos>", 12)], "a token is there twice"),
        ([("<eos>", 11), ("ab", 12)], "'ab' has ids 6 and 12"),
        ([("<eos>", -1)], "'<eos>' has id -1"),
        ([("<eos>", "x")], "id an integer"),
        ([(3, 3)], "content must be text"),
    ],
)
def test_special_ids_that_text_could_become(tokens, message):
  with pytest.raises(ValueError, match=message):
    changed(added_tokens=added(*tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model.type must be 'BPE'"),
        ({"model": {"merges": None}}, "merges must be pairs"),
        ({"model": {"merges": ["a b c"]}}, "merges must be pairs"),
        ({"model": {"unk_token": ["a"]}}, "cannot be read"),
        ({"added_tokens": [None]}, "with added_tokens"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer changes text"),
        ({"normalizer": {"type": "NFD"}}, "normalizer changes text"),
    ],
)
def test_definitions_that_are_no_tokenizer(changes, message):
  with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}"):
    changed(**changes)


def test_named_tokens_must_be_text():
  with pytest.raises(ValueError, match=r"eos_token \['a'\] is no added token"):
    toy_bpe({"<eos>": 11}, config={"eos_token": ["a"]})


def test_a_definition_that_is_nested_too_deeply():
  with pytest.raises(ValueError, match="tokenizer.json: must be a JSON"):
    bpe.BPETokenizer("[" * 100_000, {"eos_token": "<eos>"})
