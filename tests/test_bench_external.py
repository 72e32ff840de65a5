"""What the benchmark of external engines counts as equal."""

import numpy as np
import pytest

from experiments.bench.external import Tally, Turn, look_up
from mgrpo_jax.types import TrainBatch

# Two trajectories in one row; the first has two turns, 6 7 and 8.
ROW = [1, 2, 6, 7, 3, 8, 1, 5, 0, 0]
SEGMENTS = [1, 1, 1, 1, 1, 1, 2, 2, 0, 0]
MASK = [[0, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0], [0] * 6]
SAMPLER = -np.float32([[0, 0, 1, 2, 0, 3], [0, 4, 0, 0, 0, 0], [0] * 6])


def batch(**changes):
  fields = {name: np.zeros(1) for name in TrainBatch.__dataclass_fields__}
  fields |= {
      "tokens": np.asarray([ROW]),
      "segment_ids": np.asarray([SEGMENTS]),
      "row": np.zeros(3, int),
      "offset": np.asarray([0, 6, 0]),
      "loss_mask": np.float32(MASK),
      "sampler_logprobs": SAMPLER,
      "old_logprobs": SAMPLER + np.float32(0.25),
  }
  return TrainBatch(**fields | changes)


def turns():
  """What was sampled, and something that was not trained on."""
  said = {
      (1, 2): [([9, 9], [-1, -2]), ([6, 7], [-1, -2])],
      (1, 2, 6, 7, 3): [([8], [-3])],
      (1,): [([5], [-4])],
  }
  return {
      prompt: [
          Turn(tokens=tuple(ids), logprobs=np.float32(values))
          for ids, values in found
      ]
      for prompt, found in said.items()
  }


def counted(sent, **changes):
  tally = Tally()
  look_up([batch(**changes)], sent, tally)
  return tally


def test_every_token_is_found():
  found = counted(turns()).row()
  assert (found["trajectories"], found["tokens"], found["equal"]) == (2, 4, 4)
  for key in ("gap_mean", "gap_p99", "gap_max", "gap_signed"):
    assert found[key] == 0.25


@pytest.mark.parametrize(
    ("place", "lost"), [(2, 3), (3, 3), (5, 1), (0, 3), (4, 1), (7, 1)]
)
def test_another_token_or_prompt_is_not(place, lost):
  tokens = np.asarray([ROW])
  tokens[0, place] += 10
  assert counted(turns(), tokens=tokens).equal == 4 - lost


def test_another_logprob_is_not():
  other = SAMPLER.copy()
  other[0, 2] = np.nextafter(other[0, 2], 0)
  assert counted(turns(), sampler_logprobs=other).equal == 2


def test_where_nothing_passed_the_wire_nothing_is_equal():
  found = counted({})
  assert (found.sampled, found.equal) == (4, 0)
