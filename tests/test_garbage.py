"""What the garbage collector passes over, and for how long."""

import asyncio
import gc
import weakref

import pytest

from mgrpo_jax import garbage
from mgrpo_jax.sampler import warming


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


def test_what_a_warm_up_has_compiled_is_passed_over_too():
  compiled = []

  class Engine:
    """Compiles something."""

    async def warm_up(self, tell):
      gc.collect()  # so that none comes by itself before the end
      knot = Knot()
      compiled.append(weakref.ref(knot))
      tell(1, 1)

  with garbage.passed_over():
    engines = {"main": Engine()}
    asyncio.run(warming.warm_up(engines, deadline=60.0, tell=lambda _: None))
    gc.collect()
    assert compiled[0]() is not None
  gc.collect()
  assert compiled[0]() is None
