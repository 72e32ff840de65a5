"""Adapters in the format of PEFT, written and read.

    adapter_config.json  adapter_model.safetensors

A factor A is stored [r, inputs] and B [outputs, r], under the name of the
module they adapt; experts one by one, as checkpoints name them.
"""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from mgrpo_jax import atomic
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load.fields import is_number, read_json
from mgrpo_jax.policy.load.names import safetensors_names
from mgrpo_jax.policy.lora import TARGETS, Adapter, LoRA, adapter_specs
from mgrpo_jax.policy.params import ParamSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What PEFT can do to an adapter that is not done here; absent means these.
_FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# Likewise, but keys that not every version of PEFT knows.
_ABSENT = {
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
}
_DTYPES = ("float32", "float16", "bfloat16")
# Initialisations that leave the base's weights as they are; others change them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    path: pathlib.Path,
    adapter: Adapter,
    *,
    lora: LoRA,
    config: TransformerConfig,
    base: str,
) -> None:
  """Writes an adapter as a directory that PEFT opens.

  Args:
    path: the directory; made where it is missing.
    adapter: factors.
    lora: of the adapter.
    config: sizes of the transformer.
    base: name or directory of the model it adapts.

  Raises:
    StorageError: a file cannot be written.
    ValueError: a factor has not the shape that the config gives it.
  """
  specs = adapter_specs(config, lora)
  wrong = [
      f"{jax.tree_util.keystr(where)}: {np.shape(value)}, not {spec.shape}"
      for (where, spec), value in zip(
          jax.tree.leaves_with_path(specs),
          jax.tree.leaves(adapter),
          strict=True,
      )
      if np.shape(value) != spec.shape
  ]
  if wrong:
    raise ValueError(f"adapter: {'; '.join(wrong)}")
  tensors = {
      name: _to_matrix(np.asarray(value, np.float32)[where], spec, is_a)
      for name, value, where, spec, is_a in _entries(adapter, lora, config)
  }
  fields = _FIXED | {
      "base_model_name_or_path": base,
      "inference_mode": True,
      "lora_alpha": lora.alpha,
      "lora_dropout": 0.0,
      "r": lora.rank,
      "target_modules": sorted(_modules(lora, config)),
      "task_type": "CAUSAL_LM",
  }
  atomic.write_json(path / CONFIG_FILE, fields)
  content = safetensors.numpy.save(tensors, {"format": "pt"})
  atomic.write(path / WEIGHTS_FILE, content)


def load_adapter(
    path: pathlib.Path, *, config: TransformerConfig
) -> tuple[LoRA, Adapter]:
  """Reads an adapter that PEFT, or `save_adapter`, wrote.

  Args:
    path: the directory.
    config: sizes of the transformer that it adapts.

  Returns:
    What it adapts, and float32 factors on the default device.

  Raises:
    ValueError: a file is missing or cannot be read, the adapter does what is
      not computed here, or factors are missing, unexpected, misshaped, no
      floats or not finite; each lists all its findings.
  """
  lora = _read_config(path / CONFIG_FILE, config)
  specs = adapter_specs(config, lora)
  file = path / WEIGHTS_FILE
  if file.exists() and not file.is_file():  # a pipe would be waited for
    raise ValueError(f"{file}: cannot be read: not a regular file")
  try:
    tensors = safetensors.numpy.load_file(path / WEIGHTS_FILE)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(
        f"{path / WEIGHTS_FILE}: cannot be read: {error}"
    ) from error
  entries = list(_entries(specs, lora, config))
  wanted = {name: _stored_shape(spec, a) for name, _, _, spec, a in entries}
  problems = [f"missing {name}" for name in wanted if name not in tensors]
  problems += [f"unexpected {name}" for name in tensors if name not in wanted]
  problems += [
      f"{name} has shape {tensors[name].shape}, not {shape}"
      for name, shape in wanted.items()
      if name in tensors and tensors[name].shape != shape
  ]
  problems += [
      f"{name} is {value.dtype}, must be one of {_DTYPES}"
      for name, value in tensors.items()
      if value.dtype.name not in _DTYPES
  ]
  problems = problems or [
      f"{name} holds NaN or infinity"
      for name, value in tensors.items()
      if not np.isfinite(value).all()
  ]
  if problems:
    raise ValueError(f"{path / WEIGHTS_FILE}: {'; '.join(problems)}")
  values = jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype), specs)
  for name, value, where, spec, is_a in _entries(values, lora, config):
    del spec, is_a
    part = value[where]
    part[...] = tensors[name].T.astype(np.float32).reshape(part.shape)
  return lora, jax.tree.map(jnp.asarray, values)


def _entries(
    tree: Any, lora: LoRA, config: TransformerConfig
) -> Iterator[tuple[str, Any, Any, ParamSpec, bool]]:
  """Walks a tree like `Adapter`: name, leaf, expert's part, spec, whether A."""
  names = safetensors_names(config)
  specs = adapter_specs(config, lora).layers
  for layer, pairs in enumerate(tree.layers):
    for field, pair in pairs.items():
      for letter in ("a", "b"):
        spec = getattr(specs[layer][field], letter)
        stacked = spec.logical_axes[0] == "expert"
        template = (names.experts if stacked else names.tensors)[field]
        template = template.replace(".weight", f".lora_{letter.upper()}.weight")
        for number in range(spec.shape[0] if stacked else 1):
          name = _PREFIX + template.format(layer, number)
          where = number if stacked else ...
          yield name, getattr(pair, letter), where, spec, letter == "a"


def _stored_shape(spec: ParamSpec, is_a: bool) -> tuple[int, int]:
  """The shape of a factor's matrix in the file."""
  shape = spec.shape[spec.logical_axes[0] == "expert" :]
  if is_a:
    return shape[-1], math.prod(shape[:-1])
  return math.prod(shape[1:]), shape[0]


def _to_matrix(value: np.ndarray, spec: ParamSpec, is_a: bool) -> np.ndarray:
  """Turns a factor of one kernel into what the file stores."""
  rows, columns = _stored_shape(spec, is_a)
  return np.ascontiguousarray(value.reshape(columns, rows).T)


def _modules(lora: LoRA, config: TransformerConfig) -> dict[str, str]:
  """Names of the adapted modules, and which field each of them is."""
  tensors = safetensors_names(config).tensors
  return {tensors[name].split(".")[-2]: name for name in lora.targets}


def _read_config(file: pathlib.Path, config: TransformerConfig) -> LoRA:
  """Reads what an adapter adapts; refuses what is not computed here."""
  fields = read_json(file)
  problems = [
      f"{key} = {fields[key]!r}, must be {value!r}"
      for key, value in (_FIXED | _ABSENT).items()
      if fields.get(key, value) != value and fields.get(key) is not None
  ]
  every = LoRA(rank=1, alpha=1.0, targets=TARGETS)
  known = _modules(every, config)
  modules: Any = fields.get("target_modules")
  if not isinstance(modules, list) or not all(
      isinstance(name, str) and name in known for name in modules
  ):
    problems.append(
        f"target_modules = {modules!r}, must be some of {sorted(known)}"
    )
  problems += [
      f"missing {key}" for key in ("r", "lora_alpha") if key not in fields
  ]
  rank, alpha = fields.get("r", 1), fields.get("lora_alpha", 1)
  if type(rank) is not int:
    problems.append(f"r = {rank!r}, must be an integer")
  if not is_number(alpha):
    problems.append(f"lora_alpha = {alpha!r}, must be a number")
  if (start := fields.get("init_lora_weights")) not in _INITS:
    problems.append(
        f"init_lora_weights = {start!r}, must be one of {_INITS}; PEFT can save"
        " the adapter as one of unchanged weights"
    )
  if problems:
    raise ValueError(f"{file}: {'; '.join(problems)}")
  wanted = {known[name] for name in modules}
  targets = tuple(name for name in TARGETS if name in wanted)
  try:
    return LoRA(rank=rank, alpha=float(alpha), targets=targets)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
