"""What the garbage collector passes over, and for how long."""

import gc
import weakref

import pytest

from mgrpo_jax import garbage


class Knot:
  """Something that refers to itself, which only a collection removes."""

  def __init__(self):
    self.itself = self


@pytest.mark.parametrize("error", [None, KeyError])
def test_what_there_is_is_passed_over_until_the_block_ends(error):
  gc.collect()
  before = weakref.ref(Knot())
  try:
    with garbage.passed_over():
      later = weakref.ref(Knot())
      gc.collect()
      assert before() is not None and later() is None
      if error:
        raise error
  except KeyError:
    pass
  assert gc.get_freeze_count() == 0
  gc.collect()
  assert before() is None
