import functools

import jax
import numpy as np
import pytest
from oracles import losses as oracle

from mgrpo_jax import importance

NAMES = ("by_token", "by_sequence", "reject_sequences")
CAP = 2.0


def weights(name, *arrays):
  run = jax.jit(functools.partial(getattr(importance, name), cap=CAP))
  arrays = [np.asarray(array, np.float32) for array in arrays]
  return np.asarray(run(*arrays), np.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(30))
def test_weights_equal_their_definition(name, seed):
  rng = np.random.default_rng(seed)
  old, sampler = -rng.exponential(1.0, (2, 3, 5))
  sampler = old + (sampler - old) * rng.choice([0.01, 0.2, 1.0])
  mask = (rng.random((3, 5)) < rng.random()).astype(np.float64)
  kind = "token_ratio" if name == "by_token" else "sequence_ratio"
  ratio = getattr(oracle, kind)(old, sampler, mask)
  expected = (
      (ratio <= CAP) & (ratio >= 1 / CAP)
      if name == "reject_sequences"
      else np.minimum(ratio, CAP)
  )
  found = weights(name, old, sampler, mask)
  np.testing.assert_allclose(found, expected, rtol=3e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_no_gradient(name):
  old, ones = np.full((2, 3), -1.0, np.float32), np.ones((2, 3), np.float32)

  def total(old):
    return getattr(importance, name)(old, -1.1 * ones, ones, cap=CAP).sum()

  slope = jax.jit(jax.grad(total))(old)
  np.testing.assert_array_equal(slope, 0.0)
