"""Generation with a key-value cache, on the trainer's own layers.

S slots each hold one token stream. `prefill` adds many tokens to some of the
slots, `decode` samples a few tokens for all of them.

A stream's numbers depend on that stream only, bit for bit on the CPU, whatever
stands in the other slots. Three rules keep it so. Every product has a fixed
shape. Cache that a stream does not fill adds exact zeros (`policy.online`). And
the tokens of a visit are kept beside the cache until the visit ends: how a
stream's sums are associated follows from where its own visits began, and a
request always begins with a visit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy import online, paged, sampling, transformer
from mgrpo_jax.policy.cache import Blocks, KVCache
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.rotary import Rotation
from mgrpo_jax.policy.sampling import Drawing


@flax.struct.dataclass
class Slots:
  """What a visit needs to know about each of S slots, on host or device."""

  token: Any  # [S] int32, the newest token, not yet in the cache
  length: Any  # [S] int32, tokens in the cache; the position of `token`
  budget: Any  # [S] int32, tokens to sample at most; 0 where idle
  seed: Any  # [S, 2] uint32, see `sampling.split_seed`
  drawing: Drawing
  stop_ids: Any  # [S, J] int32, padded with NO_TOKEN


@flax.struct.dataclass
class Drawn:
  """What a visit of N steps sampled in S slots, see `sampling.sample`."""

  tokens: Any  # [N, S] int32, NO_TOKEN where idle or stopped
  logprobs: Any  # [N, S] float32, nats, under what was sampled from
  raw_logprobs: Any  # [N, S] float32, nats, under the softmax of the logits


@flax.struct.dataclass
class _Visit:
  """What changes from step to step of a tile; R slots, N steps."""

  step: jax.Array  # [] int32
  token: jax.Array  # [R] int32
  running: jax.Array  # [R] bool
  own: Blocks  # L, of R streams and N tokens
  drawn: Drawn  # [N, R]


def prefill(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "P T"],
    lengths: Int[Array, " P"],
    slots: Int[Array, " P"],
    starts: Int[Array, " P"],
    *,
    config: TransformerConfig,
) -> KVCache:
  """Adds tokens to the cache of some slots.

  No logits: the last token of a prompt is left to `decode`, which samples what
  follows it.

  Args:
    params: weights.
    cache: where `starts[p]` tokens of row p's slot already stand.
    tokens: [P, T] int32, what follows, padded with any ids.
    lengths: [P] int32, real tokens of each row; 0 leaves the slot as it is.
    slots: [P] int32, distinct where lengths are positive.
    starts: [P] int32, 0 where the length is 0.
    config: sizes.

  Returns:
    The cache with `starts[p] + lengths[p]` tokens in row p's slot.
  """
  width = tokens.shape[1]
  offsets = jnp.arange(width, dtype=jnp.int32)
  positions = starts[:, None] + offsets[None]
  attend = _attention(config)
  rotation = transformer.rotations(positions, config=config)
  x = transformer.embed(params, tokens, config=config)
  own = []
  for index, layer in enumerate(params.layers):
    window = config.window(index)
    query, key, value = paged.widened(
        transformer.project(layer, x, rotation[window > 0], config=config),
        config=config,
    )
    own.append(caching.arranged(key, value, config=config))
    mean = attend(
        query,
        cache.layers[index],
        own[-1],
        starts,
        jnp.int32(0),
        window=window,
        slots=slots,
    )
    mean = paged.narrowed(mean, config=config)
    x = transformer.finish(layer, x, mean, config=config)
  return caching.write(cache, tuple(own), slots, starts, lengths)


def decode(
    params: Params,
    cache: KVCache,
    slots: Slots,
    *,
    config: TransformerConfig,
    num_steps: int,
    num_rows: int,
) -> tuple[KVCache, Drawn]:
  """Samples up to N tokens for every slot that has a budget.

  Slots are computed in tiles of R, those with a budget first and the longest
  first among them: what slots without one cost is at most the rest of a tile,
  a tile ends with the last of its own streams, and reads no more blocks of
  cache than its longest fills. A tile of all slots reads the cache where it
  stands; smaller ones copy what they read to one place first.

  Args:
    params: weights.
    cache: `slots.length` tokens in each slot; with a tile of R slots where R
      is less than S.
    slots: what to sample.
    config: sizes.
    num_steps: N; fewer are computed once every slot has stopped.
    num_rows: R, 1 to S; products of another R may round differently.

  Returns:
    The cache and what was sampled. A slot that sampled n tokens has n more of
    them in its cache; the newest is not among those.
  """
  num_slots = len(slots.token)
  if num_rows == num_slots:
    every = jnp.arange(num_slots, dtype=jnp.int32)
    visit = _run_steps(params, cache, slots, config, num_steps)
    return _written(cache, visit, every, slots), visit.drawn
  running = slots.budget > 0
  order = jnp.argsort(jnp.where(running, -slots.length, 1)).astype(jnp.int32)
  order = jnp.pad(order, (0, -num_slots % num_rows), constant_values=num_slots)

  def add_tile(
      number: Array, done: tuple[KVCache, Drawn]
  ) -> tuple[KVCache, Drawn]:
    cache, drawn = done
    rows = jax.lax.dynamic_slice_in_dim(order, number * num_rows, num_rows)
    tile = jax.tree.map(
        # A row beyond the last slot has budget 0.
        lambda x: jnp.asarray(x).at[rows].get(mode="fill", fill_value=0),
        slots,
    )
    held = caching.take(cache, rows, _lengths(tile))
    cache = dataclasses.replace(cache, tile=held)
    visit = _run_steps(params, held, tile, config, num_steps)
    return _written(cache, visit, rows, tile), jax.tree.map(
        lambda every, some: every.at[:, rows].set(some, mode="drop"),
        drawn,
        visit.drawn,
    )

  return jax.lax.fori_loop(
      0,
      (jnp.sum(running) + num_rows - 1) // num_rows,
      add_tile,
      (cache, _nothing(num_steps, num_slots)),
  )


def _attention(config: TransformerConfig) -> Callable[..., Array]:
  """How tokens attend to their streams, see `online.attend_streams`."""
  kernel = config.execution.decode_attention
  return online.attend_streams if kernel is None else kernel.attend


def _written(
    cache: KVCache, visit: _Visit, rows: Int[Array, " R"], slots: Slots
) -> KVCache:
  """The cache with what a visit has fed in R of its rows."""
  was_drawn = visit.drawn.tokens != sampling.NO_TOKEN
  added = jnp.sum(was_drawn, axis=0, dtype=jnp.int32)
  return caching.write(cache, visit.own, rows, slots.length, added)


def _lengths(slots: Slots) -> Int[Array, " R"]:
  """Tokens that each slot's queries see in the cache; none in idle ones."""
  return jnp.where(slots.budget > 0, slots.length, 0)


def _nothing(num_steps: int, num_slots: int) -> Drawn:
  """What no slot has sampled yet."""
  shape = (num_steps, num_slots)
  return Drawn(
      tokens=jnp.full(shape, sampling.NO_TOKEN, jnp.int32),
      logprobs=jnp.zeros(shape, jnp.float32),
      raw_logprobs=jnp.zeros(shape, jnp.float32),
  )


def _run_steps(
    params: Params,
    cache: KVCache,
    slots: Slots,
    config: TransformerConfig,
    num_steps: int,
) -> _Visit:
  """Samples without touching the cache."""
  num_slots = len(slots.token)
  steps = jnp.arange(num_steps, dtype=jnp.int32)[:, None]
  uniform = sampling.uniforms(
      jnp.broadcast_to(slots.seed[None], (num_steps, num_slots, 2)),
      slots.length[None] + 1 + steps,
  )
  # Of all steps before the first: in a step, every layer would compute its own.
  rotations = jax.vmap(functools.partial(transformer.rotations, config=config))(
      (slots.length[None] + steps)[:, :, None]
  )
  first = _Visit(
      step=jnp.int32(0),
      token=slots.token,
      running=slots.budget > 0,
      own=tuple(
          caching.empty(config, streams=num_slots, size=num_steps)
          for _ in params.layers
      ),
      drawn=_nothing(num_steps, num_slots),
  )
  slots = dataclasses.replace(slots, drawing=slots.drawing.where(first.running))
  return jax.lax.while_loop(
      lambda visit: (visit.step < num_steps) & jnp.any(visit.running),
      functools.partial(
          _step, params, cache, slots, uniform, rotations, config=config
      ),
      first,
  )


def _step(
    params: Params,
    cache: KVCache,
    slots: Slots,
    uniform: Float[Array, "N R"],
    rotations: tuple[Rotation, Rotation],
    visit: _Visit,
    *,
    config: TransformerConfig,
) -> _Visit:
  """Samples one token for every running slot."""
  step = visit.step
  visit, hidden = _forward(
      params,
      cache,
      slots,
      jax.tree.map(lambda part: part[step], rotations),
      visit,
      config,
  )
  logits = transformer.unembed(params, hidden, config=config)[:, 0]
  token, *logprobs = sampling.sample(logits, uniform[step], slots.drawing)
  row = Drawn(
      jnp.where(visit.running, token, sampling.NO_TOKEN),
      *(jnp.where(visit.running, logprob, 0.0) for logprob in logprobs),
  )
  stopped = jnp.any(token[:, None] == slots.stop_ids, axis=1)
  return dataclasses.replace(
      visit,
      step=step + 1,
      token=token,
      running=visit.running & ~stopped & (step + 1 < slots.budget),
      drawn=jax.tree.map(lambda x, y: x.at[step].set(y), visit.drawn, row),
  )


def _forward(
    params: Params,
    cache: KVCache,
    slots: Slots,
    rotation: tuple[Rotation, Rotation],
    visit: _Visit,
    config: TransformerConfig,
) -> tuple[_Visit, Float[Array, "R 1 E"]]:
  """Feeds each slot's newest token through the layers."""
  cached = _lengths(slots)
  attend = _attention(config)
  x = transformer.embed(params, visit.token[:, None], config=config)
  blocks = list(visit.own)
  for index, layer in enumerate(params.layers):
    window = config.window(index)
    query, key, value = paged.widened(
        transformer.project(layer, x, rotation[window > 0], config=config),
        config=config,
    )
    new = caching.arranged(key, value, config=config)
    blocks[index] = caching.put(blocks[index], new, visit.step)
    mean = attend(
        query,
        cache.layers[index],
        blocks[index],
        cached,
        visit.step,
        window=window,
    )
    mean = paged.narrowed(mean, config=config)
    x = transformer.finish(layer, x, mean, config=config)
  visit = dataclasses.replace(visit, own=tuple(blocks))
  return visit, transformer.rms_norm(x, params.final_norm, config=config)
