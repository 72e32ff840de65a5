"""Scalings of rotations as `config.json` and GGUF tell them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from mgrpo_jax.policy.load.fields import is_number
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
  if not isinstance(kind, str) or kind not in keys:
    return None, [f"rope_type = {kind!r}, must be one of {sorted(keys)}"]
  known = {"rope_theta", "rope_type", "type", *keys[kind]}
  wrong = [f"missing {k} of rope {kind}" for k in keys[kind] if k not in rope]
  wrong += [f"unknown {k} of rope {kind}" for k in rope if k not in known]
  wrong += [
      f"{k} = {rope[k]!r} of rope {kind}, must be a number"
      for k in keys[kind]
      if k in rope and not is_number(rope[k])
  ]
  if wrong or kind == "default":
    return None, wrong
  values = [rope[key] for key in keys[kind]]
  try:
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
  except ValueError as error:
    return None, [f"rope {kind}: {error}"]


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


def recover(
    factors: Float[np.ndarray, " half"], *, base: float, context: int
) -> Scaling | None:
  """Finds the llama3 scaling of which only the factors are left.

  Llama.cpp keeps by how much each frequency is divided (`rope_freqs.weight`):

      1 / factors[i] = kept[i] + (1 - kept[i]) / factor
      kept[i] = clip((turns[i] - low) / (high - low), 0, 1)

  The largest is the factor. Llama 3's low = 1 and high = 4 are tried first;
  then the line through what lies between 0 and 1 gives them. Only low / C and
  high / C show in the factors, so C may be another multiple than it was.

  Args:
    factors: >= 1.
    base: of the frequencies.
    context: C, tokens that the model was first trained on.

  Returns:
    The scaling; None where all factors are 1.

  Raises:
    ValueError: no llama3 scaling has these factors.
  """
  wide = np.asarray(factors, np.float64)
  if (wide == 1).all():
    return None
  half, largest = len(wide), wide.max()
  factor = float(f"{largest:.7g}")  # what float32 holds
  turns = context * base ** (-np.arange(half) / half) / (2 * math.pi)
  for low, high in _ends(turns, wide):
    kept = np.clip((turns - low) / (high - low), 0, 1)
    divided = 1 / (kept + (1 - kept) / factor)
    # The converter computes in float32; errors of kept grow by the factor.
    if np.allclose(divided, wide, rtol=1e-4, atol=0):
      return Llama3Scaling(
          factor=factor,
          low_frequency=low,
          high_frequency=high,
          original_context=context,
      )
  raise ValueError("no llama3 scaling of rotations has these factors")


def _ends(
    turns: Float[np.ndarray, " half"], factors: Float[np.ndarray, " half"]
) -> Iterator[tuple[float, float]]:
  """Gives what low and high frequency factors may be, the likeliest first."""
  if not (factors >= 1).all() or np.isinf(factors).any():
    return
  yield 1.0, 4.0
  kept = (factors.max() / factors - 1) / (factors.max() - 1)
  between = (kept > 0) & (kept < 1)
  if between.sum() > 1:
    slope, shift = np.polyfit(turns[between], kept[between], 1)
    low, high = -shift, 1 - shift
    if slope > 0 and low > 0:
      yield float(f"{low / slope:.5g}"), float(f"{high / slope:.5g}")
