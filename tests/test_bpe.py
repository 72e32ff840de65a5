"""Definitions of the tokenizers library, special tokens taken out."""

import json

import pytest

from mgrpo_jax.policy import bpe
from mgrpo_jax.policy.load import load_tokenizer


def toy_bpe(added, *, ignore_merges=False, config=None):
  vocab = ["a", "b", "c", "Ġ", "<", ">", "ab", "abc", "<a", "<a>"]
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
      "post_processor": None,
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
  tok = toy_bpe({"<eos>": 10, "<a>": 9})
  for name, content in tok.files().items():
    (tmp_path / name).write_bytes(content)
  again = load_tokenizer(tmp_path)
  for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "special_ids"):
    assert getattr(again, field) == getattr(tok, field), field
  assert again.encode(" abc <a> ab") == tok.encode(" abc <a> ab")
  assert again.files() == tok.files()


def test_tokens_are_shown_as_text_or_as_pieces():
  tok = toy_bpe({"<eos>": 10})
  assert "".join(map(tok.token_text, tok.encode("abc a"))) == "abc a"
  assert tok.token_text(10) == "<eos>"


def test_specials_cannot_come_from_a_word_of_the_vocabulary():
  for ignore_merges in (False, True):
    tok = toy_bpe({"<a>": 9}, ignore_merges=ignore_merges)
    assert tok.decode(tok.encode("<a>abc")) == "<a>abc"
    assert 9 not in tok.encode("<a>")
    assert tok.decode([7, 9]) == "abc<a>"


def test_reads_named_tokens_in_both_forms():
  tok = toy_bpe(
      {"<eos>": 10, "<bos>": 11},
      config={
          "eos_token": {"content": "<eos>"},
          "bos_token": "<bos>",
          "add_bos_token": True,
      },
  )
  assert (tok.eos_id, tok.bos_id, tok.pad_id, tok.vocab_size) == (
      10,
      11,
      10,
      12,
  )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "eos_token is missing"),
        ({"eos_token": "<x>"}, "'<x>' is no added token"),
    ],
)
def test_config_errors(config, message):
  with pytest.raises(ValueError, match=message):
    toy_bpe({"<eos>": 10}, config=config)


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
