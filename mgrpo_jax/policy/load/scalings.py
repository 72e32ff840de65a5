"""Scalings of rotations as `config.json` tells them."""

from collections.abc import Mapping
from typing import Any

from mgrpo_jax.policy.rotary import LinearScaling, Llama3Scaling, Scaling


def read(rope: Mapping[str, Any]) -> tuple[Scaling | None, list[str]]:
  """Reads how rotations are scaled.

  Args:
    rope: `rope_parameters`, or `rope_scaling` with `rope_theta`.

  Returns:
    The scaling, None for none; and what is wrong with it.
  """
  unsaid = "default" if rope.keys() <= {"rope_theta"} else None
  kind = rope.get("rope_type", rope.get("type", unsaid))
  keys = {
      "default": (),
      "linear": ("factor",),
      "llama3": (
          "factor",
          "low_freq_factor",
          "high_freq_factor",
          "original_max_position_embeddings",
      ),
  }
  if kind not in keys:
    return None, [f"rope_type = {kind!r}, must be one of {sorted(keys)}"]
  known = {"rope_theta", "rope_type", "type", *keys[kind]}
  wrong = [f"missing {k} of rope {kind}" for k in keys[kind] if k not in rope]
  wrong += [f"unknown {k} of rope {kind}" for k in rope if k not in known]
  if wrong or kind == "default":
    return None, wrong
  values = [rope[key] for key in keys[kind]]
  if kind == "linear":
    return LinearScaling(factor=values[0]), []
  factor, low, high, context = values
  return (
      Llama3Scaling(
          factor=factor,
          low_frequency=low,
          high_frequency=high,
          original_context=context,
      ),
      [],
  )


def write(scaling: Scaling | None) -> dict[str, Any]:
  """Writes how rotations are scaled.

  Args:
    scaling: of `policy.rotary`; None for none.

  Returns:
    Fields of `rope_parameters`.

  Raises:
    ValueError: it is another function.
  """
  if scaling is None:
    return {"rope_type": "default"}
  if isinstance(scaling, LinearScaling):
    return {"rope_type": "linear", "factor": scaling.factor}
  if isinstance(scaling, Llama3Scaling):
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency,
        "high_freq_factor": scaling.high_frequency,
        "original_max_position_embeddings": scaling.original_context,
    }
  raise ValueError(f"rope_scaling: {scaling!r} cannot be written")
