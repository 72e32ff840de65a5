"""Rotary position embedding (Su et al., arXiv 2104.09864), and its stretching.

A scaling is a frozen callable on the frequencies, so models that stretch their
context differ in a value, not in code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rotation = tuple[Float[Array, "N T half"], Float[Array, "N T half"]]
Scaling = Callable[[Float[Array, " half"]], Float[Array, " half"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
  """Slows every rotation down by one factor (Chen et al., arXiv 2306.15595).

  Attributes:
    factor: by which positions shrink, >= 1.

  Raises:
    ValueError: if the factor is out of range.
  """

  factor: float

  def __post_init__(self) -> None:
    """Checks the factor."""
    _check_factor(self.factor)

  def __call__(self, frequencies: Float[Array, " half"]) -> Array:
    """Divides the frequencies.

    Args:
      frequencies: radians a token.

    Returns:
      Radians a token.
    """
    return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Slows down only rotations of long wavelength, as Llama 3.1 does.

  With wavelength λ = 2π / frequency and context C, a frequency is kept where
  λ < C / high, divided by the factor where λ > C / low, and between the two
  interpolated with the weight (C / λ - low) / (high - low).

  Attributes:
    factor: by which long wavelengths grow, >= 1.
    low_frequency: low, turns within the original context, > 0.
    high_frequency: high, > low.
    original_context: C, tokens the model was first trained on, >= 1.

  Raises:
    ValueError: if a field is out of range, naming it.
  """

  factor: float
  low_frequency: float
  high_frequency: float
  original_context: int

  def __post_init__(self) -> None:
    """Checks every field."""
    _check_factor(self.factor)
    if not 0 < self.low_frequency < self.high_frequency < math.inf:
      raise ValueError(
          "low_frequency and high_frequency must be positive and ascending,"
          f" got {self.low_frequency!r} and {self.high_frequency!r}"
      )
    if self.original_context < 1:
      raise ValueError(
          f"original_context must be >= 1, got {self.original_context!r}"
      )

  def __call__(self, frequencies: Float[Array, " half"]) -> Array:
    """Divides low frequencies, keeps high ones, interpolates between.

    Args:
      frequencies: radians a token.

    Returns:
      Radians a token.
    """
    turns = self.original_context * frequencies / (2 * math.pi)
    width = self.high_frequency - self.low_frequency
    kept = jnp.clip((turns - self.low_frequency) / width, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / self.factor)


def rotations(
    positions: Int[Array, "N T"],
    *,
    head_dim: int,
    base: float,
    scaling: Scaling | None,
) -> Rotation:
  """Computes the rotary angles' cosines and sines.

      angle[i] = position · base^(-2 i / D),   i < D / 2

  In two turns of a loop: compilers for CPUs compute a cosine anew wherever it
  is used, in every layer and even behind an optimization barrier, and leave
  alone what a loop yields.

  Args:
    positions: tokens from the start of the segment.
    head_dim: D.
    base: of the frequencies.
    scaling: of the frequencies, None for none.

  Returns:
    Cosine and sine, each [N, T, D / 2] float32.
  """
  length = positions.shape[-1]
  half = head_dim // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / half
  frequencies = base**-exponents
  if scaling is not None:
    frequencies = scaling(frequencies)

  def of_a_part(part: Int[Array, "N half_T"]) -> Rotation:
    angles = part[..., None].astype(jnp.float32) * frequencies.reshape(
        (1,) * part.ndim + (half,)
    )
    return jnp.cos(angles), jnp.sin(angles)

  even = jnp.pad(positions, ((0, 0), (0, length % 2)))
  parts = jnp.stack(jnp.split(even, 2, axis=1))
  done = jax.lax.map(of_a_part, parts)
  return jax.tree.map(
      lambda x: jnp.concatenate([x[0], x[1]], axis=1)[:, :length], done
  )


def rotate(
    x: Float[Array, "N T *heads D"], rotation: Rotation
) -> Float[Array, "N T *heads D"]:
  """Rotates pairs (i, i + D / 2) of every head, the half-split convention.

  Args:
    x: queries or keys.
    rotation: cosine and sine of the same tokens.

  Returns:
    The same shape and dtype; computed in float32.
  """
  heads = tuple(range(2, x.ndim - 1))
  cos, sin = (jnp.expand_dims(part, heads) for part in rotation)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def _check_factor(factor: float) -> None:
  """Raises unless a context grows by the factor."""
  if not 1 <= factor < math.inf:
    raise ValueError(f"factor must be >= 1, got {factor!r}")
