"""The scaling of Llama 3's rotations, from what GGUF keeps of it."""

import math

import numpy as np
import pytest

from mgrpo_jax.policy.load import scalings
from mgrpo_jax.policy.rotary import Llama3Scaling


def factors_of(base, head_dim, factor, low, high, context):
  """What llama.cpp's converter writes, in float32 as it computes."""
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  frequencies = np.float32(1) / np.float32(base) ** exponents
  factors = []
  for wavelength in np.float32(2 * math.pi) / frequencies:
    if wavelength < context / high:
      factors.append(1)
    elif wavelength > context / low:
      factors.append(factor)
    else:
      smooth = (np.float32(context) / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("head_dim", "numbers"),
    [
        (128, (8.0, 1.0, 4.0, 8192)),  # Llama 3.1, 3.3
        (64, (32.0, 1.0, 4.0, 8192)),  # 3.2 1B
        (128, (32.0, 1.0, 4.0, 8192)),  # 3.2 3B
        (16, (8.0, 1.0, 4.0, 8192)),  # nothing lies between the ends
        (128, (8.3, 2.0, 16.0, 8192)),
        (64, (4.0, 0.5, 32.0, 2048)),
    ],
)
def test_the_numbers_come_back(head_dim, numbers):
  factor, low, high, context = numbers
  factors = factors_of(500_000.0, head_dim, *numbers)
  found = scalings.recover(factors, base=500_000.0, context=context)
  assert found == Llama3Scaling(
      factor=factor,
      low_frequency=low,
      high_frequency=high,
      original_context=context,
  )


def test_another_context_gives_the_same_function():
  factors = factors_of(500_000.0, 128, 8.0, 1.0, 4.0, 4096)
  found = scalings.recover(factors, base=500_000.0, context=8192)
  assert (found.low_frequency, found.high_frequency) == (2.0, 8.0)
  frequencies = 500_000.0 ** -(np.arange(64, dtype=np.float32) / 64)
  # Both are computed in float32, by different operations.
  np.testing.assert_allclose(
      frequencies / factors, found(frequencies), rtol=1e-5
  )


def test_factors_of_one_are_no_scaling():
  ones = np.ones(4, np.float32)
  assert scalings.recover(ones, base=10_000.0, context=8192) is None


@pytest.mark.parametrize(
    "factors",
    [
        [2.0, 2.0, 1.0, 1.0],
        [1.0, 1.1, 1.2, 1.3],
        [1.0, 1.0, math.nan, 8.0],
        [1.0, 1.0, 8.0, math.inf],
        [0.0, 1.0, 8.0, 8.0],
        [1.0, 2.0, 2.0, 8.0],
    ],
)
def test_other_factors_are_refused(factors):
  values = np.array(factors, np.float32)
  with pytest.raises(ValueError, match="no llama3 scaling"):
    scalings.recover(values, base=500_000.0, context=8192)
