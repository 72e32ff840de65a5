"""Which stored tensor is which parameter of a Llama-family transformer.

Files store a kernel as a matrix [outputs, inputs]; a parameter has its inputs
first and its heads apart (`params.Layer`). Names differ by format, shapes do
not, so one declaration serves every format.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Layer, Params, ParamSpec, param_specs

SAFETENSORS_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "output": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
}

GGUF_NAMES: Mapping[str, str] = {
    "embedding": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "output": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "unembedding": "output.weight",
}

# Leading axes of a parameter that a kernel contracts; 0 is no kernel.
_INPUT_AXES: Mapping[str, int] = {
    "embedding": 0,
    "attention_norm": 0,
    "query": 1,
    "key": 1,
    "value": 1,
    "output": 3,
    "mlp_norm": 0,
    "gate": 1,
    "up": 1,
    "down": 1,
    "final_norm": 0,
    "unembedding": 1,
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file, not read yet.

  Attributes:
    shape: as a matrix [outputs, inputs], or a vector.
    read: gives the values, floats of any width.
  """

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One parameter and the tensor that holds it."""

  name: str
  input_axes: int
  spec: ParamSpec

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """The shape in the file."""
    shape = self.spec.shape
    if not self.input_axes:
      return shape
    inputs = shape[: self.input_axes]
    return (math.prod(shape[self.input_axes :]), math.prod(inputs))


def assemble(
    stored: Mapping[str, StoredTensor],
    config: TransformerConfig,
    names: Mapping[str, str],
    source: str,
) -> Params:
  """Reads parameters from the tensors of a file.

  Args:
    stored: name to tensor; nothing is read before all of them are checked.
    config: sizes that the tensors must have.
    names: field of `Params` or `Layer` to the tensor's name in this format.
    source: names the file in errors.

  Returns:
    Float32 parameters on the default device.

  Raises:
    ValueError: listing every missing, unexpected and misshaped tensor.
  """
  entries = _entries(config, names)
  wanted = {entry.name: entry for entry in jax.tree.leaves(entries)}
  problems = [f"missing {name}" for name in wanted if name not in stored]
  problems += [f"unexpected {name}" for name in stored if name not in wanted]
  problems += [
      f"{name} has shape {tuple(stored[name].shape)}, not {entry.stored_shape}"
      for name, entry in wanted.items()
      if name in stored and tuple(stored[name].shape) != entry.stored_shape
  ]
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  return jax.tree.map(
      lambda entry: _to_param(stored[entry.name].read(), entry), entries
  )


def disassemble(
    params: Params, config: TransformerConfig, names: Mapping[str, str]
) -> dict[str, np.ndarray]:
  """Names parameters as a file does; the inverse of `assemble`.

  Args:
    params: parameters.
    config: their sizes.
    names: field to the tensor's name in the format.

  Returns:
    Name to contiguous float32 matrix or vector, on the host.

  Raises:
    ValueError: listing every parameter whose shape is not the config's.
  """
  tree = _entries(config, names)
  declared: Any = jax.tree.structure(tree)
  if declared != jax.tree.structure(params):
    raise ValueError("params: not the parameters that the config declares")
  pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True))
  problems = [
      f"{entry.name}: parameter has shape {np.shape(value)}, not"
      f" {entry.spec.shape}"
      for entry, value in pairs
      if np.shape(value) != entry.spec.shape
  ]
  if problems:
    raise ValueError(f"params: {'; '.join(problems)}")
  return {
      entry.name: _from_param(np.asarray(value, np.float32), entry)
      for entry, value in pairs
  }


def _entries(config: TransformerConfig, names: Mapping[str, str]) -> Params:
  """Gives `Params` whose leaves are `_Entry`."""
  specs = param_specs(config)

  def entry(field: str, spec: ParamSpec, *layer: int) -> _Entry:
    return _Entry(names[field].format(*layer), _INPUT_AXES[field], spec)

  layers = tuple(
      Layer(
          **{
              field.name: entry(field.name, getattr(layer, field.name), i)
              for field in dataclasses.fields(layer)
          }
      )
      for i, layer in enumerate(specs.layers)
  )
  tied = config.tied_embeddings
  return Params(
      embedding=entry("embedding", specs.embedding),
      layers=layers,
      final_norm=entry("final_norm", specs.final_norm),
      unembedding=None if tied else entry("unembedding", specs.unembedding),
  )


def _to_param(matrix: np.ndarray, entry: _Entry) -> jax.Array:
  """Turns a stored matrix into a parameter on the device."""
  inputs_first = matrix.T if entry.input_axes else matrix
  value = np.ascontiguousarray(inputs_first, np.float32)
  return jax.device_put(value.reshape(entry.spec.shape))


def _from_param(value: np.ndarray, entry: _Entry) -> np.ndarray:
  """Turns a parameter into the matrix a file stores."""
  if not entry.input_axes:
    return np.ascontiguousarray(value)
  outputs, inputs = entry.stored_shape
  return np.ascontiguousarray(value.reshape(inputs, outputs).T)
