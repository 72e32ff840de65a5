"""GGUF files of the Llama family: sizes, weights and tokenizer from one file.

Weights are dequantised to float32. A GGUF stores the rows of query and key
kernels with the two halves of every head interleaved, which is how llama.cpp
rotates; here the rows go back to the half-split order of `transformer.rotate`.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mgrpo_jax.policy.bpe import BPETokenizer
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import llama
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.policy import Policy, default_system

ARCHITECTURE = "llama"
QUANTIZATIONS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"
)  # fmt: skip
_INTERLEAVED = ("attn_q.weight", "attn_k.weight")
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def load_gguf(path: pathlib.Path) -> Policy:
  """Loads a policy from a GGUF file.

  Args:
    path: the file; architecture `llama`, no RoPE scaling, no experts,
      tensors of a type in `QUANTIZATIONS`, a byte-level BPE tokenizer.

  Returns:
    The policy, float32, activations in float32; `chat` is derived from the
    tokenizer, `system` from its template.

  Raises:
    ValueError: where the file is truncated, says something this code does not
      compute, or tensors are missing, unexpected, misshaped or of another
      type; all findings in one message.
  """
  reader = _open(path)
  fields = {name: field.contents() for name, field in reader.fields.items()}
  names = {tensor.name for tensor in reader.tensors}
  config = _config(fields, names, str(path))
  params = _params(reader, config, str(path))
  tokenizer = _tokenizer(fields, str(path))
  if tokenizer.vocab_size != config.vocab_size:
    raise ValueError(
        f"{path}: {tokenizer.vocab_size} tokens for a vocabulary of"
        f" {config.vocab_size}"
    )
  chat = "chatml" if "<|im_start|>" in tokenizer.special_ids else None
  return Policy(
      config=config,
      params=params,
      tokenizer=tokenizer,
      chat=chat,
      system=default_system(fields.get("tokenizer.chat_template")),
  )


def _open(path: pathlib.Path) -> Any:
  """Opens a file; the reader's errors become a ValueError naming it."""
  import gguf

  try:
    return gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError, OverflowError) as error:
    raise ValueError(
        f"{path}: truncated or not a GGUF file: {error}"
    ) from error


def _config(
    fields: Mapping[str, Any], names: set[str], source: str
) -> TransformerConfig:
  """Reads the sizes; refuses what the transformer does not compute."""
  needed = {
      "num_layers": "llama.block_count",
      "embed_dim": "llama.embedding_length",
      "mlp_dim": "llama.feed_forward_length",
      "num_heads": "llama.attention.head_count",
      "rope_base": "llama.rope.freq_base",
      "norm_eps": "llama.attention.layer_norm_rms_epsilon",
      "tokens": "tokenizer.ggml.tokens",
  }
  architecture = fields.get("general.architecture")
  if architecture != ARCHITECTURE:
    raise ValueError(
        f"{source}: architecture {architecture!r}, only {ARCHITECTURE!r} is"
        " supported"
    )
  problems = [f"missing {k}" for k in needed.values() if k not in fields]
  problems += [
      f"{key} = {fields[key]!r} is not supported"
      for key in ("llama.rope.scaling.type", "llama.expert_count")
      if fields.get(key, "none") not in ("none", 0)
  ]
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  values = {field: fields[key] for field, key in needed.items()}
  vocab_size = len(values.pop("tokens"))
  head_dim = fields.get(
      "llama.attention.key_length", values["embed_dim"] // values["num_heads"]
  )
  rotated = fields.get("llama.rope.dimension_count", head_dim)
  if rotated != head_dim:
    raise ValueError(
        f"{source}: llama.rope.dimension_count = {rotated}, must be the head"
        f" dimension {head_dim}"
    )
  return TransformerConfig(
      **values,
      vocab_size=fields.get("llama.vocab_size", vocab_size),
      num_kv_heads=fields.get(
          "llama.attention.head_count_kv", values["num_heads"]
      ),
      head_dim=head_dim,
      tied_embeddings=llama.GGUF_NAMES["unembedding"] not in names,
      dtype="float32",
  )


def _params(reader: Any, config: TransformerConfig, source: str) -> Params:
  """Dequantises the tensors and gives them their places."""
  types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
  wrong = [f"{n} is {t}" for n, t in types.items() if t not in QUANTIZATIONS]
  if wrong:
    raise ValueError(
        f"{source}: {'; '.join(wrong)}; supported: {', '.join(QUANTIZATIONS)}"
    )
  stored = {
      tensor.name: llama.StoredTensor(
          tuple(int(size) for size in reversed(tensor.shape)),
          functools.partial(_read, tensor, config.head_dim),
      )
      for tensor in reader.tensors
  }
  return llama.assemble(stored, config, llama.GGUF_NAMES, source)


def _read(tensor: Any, head_dim: int) -> np.ndarray:
  """Dequantises a tensor; rows of queries and keys become half-split."""
  import gguf

  matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  if not tensor.name.endswith(_INTERLEAVED):
    return matrix
  pairs = matrix.reshape(-1, head_dim // 2, 2, matrix.shape[-1])
  return pairs.swapaxes(1, 2).reshape(matrix.shape)


def _tokenizer(fields: Mapping[str, Any], source: str) -> BPETokenizer:
  """Builds the byte-level BPE tokenizer that the metadata describes."""
  from tokenizers import AddedToken, Tokenizer, decoders, models

  kind = fields.get("tokenizer.ggml.model")
  pre: Any = fields.get("tokenizer.ggml.pre")
  needed = [f"tokenizer.ggml.{k}" for k in ("token_type", "merges")]
  problems = [f"missing {key}" for key in needed if key not in fields]
  if kind != "gpt2":
    problems.append(f"tokenizer.ggml.model = {kind!r}, must be 'gpt2'")
  if pre not in _PRE_TOKENIZERS:
    problems.append(
        f"tokenizer.ggml.pre = {pre!r}, must be one of {list(_PRE_TOKENIZERS)}"
    )
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  tokens = fields["tokenizer.ggml.tokens"]
  merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
  ids = {token: i for i, token in enumerate(tokens)}
  try:
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
  except Exception as error:  # the library raises bare Exceptions
    raise ValueError(f"{source}: tokenizer: {error}") from error
  tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
      [
          AddedToken(token, normalized=False, special=True)
          for token, kind in zip(
              tokens, fields["tokenizer.ggml.token_type"], strict=True
          )
          if kind in (_CONTROL, _USER_DEFINED)
      ]
  )
  return BPETokenizer(tokenizer.to_str(), _tokenizer_config(fields))


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Gives the named tokens in the manner of `tokenizer_config.json`."""
  tokens = fields["tokenizer.ggml.tokens"]
  config: dict[str, Any] = {
      "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", False)
  }
  for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
    token = fields.get(f"tokenizer.ggml.{key}_token_id")
    config[f"{name}_token"] = None if token is None else tokens[token]
  return config


def _split_words() -> Any:
  """GPT-2's: words, numbers, punctuation, spaces; then bytes."""
  from tokenizers import pre_tokenizers

  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split_digits_and_words() -> Any:
  """SmolLM's: every digit apart, the rest as GPT-2."""
  from tokenizers import pre_tokenizers

  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _split_words()])


_PRE_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "gpt-2": _split_words,
    "smollm": _split_digits_and_words,
}
