"""What the keys of foreign JSON files may hold, told before they are used."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

MAX_LAYERS = 4096  # beyond any model; a config may claim more than memory holds
_MAX_SIZE = 2**31 - 1
_Rule = tuple[Callable[[Any], bool], str]


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    file: where; a pipe or a device is not waited for.

  Returns:
    Its fields.

  Raises:
    ValueError: it cannot be read or is none, naming the file.
  """
  try:
    if file.exists() and not file.is_file():
      raise ValueError("not a regular file")
    fields = json.loads(file.read_text("utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{file}: cannot be read: {error}") from error
  if not isinstance(fields, dict):
    raise ValueError(f"{file}: must be a JSON object")
  return fields


def is_number(value: object) -> bool:
  """Whether a value is a finite number and no boolean.

  Args:
    value: of a JSON file.

  Returns:
    True for what a float can hold.
  """
  try:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
  except OverflowError:
    return False


def wrong(fields: Mapping[str, Any]) -> list[str]:
  """Finds what `config.json` holds that no model can have.

  Args:
    fields: of the file; those that are absent are not missed.

  Returns:
    A line a key, the key's own name first.
  """
  return [
      f"{key} = {fields[key]!r}, must be {allowed}"
      for key, (holds, allowed) in _RULES.items()
      if key in fields and not holds(fields[key])
  ]


def _whole(low: int, high: int = _MAX_SIZE, *, optional: bool = False) -> _Rule:
  """An integer of a range."""

  def holds(value: Any) -> bool:
    if value is None:
      return optional
    return type(value) is int and low <= value <= high

  return holds, f"an integer in [{low}, {high}]"


def _of(kind: type, name: str, *, optional: bool = False) -> _Rule:
  """A value of a type."""
  return lambda v: isinstance(v, kind) or (optional and v is None), name


def _list_of(kind: type, name: str) -> _Rule:
  """A list of values of one type, or nothing."""

  def holds(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(type(one) is kind for one in value)
    )

  return holds, name


_POSITIVE: _Rule = (lambda v: is_number(v) and v > 0, "a positive number")
_FLAG = _of(bool, "true or false")
_TEXT = _of(str, "text", optional=True)
_OBJECT = _of(dict, "an object", optional=True)
_RULES: Mapping[str, _Rule] = {
    "vocab_size": _whole(1),
    "hidden_size": _whole(1),
    "num_hidden_layers": _whole(1, MAX_LAYERS),
    "num_attention_heads": _whole(1),
    "num_key_value_heads": _whole(1, optional=True),
    "head_dim": _whole(1, optional=True),
    "intermediate_size": _whole(1),
    "rms_norm_eps": _POSITIVE,
    "rope_local_base_freq": _POSITIVE,
    "query_pre_attn_scalar": _POSITIVE,
    "tie_word_embeddings": _FLAG,
    "use_sliding_window": _FLAG,
    "norm_topk_prob": _FLAG,
    "sliding_window": _whole(0, optional=True),
    "max_window_layers": _whole(0),
    "sliding_window_pattern": _whole(1, optional=True),
    "layer_types": _list_of(str, "a list of texts"),
    "num_experts": _whole(0, 2**16, optional=True),
    "num_local_experts": _whole(0, 2**16, optional=True),
    "num_experts_per_tok": _whole(1, optional=True),
    "moe_intermediate_size": _whole(1, optional=True),
    "decoder_sparse_step": _whole(1),
    "mlp_only_layers": _list_of(int, "a list of integers"),
    "hidden_act": _TEXT,
    "hidden_activation": _TEXT,
    "rope_scaling": _OBJECT,
    "rope_parameters": _OBJECT,
}
