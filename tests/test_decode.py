"""Cache and decode against the trainer's forward pass, and against itself."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy import decode, logprobs, params, sampling, transformer
from mgrpo_jax.testing.sizes import tiny_config

SLOTS, LENGTH, BLOCK, STEPS = 6, 48, 16, 5
CONFIGS = {
    "plain": tiny_config(num_kv_heads=2),
    "grouped": tiny_config(
        num_heads=6, num_kv_heads=2, head_dim=4, tied_embeddings=False
    ),
}
PLAIN = CONFIGS["plain"]
# Less than a block, and over two borders of blocks; angles of their own.
LOCAL = tiny_config(windows=(6, 19), local_rope_base=50.0)
CONFIGS["windows"] = LOCAL
CONFIGS["half"] = dataclasses.replace(PLAIN, dtype="bfloat16")

PREFILL = jax.jit(decode.prefill, static_argnames=("config",))
DECODE = jax.jit(
    decode.decode, static_argnames=("config", "num_steps", "num_rows")
)
COPY = jax.jit(caching.copy_slots)


@functools.cache
def weights(config):
  init = jax.jit(params.init, static_argnums=1)
  # large enough that what a token attends to matters
  return jax.tree.map(
      lambda x: 2 * np.asarray(x), init(jax.random.key(0), config)
  )


def empty(config, fill=0.0, rows=SLOTS):
  shapes = jax.eval_shape(
      lambda: caching.init(
          config, num_slots=SLOTS, length=LENGTH, block=BLOCK, num_rows=rows
      )
  )
  return jax.tree.map(lambda x: np.full(x.shape, fill, x.dtype), shapes)


def describe(streams, budget=STEPS, temperature=1.0, stop_ids=()):
  """Slots as the engine would describe them; streams: slot -> tokens."""
  stops = np.full((SLOTS, 8), sampling.NO_TOKEN, np.int32)
  stops[:, : len(stop_ids)] = stop_ids
  slots = decode.Slots(
      token=np.zeros(SLOTS, np.int32),
      length=np.zeros(SLOTS, np.int32),
      budget=np.zeros(SLOTS, np.int32),
      seed=np.zeros((SLOTS, 2), np.uint32),
      drawing=sampling.plainly(SLOTS),
      stop_ids=stops,
  )
  slots.drawing.temperature[:] = temperature
  for index, stream in streams.items():
    slots.token[index] = stream[-1]
    slots.length[index] = len(stream) - 1
    slots.budget[index] = budget
    slots.seed[index] = 7, sum(stream)
  return slots


def fill(config, cache, streams, width=16, rows=4):
  """Prefills all but each stream's last token, `width` tokens a time."""
  for start in range(0, LENGTH, width):
    todo = [(i, s) for i, s in streams.items() if len(s) - 1 > start]
    for first in range(0, len(todo), rows):
      tokens = np.full((rows, width), config.vocab_size - 1, np.int32)
      lengths, slots, starts = np.zeros((3, rows), np.int32)
      for row, (index, stream) in enumerate(todo[first : first + rows]):
        piece = stream[start : min(start + width, len(stream) - 1)]
        tokens[row, : len(piece)] = piece
        lengths[row], slots[row], starts[row] = len(piece), index, start
      cache = PREFILL(
          weights(config), cache, tokens, lengths, slots, starts,
          config=config,
      )  # fmt: skip
  return cache


def run(config, cache, slots, steps=STEPS, rows=4):
  if cache.tile is None or len(cache.tile.layers[0][0].keys) != rows:
    tile = empty(config, fill=1e3, rows=rows).tile  # whatever stood there
    cache = dataclasses.replace(cache, tile=tile)
  cache, drawn = DECODE(
      weights(config), cache, slots, config=config, num_steps=steps,
      num_rows=rows,
  )  # fmt: skip
  return cache, np.asarray(drawn.tokens), np.asarray(drawn.logprobs)


def streams(seed, sizes, vocab=60):
  rng = np.random.default_rng(seed)
  return {i: rng.integers(0, vocab, n).tolist() for i, n in sizes.items()}


def trainer_logprobs(config, stream, temperature):
  tokens = np.zeros((1, LENGTH), np.int32)
  tokens[0, : len(stream)] = stream
  segments = (np.arange(LENGTH) < len(stream)).astype(np.int32)[None]
  score = jax.jit(
      logprobs.token_logprobs, static_argnames=("config", "temperature")
  )
  positions = np.arange(LENGTH, dtype=np.int32)[None]
  return np.asarray(
      score(
          weights(config), tokens, positions, segments, config=config,
          temperature=temperature,
      )  # fmt: skip
  )[0, : len(stream)]


@pytest.mark.parametrize("rows", [4, SLOTS])
@pytest.mark.parametrize(
    "name, temperature, tolerance",
    [
        ("plain", 1.0, 1e-4),  # float32, sums in another order
        ("grouped", 0.7, 1e-4),
        ("half", 1.0, 0.2),  # bfloat16: 8 bits in each of 2 layers
        ("windows", 1.0, 1e-4),
    ],
)
def test_sampled_logprobs_are_the_trainers(name, temperature, tolerance, rows):
  config = CONFIGS[name]
  # one token; a block less, exactly and more than filled; until the very end
  all_streams = streams(0, {0: 1, 1: 16, 2: 17, 4: 18, 5: LENGTH - 2 * STEPS})
  cache = fill(config, empty(config), all_streams)
  for _ in range(2):  # the second visit attends to what the first wrote
    slots = describe(all_streams, temperature=temperature)
    cache, tokens, logp = run(config, cache, slots, rows=rows)
    assert (tokens[:, 3] == sampling.NO_TOKEN).all()
    for index, stream in all_streams.items():
      stream += tokens[:, index].tolist()
      expected = trainer_logprobs(config, stream, temperature)[-STEPS:]
      np.testing.assert_allclose(logp[:, index], expected, atol=tolerance)


def test_greedy_tokens_are_the_argmax_of_the_trainers_logits():
  all_streams = streams(1, {1: 20, 3: 5})
  cache = fill(PLAIN, empty(PLAIN), all_streams)
  slots = describe(all_streams, temperature=0.0)
  _, tokens, _ = run(PLAIN, cache, slots)
  forward = jax.jit(transformer.apply, static_argnames=("config",))
  for index, stream in all_streams.items():
    whole = np.zeros((1, LENGTH), np.int32)
    text = stream + tokens[:, index].tolist()
    whole[0, : len(text)] = text
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    logits = np.asarray(
        forward(
            weights(PLAIN), whole, positions, np.ones_like(whole), config=PLAIN
        )
    )[0, len(stream) - 1 : len(text) - 1]
    np.testing.assert_array_equal(logits.argmax(axis=1), tokens[:, index])


@pytest.mark.parametrize(
    ("config", "seed"),
    [(PLAIN, 0), (PLAIN, 1), (PLAIN, 2), (PLAIN, 3), (LOCAL, 4), (LOCAL, 5)],
)
@pytest.mark.parametrize("rows", [1, 4, SLOTS])
def test_a_stream_does_not_notice_the_others(config, seed, rows):
  rng = np.random.default_rng(seed)
  mine = streams(seed, {0: int(rng.integers(1, 40))})[0]
  cache = fill(config, empty(config), {2: mine})
  cache, first, logp = run(config, cache, describe({2: mine}), rows=rows)
  grown = mine + first[:, 2].tolist()
  _, second, _ = run(config, cache, describe({2: grown}), rows=rows)

  place = int(rng.integers(SLOTS))
  others = streams(
      seed + 50,
      {i: int(rng.integers(1, 40)) for i in range(SLOTS) if i != place},
  )
  crowd = dict(sorted((others | {place: mine}).items()))
  cache = fill(config, empty(config, fill=3.0), crowd)
  cache, tokens, crowd_logp = run(config, cache, describe(crowd), rows=rows)
  np.testing.assert_array_equal(tokens[:, place], first[:, 2])
  np.testing.assert_array_equal(crowd_logp[:, place], logp[:, 2])
  for index in crowd:
    crowd[index] = crowd[index] + tokens[:, index].tolist()
  _, tokens, _ = run(config, cache, describe(crowd), rows=rows)
  np.testing.assert_array_equal(tokens[:, place], second[:, 2])


def test_a_tile_reads_no_further_than_its_longest_stream():
  mine = streams(13, {0: 5, 1: 40, 3: 3, 4: 38})
  cache = fill(PLAIN, empty(PLAIN), mine)
  clean = run(PLAIN, cache, describe(mine), rows=2)

  cache = jax.tree.map(np.array, cache)
  for layer in cache.layers:
    for side in jax.tree.leaves(layer[1:]):
      side[[0, 3]] = np.nan  # behind the first block of the short streams
  with jax.debug_nans(False):
    together = run(PLAIN, cache, describe(mine), rows=4)
    apart = run(PLAIN, cache, describe(mine), rows=2)
  np.testing.assert_array_equal(apart[1], clean[1])
  np.testing.assert_array_equal(apart[2], clean[2])
  assert np.isnan(together[2][:, [0, 3]]).all()


def without_first_block(cache):
  """The cache with NaN in the first block of every layer."""

  def poison(blocks):
    first = jax.tree.map(lambda side: np.full_like(side, np.nan), blocks[0])
    return first, *blocks[1:]

  return dataclasses.replace(cache, layers=tuple(map(poison, cache.layers)))


def test_blocks_before_every_window_are_not_read():
  # The next token of 40 sees 21 and later: nothing of the first of 3 blocks.
  mine = streams(11, {2: 40})
  cache = fill(LOCAL, empty(LOCAL), mine)
  clean = run(LOCAL, cache, describe(mine))
  poisoned = without_first_block(cache)
  with jax.debug_nans(False):
    _, tokens, logp = run(LOCAL, poisoned, describe(mine))
    # An idle slot's old length does not make it read; a short stream does.
    slots = describe(mine)
    slots.length[4] = 3
    _, _, beside_idle = run(LOCAL, poisoned, slots)
    _, _, beside_short = run(LOCAL, poisoned, describe(mine | {5: [1, 2, 3]}))
  np.testing.assert_array_equal(tokens, clean[1])
  np.testing.assert_array_equal(logp, clean[2])
  np.testing.assert_array_equal(beside_idle[:, 2], logp[:, 2])
  assert np.isnan(beside_short[:, 5]).all()


def test_prefill_does_not_read_blocks_before_every_window():
  mine = streams(12, {1: 48})
  prefix = {1: mine[1][:37]}
  cache = fill(LOCAL, empty(LOCAL), prefix, rows=2)
  # Tokens 36 and later see 18 and later.
  rest = np.zeros((2, 16), np.int32)
  rest[0, :11] = mine[1][36:47]
  where = np.int32([11, 0]), np.int32([1, 0]), np.int32([36, 0])
  poisoned = without_first_block(cache)
  with jax.debug_nans(False):
    clean, dirty = (
        PREFILL(weights(LOCAL), one, rest, *where, config=LOCAL)
        for one in (cache, poisoned)
    )
  for left, right in zip(clean.layers, dirty.layers, strict=True):
    jax.tree.map(np.testing.assert_array_equal, left[1:], right[1:])


def test_a_slot_stops_alone():
  all_streams = streams(9, {0: 4, 1: 9})
  cache = fill(PLAIN, empty(PLAIN), all_streams)
  _, free, _ = run(PLAIN, cache, describe(all_streams))
  stop = int(free[2, 0])
  assert stop not in free[:2, 0] and stop not in free[:, 1]
  after, tokens, logp = run(
      PLAIN, cache, describe(all_streams, stop_ids=(60, stop))
  )
  assert tokens[:, 0].tolist() == [*free[:3, 0], -1, -1]
  np.testing.assert_array_equal(tokens[:, 1], free[:, 1])
  assert (logp[3:, 0] == 0).all() and (logp[:3, 0] < 0).all()
  # three fed tokens were written, nothing after them
  first = after.layers[0][0]
  for side, axis in ((first.keys, 3), (first.values, 2)):
    heads = np.moveaxis(np.asarray(side), axis, 2)[0]
    assert (heads[:, 3:6] != 0).any(axis=(0, 2)).all()
    assert (heads[:, 6:] == 0).all()


def test_a_budget_ends_a_slot():
  all_streams = streams(4, {0: 4, 5: 9})
  cache = fill(PLAIN, empty(PLAIN), all_streams)
  slots = describe(all_streams)
  slots.budget[0] = 2
  _, tokens, _ = run(PLAIN, cache, slots)
  assert (tokens[:2, 0] >= 0).all() and (tokens[2:, 0] == -1).all()
  assert (tokens[:, 5] >= 0).all()


def test_prefill_writes_its_tokens_and_no_others():
  marked = empty(PLAIN, fill=9.0)
  cache = fill(PLAIN, marked, streams(5, {4: LENGTH}), width=20)
  for block in jax.tree.leaves(jax.tree.map(np.asarray, cache)):
    assert (block[[0, 1, 2, 3, 5]] == 9.0).all()
  last = np.asarray(cache.layers[1][-1].values)[4]
  assert (last[:, :-1] != 9.0).any(axis=(0, 2)).all()
  assert (last[:, -1] == 9.0).all()  # the token that is left to decode


def test_copied_slots_go_on_alike():
  all_streams = streams(6, {1: 30})
  cache = fill(PLAIN, empty(PLAIN), all_streams)
  pairs = np.asarray([[1, 4], [4, 0], [4, 0]], np.int32)
  cache = COPY(cache, pairs[:, 0], pairs[:, 1])
  same = {i: all_streams[1] for i in (0, 1, 4)}
  _, tokens, logp = run(PLAIN, cache, describe(same))
  for index in (0, 4):
    np.testing.assert_array_equal(tokens[:, index], tokens[:, 1])
    np.testing.assert_array_equal(logp[:, index], logp[:, 1])


@pytest.mark.parametrize("program", ["prefill", "decode", "tiles", "copy"])
@jax.debug_nans(False)  # which would keep every donated argument
def test_a_donated_cache_is_updated_in_place(program):
  cache = jax.eval_shape(
      lambda: caching.init(
          PLAIN,
          num_slots=64,
          length=512,
          block=128,
          num_rows=24 if program == "tiles" else 64,
      )
  )
  weight = params.abstract(PLAIN)
  ints = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
  if program == "prefill":
    function = functools.partial(decode.prefill, config=PLAIN)
    rows = (ints((2,)),) * 3
    lowered = jax.jit(function, donate_argnums=1).lower(
        weight, cache, ints((2, 16)), *rows
    )
  elif program in ("decode", "tiles"):
    rows = 64 if program == "decode" else 24
    function = functools.partial(
        decode.decode, config=PLAIN, num_steps=4, num_rows=rows
    )
    slots = jax.eval_shape(
        lambda: decode.Slots(
            *(np.zeros(64, np.int32),) * 3,
            np.zeros((64, 2), np.uint32),
            sampling.plainly(64),
            np.zeros((64, 8), np.int32),
        )
    )
    lowered = jax.jit(function, donate_argnums=1).lower(weight, cache, slots)
  else:
    function = jax.jit(caching.copy_slots, donate_argnums=0)
    lowered = function.lower(cache, ints((8,)), ints((8,)))
  text = lowered.compile().as_text()
  assert text.count("may-alias") >= len(jax.tree.leaves(cache))
  assert not re.findall(r"= f32\[64,2,(?:128,8|8,128)\]\S* copy\(", text)


@pytest.mark.parametrize("name", ["num_slots", "length", "block", "num_rows"])
def test_sizes_of_the_cache_are_positive(name):
  sizes = {"num_slots": 1, "length": 1, "block": 1, "num_rows": 1}
  with pytest.raises(ValueError, match=name):
    caching.init(PLAIN, **sizes | {name: 0})


def test_a_tile_has_a_place_of_its_size():
  with pytest.raises(ValueError, match="num_rows=4"):
    decode.decode(
        weights(PLAIN), empty(PLAIN, rows=3), describe({0: [1, 2]}),
        config=PLAIN, num_steps=1, num_rows=4,
    )  # fmt: skip
