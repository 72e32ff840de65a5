"""GGUF files written here by hand, read by the package."""

import dataclasses

import gguf
import gguf_vocabularies
import jax
import numpy as np
import pytest
import test_gguf_tokenizer
import test_scalings
import tiny_llama

from mgrpo_jax.policy import transformer
from mgrpo_jax.policy.load import load, save_directory
from mgrpo_jax.policy.policy import SYSTEMS
from mgrpo_jax.policy.rotary import Llama3Scaling

TINY = tiny_llama.config(
    vocab_size=300, embed_dim=64, head_dim=16, mlp_dim=96, rope_base=10000.0
)
UNTIED = dataclasses.replace(TINY, tied_embeddings=False)


def assert_same_params(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


def words_of(config):
  """A vocabulary of one merge."""
  words = ["<|im_end|>", "t", "1"]
  words += [f"t{i}" for i in range(config.vocab_size - len(words))]
  return {
      "model": "gpt2",
      "pre": "smollm",
      "tokens": words,
      "types": [3] + [1] * (len(words) - 1),
      "merges": ["t 1"],
      "eos": 0,
  }


def write_gguf(
    path,
    config,
    weights,
    *,
    types=None,
    fields=None,
    drop=(),
    tensors=None,
    vocabulary=None,
):
  """Writes as llama.cpp's converter does: queries and keys interleaved."""
  types, fields = types or {}, fields or {}
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(config.num_layers)
  writer.add_embedding_length(config.embed_dim)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  if "rope.freq_base" not in drop:
    writer.add_rope_freq_base(config.rope_base)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  gguf_vocabularies.add(writer, **words_of(config) | (vocabulary or {}))
  for key, value in fields.items():
    writer.add_string(key, value)
  written = gguf_tensors(config, weights) | (tensors or {})
  for name, matrix in written.items():
    if name in drop:
      continue
    kind = types.get(name, gguf.GGMLQuantizationType.F32)
    if matrix.dtype != np.uint8:  # else blocks, as they are
      matrix = gguf.quants.quantize(matrix, kind)
    writer.add_tensor(name, matrix, raw_dtype=kind)
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
def test_round_trip(config, tmp_path):
  weights = tiny_llama.weights(config)
  write_gguf(tmp_path / "tiny.gguf", config, weights)
  loaded = load(tmp_path / "tiny.gguf")
  assert loaded.config == dataclasses.replace(
      config, norm_eps=float(np.float32(config.norm_eps))
  )
  assert_same_params(loaded.params, weights)
  assert loaded.chat is None


@pytest.mark.parametrize(
    ("template", "system"),
    [
        *((f"{{{{ '{known}' }}}}", known) for known in SYSTEMS),
        ("{{ 'You are Qwen' }}", ""),
    ],
)
def test_a_template_gives_its_own_system_message(template, system, tmp_path):
  fields = {"tokenizer.chat_template": template}
  weights = tiny_llama.weights(TINY)
  write_gguf(tmp_path / "tiny.gguf", TINY, weights, fields=fields)
  assert load(tmp_path / "tiny.gguf").system == system


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
)
def test_quantised_tensors(kind, tmp_path):
  kind = gguf.GGMLQuantizationType[kind]
  name = "blk.1.attn_v.weight"
  weights = tiny_llama.weights(TINY)
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


def q4_k(rng):
  """A block of 256 numbers, d s q - m n, as bytes and as numbers."""
  d, least = np.float16([0.01, 0.02])
  scales, mins = rng.integers(64, size=(2, 8))
  numbers = rng.integers(16, size=(8, 32))
  low = [scales[j] | (scales[j + 4] >> 4) << 6 for j in range(4)]
  low += [mins[j] | (mins[j + 4] >> 4) << 6 for j in range(4)]
  rest = [scales[j] & 15 | (mins[j] & 15) << 4 for j in range(4, 8)]
  nibbles = numbers[0::2] | numbers[1::2] << 4
  block = np.float16([d, least]).tobytes()
  block += np.uint8([*low, *rest]).tobytes() + nibbles.astype("u1").tobytes()
  values = np.float32(d) * scales[:, None] * numbers
  return block, (values - np.float32(least) * mins[:, None]).ravel()


def q6_k(rng):
  """A block of 256 numbers, d s (q - 32), as bytes and as numbers."""
  d = np.float16(0.01)
  scales = rng.integers(-128, 128, size=16)
  numbers = rng.integers(64, size=(2, 4, 32))
  low, high = numbers & 15, numbers >> 4
  halves = np.stack([low[:, 0] | low[:, 2] << 4, low[:, 1] | low[:, 3] << 4], 1)
  packed = sum(high[:, place] << 2 * place for place in range(4))
  block = halves.astype("u1").tobytes() + packed.astype("u1").tobytes()
  block += scales.astype("i1").tobytes() + d.tobytes()
  values = np.float32(d) * scales[:, None] * (numbers.reshape(16, 16) - 32)
  return block, values.ravel()


@pytest.mark.parametrize(("kind", "make"), [("Q4_K", q4_k), ("Q6_K", q6_k)])
def test_blocks_of_256_by_hand(kind, make, tmp_path):
  config = tiny_llama.config(embed_dim=256)
  width = config.num_kv_heads * config.head_dim
  made = [make(np.random.default_rng(row)) for row in range(width)]
  name = "blk.0.attn_v.weight"
  write_gguf(
      tmp_path / "tiny.gguf",
      config,
      tiny_llama.weights(config),
      types={name: gguf.GGMLQuantizationType[kind]},
      tensors={name: np.stack([np.frombuffer(b, np.uint8) for b, _ in made])},
  )
  loaded = load(tmp_path / "tiny.gguf").params.layers[0].value
  wanted = np.stack([values for _, values in made]).T.reshape(loaded.shape)
  np.testing.assert_allclose(loaded, wanted, rtol=1e-5, atol=1e-6)


def test_truncated_anywhere(tmp_path):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, TINY, tiny_llama.weights(TINY))
  whole = path.read_bytes()
  cuts = np.linspace(0, len(whole) - 1, 40).astype(int)
  for cut in {*cuts.tolist(), 4, 8, 23, 24, 30, 100, 1000}:
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"tiny\.gguf: truncated or not"):
      load(path)


def test_tensor_errors_are_listed_together(tmp_path):
  path = tmp_path / "tiny.gguf"
  larger = dataclasses.replace(TINY, num_layers=3, tied_embeddings=False)
  weights = tiny_llama.weights(larger)
  wrong = weights.replace(final_norm=weights.final_norm[:32])
  drop = ("blk.0.ffn_up.weight", "blk.1.attn_q.weight")
  write_gguf(path, larger, wrong, drop=drop)
  with pytest.raises(ValueError) as caught:
    load(path)
  message = str(caught.value)
  for name in drop:
    assert f"missing {name}" in message
  assert "output_norm.weight has shape (32,), not (64,)" in message


def test_unexpected_tensors_are_errors(tmp_path):
  larger = dataclasses.replace(TINY, num_layers=2)
  weights = tiny_llama.weights(dataclasses.replace(TINY, num_layers=3))
  write_gguf(tmp_path / "tiny.gguf", larger, weights)
  with pytest.raises(ValueError, match="unexpected blk.2.attn_norm.weight"):
    load(tmp_path / "tiny.gguf")


def test_llama3_equals_its_directory(tmp_path):
  """Scaled rotations, interleaved rows and the tokenizer, all at once."""
  vocabulary = test_gguf_tokenizer.vocabulary("llama")
  numbers = 8.0, 1.0, 4.0, 8192
  names = "factor", "low_frequency", "high_frequency", "original_context"
  config = dataclasses.replace(
      TINY,
      vocab_size=len(vocabulary["tokens"]),
      norm_eps=float(np.float32(TINY.norm_eps)),
      rope_scaling=Llama3Scaling(**dict(zip(names, numbers, strict=True))),
  )
  factors = test_scalings.factors_of(
      config.rope_base, config.head_dim, *numbers
  )
  weights = tiny_llama.weights(config)
  write_gguf(
      tmp_path / "tiny.gguf",
      config,
      weights,
      tensors={"rope_freqs.weight": factors},
      vocabulary=vocabulary,
  )
  loaded = load(tmp_path / "tiny.gguf")
  assert loaded.chat == "llama3_1"
  policy = dataclasses.replace(loaded, config=config, params=weights)
  save_directory(tmp_path / "directory", policy)
  directory = load(tmp_path / "directory")
  assert loaded.config == directory.config
  assert_same_params(loaded.params, directory.params)
  ids = loaded.tokenizer.encode("The capital of Peru is Lima. " * 9)
  assert ids == directory.tokenizer.encode("The capital of Peru is Lima. " * 9)
  tokens = np.array([ids], np.int32)
  # Far enough for the scaled rotations to matter.
  rows = tokens, 40 * np.arange(len(ids))[None], np.ones_like(tokens)
  logits, same, unscaled = (
      transformer.apply(loaded.params, *rows, config=one)
      for one in (
          loaded.config,
          directory.config,
          dataclasses.replace(config, rope_scaling=None),
      )
  )
  np.testing.assert_array_equal(logits, same)
  assert np.abs(logits - unscaled).max() > 0.1


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones(4, np.float32), r"is \('F32', \(4,\)\), must be"),
        (
            np.arange(1, 9, dtype=np.float32),
            "no llama3 scaling .* load the dir",
        ),
    ],
)
def test_factors_of_rotations_that_mean_nothing(factors, message, tmp_path):
  path, weights = tmp_path / "tiny.gguf", tiny_llama.weights(TINY)
  write_gguf(path, TINY, weights, tensors={"rope_freqs.weight": factors})
  with pytest.raises(
      ValueError, match=f"tiny.gguf: rope_freqs.weight.*{message}"
  ):
    load(path)


def test_llama2_does_not_say_its_base(tmp_path):
  weights = tiny_llama.weights(TINY)
  write_gguf(tmp_path / "tiny.gguf", TINY, weights, drop=("rope.freq_base",))
  assert load(tmp_path / "tiny.gguf").config.rope_base == 10_000.0


def test_what_is_not_supported(tmp_path):
  path = tmp_path / "tiny.gguf"
  fields = {"llama.rope.scaling.type": "yarn"}
  write_gguf(path, TINY, tiny_llama.weights(TINY), fields=fields)
  with pytest.raises(ValueError, match="rope.scaling.type = 'yarn'"):
    load(path)


def test_types_that_are_not_supported(tmp_path):
  path = tmp_path / "tiny.gguf"
  wide = dataclasses.replace(TINY, mlp_dim=256)
  name = "blk.0.ffn_down.weight"
  kinds = {name: gguf.GGMLQuantizationType.TQ1_0}
  write_gguf(path, wide, tiny_llama.weights(wide), types=kinds)
  with pytest.raises(ValueError, match=f"{name} is TQ1_0; supported: F32"):
    load(path)


def test_of_another_architecture(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match="architecture 'mamba'"):
    load(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "write", "value", "message"),
    [
        ("block_count", "uint64", 10**12, "must be an integer in"),
        ("block_count", "float32", 2.0, "must be an integer in"),
        ("attention.head_count", "uint32", 0, "must be an integer in"),
        ("attention.head_count_kv", "array", [2, 2], "must be an integer in"),
        ("attention.head_count_kv", "uint32", 3, "num_kv_heads must divide"),
        ("rope.freq_base", "string", "x", "must be a positive number"),
    ],
)
def test_absurd_metadata_are_refused_by_name(
    key, write, value, message, tmp_path, monkeypatch
):
  header = gguf.GGUFWriter.write_header_to_file

  def forge(writer, *args, **kwargs):
    writer.kv_data[0].pop(f"llama.{key}", None)
    getattr(writer, f"add_{write}")(f"llama.{key}", value)
    return header(writer, *args, **kwargs)

  monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", forge)
  file = tmp_path / "x.gguf"
  write_gguf(file, TINY, tiny_llama.weights(TINY))
  with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
    load(file)
