"""GGUF files: sizes, weights and tokenizer from one file.

Weights are dequantised to float32. For Llama a GGUF stores the rows of query
and key kernels with the two halves of every head interleaved, which is how
llama.cpp rotates them; here they go back to the half-split order of
`rotary.rotate`. Of Llama 3's scaled rotations it stores what every frequency is
divided by; here that becomes the scaling again.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from mgrpo_jax.policy.config import Experts, TransformerConfig
from mgrpo_jax.policy.load import scalings
from mgrpo_jax.policy.load.fields import MAX_LAYERS, is_number
from mgrpo_jax.policy.load.gguf_tokenizer import read_tokenizer
from mgrpo_jax.policy.load.names import GGUF
from mgrpo_jax.policy.load.tensors import StoredTensor, assemble
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.policy import Policy, default_system, derive_chat
from mgrpo_jax.policy.rotary import LinearScaling, Scaling

QUANTIZATIONS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip
_INTERLEAVED = ("attn_q.weight", "attn_k.weight")
_FACTORS = "rope_freqs.weight"
# What llama.cpp takes for keys that are absent; Llama 1 and 2 lack the first,
# Llama 3.x the second.
_DEFAULTS: Mapping[str, Any] = {
    "llama.rope.freq_base": 10_000.0,
    "llama.rope.scaling.original_context_length": 8192,
}


def load_gguf(path: pathlib.Path, *, mesh: jax.sharding.Mesh | None) -> Policy:
  """Loads a policy from a GGUF file.

  Args:
    path: the file; an architecture of `_FAMILIES`, no RoPE scaling but Gemma's
      linear one and Llama 3's, tensors of a type in `QUANTIZATIONS`, a
      tokenizer as `gguf_tokenizer` says.
    mesh: whose devices hold the parameters; None for the default device.

  Returns:
    The policy, float32, activations in float32; `chat` is derived from the
    tokenizer, `system` from its template.

  Raises:
    ValueError: where the file is truncated, says something this code does not
      compute, or tensors are missing, unexpected, misshaped or of another
      type; all findings in one message.
  """
  reader, said = _open(path)
  fields = {**_DEFAULTS, **said}
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _config(fields, set(tensors), str(path))
  is_llama = fields["general.architecture"] == "llama"
  if is_llama and _FACTORS in tensors:
    scaling = _llama3_scaling(tensors.pop(_FACTORS), fields, config, str(path))
    config = dataclasses.replace(config, rope_scaling=scaling)
  params = _params(tensors.values(), config, str(path), is_llama, mesh)
  tokenizer = read_tokenizer(fields, str(path))
  if tokenizer.vocab_size != config.vocab_size:
    raise ValueError(
        f"{path}: {tokenizer.vocab_size} tokens for a vocabulary of"
        f" {config.vocab_size}"
    )
  return Policy(
      config=config,
      params=params,
      tokenizer=tokenizer,
      chat=derive_chat(tokenizer),
      system=default_system(fields.get("tokenizer.chat_template")),
  )


def _open(path: pathlib.Path) -> tuple[Any, dict[str, Any]]:
  """Opens a file and reads its metadata; errors become one ValueError."""
  import gguf

  try:
    reader = gguf.GGUFReader(path)
    return reader, {
        name: field.contents() for name, field in reader.fields.items()
    }
  except (
      ValueError, IndexError, KeyError, OSError, OverflowError, RecursionError,
      TypeError,
  ) as error:  # fmt: skip
    raise ValueError(
        f"{path}: truncated or not a GGUF file: {error}"
    ) from error


def _config(
    fields: Mapping[str, Any], names: set[str], source: str
) -> TransformerConfig:
  """Reads the sizes; refuses what the transformer does not compute."""
  family = str(fields.get("general.architecture"))
  if family not in _FAMILIES:
    raise ValueError(
        f"{source}: architecture {family!r}, must be one of"
        f" {sorted(_FAMILIES)}"
    )
  needed = {ours: f"{family}.{theirs}" for ours, theirs in _SIZES.items()}
  needed["tokens"] = "tokenizer.ggml.tokens"
  scaled = ("none", "linear") if family == "gemma3" else ("none",)
  kind = fields.get(f"{family}.rope.scaling.type", "none")
  problems = [f"missing {k}" for k in needed.values() if k not in fields]
  problems += _wrong(fields, family)
  if kind not in scaled:
    problems.append(f"{family}.rope.scaling.type = {kind!r} is not supported")
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  own = {
      key.removeprefix(f"{family}."): value
      for key, value in fields.items()
      if key.startswith(f"{family}.")
  }
  values = {field: fields[key] for field, key in needed.items()}
  vocab_size = len(values.pop("tokens"))
  head_dim = own.get(
      "attention.key_length", values["embed_dim"] // values["num_heads"]
  )
  rotated = own.get("rope.dimension_count", head_dim)
  if rotated != head_dim:
    raise ValueError(
        f"{source}: {family}.rope.dimension_count = {rotated}, must be the head"
        f" dimension {head_dim}"
    )
  if own.get("expert_count", 0) and family != "qwen3moe":
    raise ValueError(
        f"{source}: {family}.expert_count = {own['expert_count']} is not"
        " supported"
    )
  try:
    return TransformerConfig(
        **values,
        vocab_size=own.get("vocab_size", vocab_size),
        num_kv_heads=own.get("attention.head_count_kv", values["num_heads"]),
        head_dim=head_dim,
        tied_embeddings=GGUF.tensors["unembedding"] not in names,
        dtype="float32",
        **_FAMILIES[family](own, head_dim),
    )
  except KeyError as error:
    raise ValueError(f"{source}: missing {family}.{error.args[0]}") from error
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from error


def _wrong(fields: Mapping[str, Any], family: str) -> list[str]:
  """Finds what the metadata hold that no model can have."""
  problems = []
  for key, largest in _WHOLE.items():
    value = fields.get(f"{family}.{key}", 1)
    if not (type(value) is int and 1 <= value <= largest):
      problems.append(
          f"{family}.{key} = {value!r}, must be an integer in [1, {largest}]"
      )
  for key in _NUMBERS:
    value = fields.get(f"{family}.{key}", 1)
    if not (is_number(value) and value > 0):
      problems.append(f"{family}.{key} = {value!r}, must be a positive number")
  if not isinstance(fields.get("tokenizer.ggml.tokens", []), list):
    problems.append("tokenizer.ggml.tokens must be a list")
  return problems


_WHOLE: Mapping[str, int] = {
    "block_count": MAX_LAYERS,
    "embedding_length": 2**31 - 1,
    "feed_forward_length": 2**31 - 1,
    "attention.head_count": 2**31 - 1,
    "attention.head_count_kv": 2**31 - 1,
    "attention.key_length": 2**31 - 1,
    "attention.sliding_window": 2**31 - 1,
    "expert_used_count": 2**16,
    "expert_feed_forward_length": 2**31 - 1,
    "vocab_size": 2**31 - 1,
    "rope.scaling.original_context_length": 2**31 - 1,
}
_NUMBERS = (
    "rope.freq_base",
    "rope.scaling.factor",
    "attention.layer_norm_rms_epsilon",
)
_SIZES: Mapping[str, str] = {
    "num_layers": "block_count",
    "embed_dim": "embedding_length",
    "mlp_dim": "feed_forward_length",
    "num_heads": "attention.head_count",
    "rope_base": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}


def _llama(own: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
  """Llama and SmolLM2."""
  del own, head_dim
  return {}


def _qwen2(own: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
  """Qwen 2 and 2.5."""
  del own, head_dim
  return {"qkv_bias": True}


def _qwen3(own: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
  """Qwen 3."""
  del own, head_dim
  return {"qk_norm": True}


def _qwen3moe(own: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
  """Qwen 3 with experts; llama.cpp always normalises what they count."""
  experts = Experts(
      number=own["expert_count"],
      per_token=own["expert_used_count"],
      mlp_dim=own["expert_feed_forward_length"],
      normalised=True,
  )
  return _qwen3(own, head_dim) | {"experts": experts}


def _gemma3(own: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
  """Gemma 3's text model; what the file does not say is as llama.cpp has it."""
  layers, embed = own["block_count"], own["embedding_length"]
  scaling = None
  if own.get("rope.scaling.type", "none") == "linear":
    scaling = LinearScaling(factor=own["rope.scaling.factor"])
  is_largest = layers == _GEMMA3_27B_LAYERS
  width = embed // own["attention.head_count"] if is_largest else head_dim
  return {
      "qk_norm": True,
      "post_norms": True,
      "activation": "gelu_tanh",
      "embedding_scale": embed**0.5,
      "attention_scale": width**-0.5,
      "windows": tuple(
          own["attention.sliding_window"] if (layer + 1) % 6 else 0
          for layer in range(layers)
      ),
      "local_rope_base": 10_000.0,
      "rope_scaling": scaling,
  }


_GEMMA3_27B_LAYERS = 62  # the one whose queries are scaled by another width
_FAMILIES: Mapping[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma3": _gemma3,
}


def _llama3_scaling(
    tensor: Any,
    fields: Mapping[str, Any],
    config: TransformerConfig,
    source: str,
) -> Scaling | None:
  """Reads how Llama 3.1 to 3.3 stretch their context."""
  found = tensor.tensor_type.name, tuple(map(int, tensor.shape))
  wanted = "F32", (config.head_dim // 2,)
  if found != wanted:
    raise ValueError(f"{source}: {_FACTORS} is {found}, must be {wanted}")
  try:
    return scalings.recover(
        tensor.data,
        base=config.rope_base,
        context=fields["llama.rope.scaling.original_context_length"],
    )
  except ValueError as error:
    raise ValueError(
        f"{source}: {_FACTORS}: {error}; load the directory that the file was"
        " converted from"
    ) from error


def _params(
    tensors: Collection[Any],
    config: TransformerConfig,
    source: str,
    interleaved: bool,
    mesh: jax.sharding.Mesh | None,
) -> Params:
  """Dequantises the tensors and gives them their places."""
  types = {tensor.name: tensor.tensor_type.name for tensor in tensors}
  wrong = [f"{n} is {t}" for n, t in types.items() if t not in QUANTIZATIONS]
  if wrong:
    raise ValueError(
        f"{source}: {'; '.join(wrong)}; supported: {', '.join(QUANTIZATIONS)}"
    )
  stored = {
      tensor.name: StoredTensor(
          tuple(int(size) for size in reversed(tensor.shape)),
          functools.partial(
              _read,
              tensor,
              config.head_dim
              if interleaved and tensor.name.endswith(_INTERLEAVED)
              else 0,
          ),
      )
      for tensor in tensors
  }
  return assemble(stored, config, GGUF, source, mesh)


def _read(tensor: Any, interleaved: int, *index: slice) -> np.ndarray:
  """Dequantises a part of a tensor.

  Args:
    tensor: of the reader; its data is mapped from the file, not read.
    interleaved: width of heads whose halves are interleaved, 0 for none.
    *index: one slice a dimension; rows at the borders of heads.

  Returns:
    Floats; rows of queries and keys half-split.
  """
  import gguf

  *rows, columns = index
  data = tensor.data[tuple(rows)] if rows else tensor.data
  part = gguf.quants.dequantize(data, tensor.tensor_type)[..., columns]
  if not interleaved:
    return part
  pairs = part.reshape(-1, interleaved // 2, 2, part.shape[-1])
  return pairs.swapaxes(1, 2).reshape(part.shape)
