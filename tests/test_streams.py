"""Attention of a CPU's own to streams: exact, and alike for all."""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
from compiled import needs_compiler

from mgrpo_jax import sharding
from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy import decode, params
from mgrpo_jax.policy.cache import Block
from mgrpo_jax.policy.config import Execution
from mgrpo_jax.policy.native import build, streams, targets
from mgrpo_jax.sampler.engine import Engine

pytestmark = needs_compiler
SIZES = {
    "num_slots": 2,
    "context": 16,
    "block": 8,
    "prefill_tokens": 8,
    "prefill_buckets": (8,),
    "decode_steps": 2,
    "decode_rows": 0,
}


@functools.cache
def program(window):
  build.library()
  return jax.jit(functools.partial(streams.attend, window=window))


@dataclasses.dataclass(frozen=True)
class Streams:
  """S streams of Hkv heads, G queries each; C tokens in each of B blocks.

  `steps` tokens of each are beside the cache, `new` of which attend.
  """

  slots: int
  heads: int
  group: int
  dim: int
  size: int
  blocks: int
  steps: int
  new: int = 1

  def drawn(self, seed=0):
    """Queries, and keys and values of all blocks, the last beside the cache."""
    rng = np.random.default_rng(seed)
    shape = (self.slots, self.new, self.heads, self.group, self.dim)
    query = rng.normal(size=shape)
    sides = [
        rng.normal(size=(2, self.slots, self.heads, size, self.dim))
        for size in [self.size] * self.blocks + [self.steps]
    ]
    return (one.astype(np.float32) for one in (query, *sides))

  def lengths(self, seed=0):
    """None in the first slot, all in the second."""
    most = self.size * self.blocks
    lengths = np.random.default_rng(seed).integers(0, most + 1, self.slots)
    lengths[: min(2, self.slots)] = [0, most][: min(2, self.slots)]
    return lengths.astype(np.int32)


def block(side):
  keys, values = side
  return Block(np.swapaxes(keys, 2, 3), values, "dc")


def attend(query, sides, lengths, step, *, window=0, slots=None):
  *cached, own = map(block, sides)
  arguments = (query, tuple(cached), own, lengths, np.int32(step))
  return np.asarray(program(window)(*arguments, slots=slots))


def expected(query, sides, lengths, step, *, window=0, slots=None):
  """The same in float64, token by token."""
  found = np.empty(query.shape)
  for row, token, head in np.ndindex(query.shape[:3]):
    slot = row if slots is None else slots[row]
    keys, values = (
        np.concatenate(
            [
                np.concatenate([one[k, slot, head] for one in sides[:-1]])[
                    : lengths[row]
                ],
                sides[-1][k, row, head, : step + token + 1],
            ]
        ).astype(np.float64)[-window:]
        for k in (0, 1)
    )
    scores = query[row, token, head] @ keys.T
    weights = np.exp(scores - np.max(scores, axis=1, keepdims=True))
    weights /= np.sum(weights, axis=1, keepdims=True)
    found[row, token, head] = weights @ values
  return found


@pytest.mark.parametrize("window", [0, 1, 5, 70])
@pytest.mark.parametrize(
    "shape",
    [
        Streams(5, 3, 3, 64, 64, 2, 8),  # SmolLM2's
        Streams(4, 2, 1, 24, 16, 3, 5),
        Streams(3, 1, 8, 128, 32, 4, 8),  # queries in two parts
        Streams(3, 2, 5, 12, 7, 3, 3),  # nothing fits a register
        Streams(4, 3, 4, 65, 100, 2, 9),  # blocks of more than a piece
        Streams(3, 1, 2, 33, 1, 4, 1),
        Streams(2, 1, 16, 1, 200, 1, 65),
        Streams(3, 3, 3, 64, 64, 2, 33, new=33),  # prefill
        Streams(4, 2, 5, 12, 7, 3, 11, new=4),
        Streams(1, 1, 1, 8, 16, 1, 130, new=130),
    ],
    ids=str,
)
def test_means_are_those_of_softmax_over_what_is_seen(shape, window):
  query, *sides = shape.drawn()
  lengths = shape.lengths()
  picked = np.random.default_rng(2).permutation(shape.slots).astype(np.int32)
  latest = shape.steps - shape.new
  for step, slots in ((0, None), (latest // 2, picked), (latest, None)):
    more = {"window": window, "slots": slots}
    found = attend(query, sides, lengths, step, **more)
    assert found.shape == query.shape and found.dtype == np.float32
    np.testing.assert_allclose(
        found,
        expected(query, sides, lengths, step, **more),
        # Scores of some tens round in the sixth place, and exp keeps that.
        rtol=2e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("window", [0, 9])
def test_tokens_attend_together_as_they_do_one_by_one(window):
  shape = Streams(4, 2, 3, 24, 16, 2, 20, new=18)
  query, *sides = shape.drawn()
  lengths, slots = shape.lengths(), np.array([3, 1, 0, 2], np.int32)
  more = {"window": window, "slots": slots}
  together = attend(query, sides, lengths, 2, **more)
  for token in range(shape.new):
    alone = query[:, token : token + 1]
    found = attend(alone, sides, lengths, 2 + token, **more)
    np.testing.assert_array_equal(found[:, 0], together[:, token])


def test_rows_may_be_fewer_than_slots_and_none():
  shape = Streams(5, 2, 3, 16, 8, 2, 6, new=6)
  query, *sides = shape.drawn()
  lengths, slots = shape.lengths(), np.array([4, 0, 2], np.int32)
  all_of_them = attend(query, sides, lengths, 0)
  own = sides[-1][:, slots]
  some = attend(
      query[slots], [*sides[:-1], own], lengths[slots], 0, slots=slots
  )
  np.testing.assert_array_equal(some, all_of_them[slots])
  none = attend(
      query[:0], [*sides[:-1], own[:, :0]], lengths[:0], 0, slots=slots[:0]
  )
  assert none.shape == query[:0].shape


def test_two_tokens_by_hand():
  """Scores 0 and log 3: weights a quarter and three."""
  own = Block(
      np.array([[[[0.0, np.log(3.0)]]]], np.float32),
      np.array([[[[4.0], [8.0]]]], np.float32),
      "dc",
  )
  query, lengths = np.ones((1, 1, 1, 1, 1), np.float32), np.zeros(1, np.int32)
  found = program(0)(query, (), own, lengths, np.int32(1))
  assert found.item() == pytest.approx(7.0)


@pytest.mark.parametrize("high", [86.0, 88.0, 1e4, 1e20])
def test_what_is_far_below_the_best_score_weighs_nothing(high):
  scores = np.array([0.0, high, high, -high], np.float32)
  own = Block(
      scores.reshape(1, 1, 1, 4),
      np.array([1e38, 2.0, 4.0, 1e38], np.float32).reshape(1, 1, 4, 1),
      "dc",
  )
  query, lengths = np.ones((1, 1, 1, 1, 1), np.float32), np.zeros(1, np.int32)
  found = program(0)(query, (), own, lengths, np.int32(3)).item()
  if high < 87:
    assert found == pytest.approx(3.0 + 0.5e38 * np.exp(-high), rel=1e-5)
  else:
    assert found == 3.0


@pytest.mark.parametrize("window", [0, 21])
def test_others_change_no_bit_nor_does_what_is_not_seen(window):
  shape = Streams(7, 2, 3, 24, 16, 5, 6)
  query, *sides = shape.drawn()
  lengths = shape.lengths(1)
  together = attend(query, sides, lengths, 3, window=window)
  for slot in range(shape.slots):
    mine = slice(slot, slot + 1)
    used = -(-lengths[slot] // shape.size) or 1  # no more blocks than needed
    alone = [one[:, mine].copy() for one in (*sides[:used], sides[-1])]
    alone[-1][:, :, :, 4:] = np.nan
    for at, one in enumerate(alone[:-1]):
      one[:, :, :, max(0, lengths[slot] - at * shape.size) :] = np.nan
      before = lengths[slot] + 4 - window if window else 0
      one[:, :, :, : max(0, before - at * shape.size)] = np.nan
    found = attend(query[mine], alone, lengths[mine], 3, window=window)
    np.testing.assert_array_equal(found[0], together[slot])


def test_what_is_not_finite_stays_with_its_query():
  shape = Streams(3, 2, 5, 16, 8, 2, 4)
  query, *sides = shape.drawn()
  whole = attend(query, sides, shape.lengths(), 3)
  query[1, 0, 1, 2, 3] = np.nan
  query[2, 0, 0, 4, :] = np.inf
  with jax.debug_nans(False):
    found = attend(query, sides, shape.lengths(), 3)
  bad = np.isnan(found).all(axis=-1)
  np.testing.assert_array_equal(bad, np.isnan(found).any(axis=-1))
  assert bad[1, 0, 1, 2] and bad[2, 0, 0, 4] and np.sum(bad) == 2
  np.testing.assert_array_equal(found[~bad], whole[~bad])


def test_in_half_precision_only_queries_and_means_are_rounded():
  shape = Streams(3, 1, 3, 16, 8, 2, 4)
  query, *sides = shape.drawn()
  short = jnp.asarray(query, jnp.bfloat16)
  *cached, own = map(block, sides)
  found = program(0)(short, tuple(cached), own, shape.lengths(), np.int32(3))
  assert found.dtype == jnp.bfloat16
  exact = attend(np.asarray(short, np.float32), sides, shape.lengths(), 3)
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_many_programs_at_once_all_come_to_their_end():
  """More than there are threads, so some find their helpers busy."""
  shape = Streams(9, 3, 3, 64, 64, 2, 8)
  query, *sides = shape.drawn()
  wanted = attend(query, sides, shape.lengths(), 7)
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    done = pool.map(
        lambda _: attend(query, sides, shape.lengths(), 7),
        range(200),
        timeout=120,
    )
    for found in done:
      np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "slots",
    [
        [0, 1],
        [0, 1, 2, 0],
        [0, 1, 3],
        [0, 1, -1],
        [0, 1, 2**31 - 1],
        [0, 1, -(2**31)],
    ],
)
def test_slots_that_are_not_there_are_refused(slots):
  shape = Streams(3, 2, 3, 16, 8, 2, 4, new=4)
  query, *sides = shape.drawn()
  slots = np.array(slots, np.int32)
  with pytest.raises(Exception, match="do not belong together"):
    attend(query, sides, shape.lengths(), 0, slots=slots)


@pytest.mark.parametrize("step", [1, -1, 2**31 - 4])
def test_more_tokens_than_there_are_are_refused(step):
  shape = Streams(3, 2, 3, 16, 8, 2, 4, new=4)
  query, *sides = shape.drawn()
  with pytest.raises(Exception, match="do not belong together"):
    attend(query, sides, shape.lengths(), step)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda query, sides, lengths: (query, sides, lengths, 4),
        lambda query, sides, lengths: (query, sides, lengths, -1),
        lambda query, sides, lengths: (query, sides, lengths[1:], 3),
        lambda query, sides, lengths: (query[1:], sides, lengths[1:], 3),
        lambda query, sides, lengths: (query[..., 1:], sides, lengths, 3),
        lambda query, sides, lengths: (query[:, :, 1:], sides, lengths, 3),
    ],
    ids=["late", "early", "lengths", "streams", "dim", "heads"],
)
def test_what_does_not_belong_together_is_refused(spoil):
  shape = Streams(3, 2, 3, 16, 8, 2, 4)
  query, *sides = shape.drawn()
  arguments = spoil(query, sides, shape.lengths())
  with pytest.raises(Exception, match="do not belong together"):
    attend(*arguments)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    "cut",
    [
        np.s_[:-1],
        np.s_[:, :-1],
        np.s_[:, :, :-1],
        np.s_[:, :, :, :-1],
    ],
    ids=["slots", "heads", "size", "dim"],
)
def test_values_that_are_not_those_of_the_keys_are_refused(at, cut):
  shape = Streams(3, 2, 3, 16, 8, 2, 4)
  query, *sides = shape.drawn()
  blocks = [block(side) for side in sides]
  blocks[at] = dataclasses.replace(blocks[at], values=blocks[at].values[cut])
  with pytest.raises(Exception, match="do not belong together"):
    program(0)(query, blocks[:-1], blocks[-1], shape.lengths(), np.int32(3))


def test_every_block_has_a_place_for_every_slot():
  shape = Streams(3, 2, 3, 16, 8, 2, 4)
  query, *sides = shape.drawn()
  sides[1] = sides[1][:, :2]
  with pytest.raises(Exception, match="do not belong together"):
    attend(query, sides, shape.lengths(), 3)


def test_the_exponential_is_as_exact_as_its_polynomial():
  """Weights of scores 0 and x: e^x / (1 + e^x)."""
  low = -np.linspace(0, 86, 20001).astype(np.float32)
  keys, values = np.zeros((2, len(low), 1, 2, 1), np.float32)
  keys[:, 0, 1, 0], values[:, 0, 1, 0] = low, 1
  query, none = np.ones((len(low), 1, 1, 1, 1), np.float32), np.zeros(len(low))
  found = attend(query, [[keys, values]], none.astype(np.int32), 1).ravel()
  exact = np.exp(low.astype(np.float64))
  np.testing.assert_allclose(found, exact / (1 + exact), rtol=2.3e-7)


def test_windows_and_blocks_of_another_kind_are_refused():
  shape = Streams(3, 2, 3, 8, 8, 2, 8)
  query, *sides = shape.drawn()
  with pytest.raises(Exception, match="do not belong together"):
    attend(query, sides, shape.lengths(), 3, window=-1)
  blocks = [block(side) for side in sides]
  for wrong in (
      dataclasses.replace(blocks[0], order="cd"),
      jax.tree.map(lambda x: x.astype(jnp.bfloat16), blocks[0]),
  ):
    for some in ((wrong, *blocks[1:]), (*blocks[:-1], wrong)):
      with pytest.raises(ValueError, match="blocks must be float32, keys in"):
        program(0)(query, some[:-1], some[-1], shape.lengths(), np.int32(3))


def test_lengths_below_nothing_are_nothing():
  shape = Streams(3, 2, 3, 16, 8, 2, 4)
  query, *sides = shape.drawn()
  nothing = np.zeros(3, np.int32)
  np.testing.assert_array_equal(
      attend(query, sides, nothing - 5, 3), attend(query, sides, nothing, 3)
  )


def test_a_program_once_compiled_serves_any_lengths():
  shape = Streams(6, 1, 2, 16, 8, 3, 4)
  query, *sides = shape.drawn()
  before = program(0)._cache_size()
  for seed in range(3):
    for step in range(4):
      attend(query, sides, shape.lengths(seed), step)
  assert program(0)._cache_size() == before + 1


def config(**changes):
  return tiny_llama.config(
      **{"execution": Execution(decode_attention=streams.ATTENTION)} | changes
  )


def test_prompts_attend_by_it():
  small = config()
  shapes = jax.eval_shape(
      functools.partial(params.init, config=small), jax.random.key(0)
  )
  cache = jax.eval_shape(
      functools.partial(
          caching.init, small, num_slots=3, length=16, block=8, num_rows=3
      )
  )
  whole = functools.partial(decode.prefill, config=small)
  rows = jax.ShapeDtypeStruct((2,), jnp.int32)
  tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
  made = jax.jit(whole).lower(shapes, cache, tokens, rows, rows, rows)
  calls = made.as_text().count(f"@{targets.ATTEND_STREAMS}")
  # The last layer's keys are cached; nobody looks at what it attended to.
  assert calls == small.num_layers - 1


def test_it_is_for_a_float32_cache_on_one_device():
  half = config(dtype="bfloat16")
  with pytest.raises(ValueError, match="a cache in float32 .*, not bfloat16"):
    Engine(half, None, 0, **SIZES)
  mesh = sharding.sampler_mesh(jax.devices()[:2])
  with pytest.raises(ValueError, match="a sampler of one device, not 2"):
    Engine(config(), None, 0, mesh=mesh, **SIZES)
