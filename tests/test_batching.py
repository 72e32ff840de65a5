import numpy as np

from mgrpo_jax.sampler import batching
from mgrpo_jax.sampler.slots import Slot


def test_calls_have_the_shapes_of_their_buckets():
  slots = [Slot(index=i, stream=np.arange(n)) for i, n in enumerate((5, 45, 4))]
  pieces = [
      p for s in slots for p in batching.cut(s, len(s.stream), buckets=(4, 16))
  ]
  got = list(batching.calls(pieces, call_tokens=32))
  assert [call.tokens.shape for call in got] == [
      (8, 4),
      (2, 16),
      (2, 16),
      (2, 16),
  ]
  filled = {}
  for call in got:
    for row in range(len(call.slots)):
      stream = filled.setdefault(int(call.slots[row]), [])
      if call.lengths[row]:
        assert call.starts[row] == len(stream)
      stream += call.tokens[row, : call.lengths[row]].tolist()
  assert filled == {i: list(range(n)) for i, n in enumerate((5, 45, 4))}
