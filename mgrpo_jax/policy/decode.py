"""Generation with a key-value cache, on the trainer's own layers.

S slots each hold one token stream. `prefill` adds many tokens to some of the
slots, `decode` samples a few tokens for all of them, `copy_slots` lets a
stream start where another one stands.

A stream's numbers depend on that stream only, bit for bit, whatever stands in
the other slots. Three rules keep it so. Every product has a fixed shape. The
cache of a layer is a list of blocks of fixed width, attended one after another
by an online softmax: a block beyond a stream's end multiplies by exp(0) and
adds 0, so it may be computed, or skipped where no stream needs it, without
changing a bit. And the tokens of a visit are kept beside the cache until the
visit ends: how a stream's sum is associated follows from where its own visits
began, and a request always begins with a visit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mgrpo_jax.policy import sampling, transformer
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params

MASKED = -1e30  # a score that no real one reaches; finite, so 0 · it is 0

Blocks = tuple[Array, ...]


@flax.struct.dataclass
class KVCache:
  """Rotated keys, and values, of S slots; C tokens a block."""

  keys: tuple[Blocks, ...]  # L × blocks of [S, Hkv, C, D]
  values: tuple[Blocks, ...]  # L × blocks of [S, Hkv, C, D]


@flax.struct.dataclass
class Slots:
  """What a visit needs to know about each of S slots."""

  token: jax.Array  # [S] int32, the newest token, not yet in the cache
  length: jax.Array  # [S] int32, tokens in the cache; the position of `token`
  budget: jax.Array  # [S] int32, tokens to sample at most; 0 where idle
  seed: jax.Array  # [S, 2] uint32, see `sampling.split_seed`
  temperature: jax.Array  # [S] float32
  stop_ids: jax.Array  # [S, J] int32, padded with NO_TOKEN


@flax.struct.dataclass
class _Partial:
  """An attention under way: a softmax's peak, its sum, the weighted values."""

  peak: jax.Array  # [P, Hkv, G, T] float32
  total: jax.Array  # [P, Hkv, G, T] float32
  values: jax.Array  # [P, Hkv, G, T, D] float32


@flax.struct.dataclass
class _Visit:
  """What changes from step to step; N steps."""

  step: jax.Array  # [] int32
  token: jax.Array  # [S] int32
  running: jax.Array  # [S] bool
  keys: Blocks  # L × [S, Hkv, N, D]
  values: Blocks  # L × [S, Hkv, N, D]
  tokens: jax.Array  # [N, S] int32
  logprobs: jax.Array  # [N, S] float32


def init_cache(
    config: TransformerConfig, *, num_slots: int, length: int, block: int
) -> KVCache:
  """Makes an empty cache.

  Args:
    config: sizes; the cache has its activations' dtype.
    num_slots: S.
    length: tokens a slot can hold, rounded up to whole blocks.
    block: C, tokens in a block, the unit in which unused cache is skipped.

  Returns:
    Zeros.

  Raises:
    ValueError: if a size is not positive.
  """
  for name, size in [
      ("num_slots", num_slots), ("length", length), ("block", block)
  ]:
    if size < 1:
      raise ValueError(f"{name} must be >= 1, got {size!r}")
  shape = (num_slots, config.num_kv_heads, block, config.head_dim)

  def layers() -> tuple[Blocks, ...]:
    return tuple(
        tuple(jnp.zeros(shape, config.dtype) for _ in range(-(-length // block)))
        for _ in range(config.num_layers)
    )

  return KVCache(keys=layers(), values=layers())


def prefill(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "P T"],
    lengths: Int[Array, "P"],
    slots: Int[Array, "P"],
    starts: Int[Array, "P"],
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
  causal = jnp.broadcast_to(
      (offsets[:, None] >= offsets[None])[None], (len(slots), width, width)
  )
  rotation = transformer.rotations(
      starts[:, None] + offsets[None], config=config
  )
  x = transformer.embed(params, tokens, config=config)
  keys, values = [], []
  for index, layer in enumerate(params.layers):
    query, key, value = transformer.project(layer, x, rotation, config=config)
    keys.append(_heads_first(key))
    values.append(_heads_first(value))
    part = _attend_blocks(
        query,
        cache.keys[index],
        cache.values[index],
        starts,
        lambda block: block.at[slots].get(mode="promise_in_bounds"),
    )
    part = _attend(part, query, keys[-1], values[-1], causal)
    x = transformer.finish(layer, x, _attended(part, x.dtype), config=config)
  return _write(cache, keys, values, slots, starts, lengths)


def decode(
    params: Params,
    cache: KVCache,
    slots: Slots,
    *,
    config: TransformerConfig,
    num_steps: int,
) -> tuple[KVCache, Int[Array, "N S"], Float[Array, "N S"]]:
  """Samples up to N tokens for every slot that has a budget.

  Args:
    params: weights.
    cache: `slots.length` tokens in each slot.
    slots: what to sample.
    config: sizes.
    num_steps: N; fewer are computed once every slot has stopped.

  Returns:
    The cache; tokens, `NO_TOKEN` where a slot was idle or had stopped; their
    log-probabilities in nats, see `sampling.sample`. A slot that sampled n
    tokens has n more of them in its cache; the newest is not among those.
  """
  visit = _run_steps(params, cache, slots, config, num_steps)
  added = jnp.sum(visit.tokens != sampling.NO_TOKEN, axis=0, dtype=jnp.int32)
  order = jnp.argsort(added == 0)
  cache = _write(
      cache,
      [key[order] for key in visit.keys],
      [value[order] for value in visit.values],
      order,
      slots.length[order],
      added[order],
  )
  return cache, visit.tokens, visit.logprobs


def copy_slots(
    cache: KVCache, sources: Int[Array, "R"], targets: Int[Array, "R"]
) -> KVCache:
  """Copies whole slots, one after another.

  Args:
    cache: of S slots.
    sources: [R] int32 slots.
    targets: [R] int32 slots; equal to the source where nothing is to do.

  Returns:
    The cache.
  """

  def copy(index: Array, cache: KVCache) -> KVCache:
    source, target = sources[index], targets[index]
    return jax.tree.map(
        lambda block: jax.lax.dynamic_update_index_in_dim(
            block,
            jax.lax.dynamic_index_in_dim(block, source, keepdims=False),
            target,
            axis=0,
        ),
        cache,
    )

  return jax.lax.fori_loop(0, len(sources), copy, cache)


def _run_steps(
    params: Params,
    cache: KVCache,
    slots: Slots,
    config: TransformerConfig,
    num_steps: int,
) -> _Visit:
  """Samples without touching the cache."""
  num_slots = len(slots.token)
  shape = (num_slots, config.num_kv_heads, num_steps, config.head_dim)
  empty = tuple(jnp.zeros(shape, config.dtype) for _ in params.layers)
  steps = jnp.arange(num_steps, dtype=jnp.int32)[:, None]
  uniform = sampling.uniforms(
      jnp.broadcast_to(slots.seed[None], (num_steps, num_slots, 2)),
      slots.length[None] + 1 + steps,
  )
  first = _Visit(
      step=jnp.int32(0),
      token=slots.token,
      running=slots.budget > 0,
      keys=empty,
      values=empty,
      tokens=jnp.full((num_steps, num_slots), sampling.NO_TOKEN, jnp.int32),
      logprobs=jnp.zeros((num_steps, num_slots), jnp.float32),
  )
  return jax.lax.while_loop(
      lambda visit: (visit.step < num_steps) & jnp.any(visit.running),
      functools.partial(_step, params, cache, slots, uniform, config=config),
      first,
  )


def _step(
    params: Params,
    cache: KVCache,
    slots: Slots,
    uniform: Float[Array, "N S"],
    visit: _Visit,
    *,
    config: TransformerConfig,
) -> _Visit:
  """Samples one token for every running slot."""
  step = visit.step
  visit, hidden = _forward(params, cache, slots, visit, config)
  logits = transformer.unembed(params, hidden, config=config)[:, 0]
  token, logprob = sampling.sample(logits, uniform[step], slots.temperature)
  row = jnp.where(visit.running, token, sampling.NO_TOKEN)
  stopped = jnp.any(token[:, None] == slots.stop_ids, axis=1)
  return visit.replace(
      step=step + 1,
      token=token,
      running=visit.running & ~stopped & (step + 1 < slots.budget),
      tokens=visit.tokens.at[step].set(row),
      logprobs=visit.logprobs.at[step].set(
          jnp.where(visit.running, logprob, 0.0)
      ),
  )


def _forward(
    params: Params,
    cache: KVCache,
    slots: Slots,
    visit: _Visit,
    config: TransformerConfig,
) -> tuple[_Visit, Float[Array, "S 1 E"]]:
  """Feeds each slot's newest token through the layers."""
  num_slots, num_steps = len(slots.token), len(visit.tokens)
  cached = jnp.where(slots.budget > 0, slots.length, 0)
  seen = jnp.broadcast_to(
      (jnp.arange(num_steps) <= visit.step)[None, None],
      (num_slots, 1, num_steps),
  )
  positions = (slots.length + visit.step)[:, None]
  rotation = transformer.rotations(positions, config=config)
  x = transformer.embed(params, visit.token[:, None], config=config)
  keys, values = list(visit.keys), list(visit.values)
  for index, layer in enumerate(params.layers):
    query, key, value = transformer.project(layer, x, rotation, config=config)
    keys[index] = jax.lax.dynamic_update_slice_in_dim(
        keys[index], _heads_first(key), visit.step, axis=2
    )
    values[index] = jax.lax.dynamic_update_slice_in_dim(
        values[index], _heads_first(value), visit.step, axis=2
    )
    part = _attend_blocks(
        query,
        cache.keys[index],
        cache.values[index],
        cached,
        lambda block: block,
    )
    part = _attend(part, query, keys[index], values[index], seen)
    x = transformer.finish(layer, x, _attended(part, x.dtype), config=config)
  visit = visit.replace(keys=tuple(keys), values=tuple(values))
  return visit, transformer.rms_norm(x, params.final_norm, config=config)


def _heads_first(x: Float[Array, "P T Hkv D"]) -> Float[Array, "P Hkv T D"]:
  """Brings keys or values into the cache's order."""
  return jnp.swapaxes(x, 1, 2)


def _attend_blocks(
    query: Float[Array, "P T Hkv G D"],
    keys: Blocks,
    values: Blocks,
    lengths: Int[Array, "P"],
    rows: Callable[[Array], Array],
) -> _Partial:
  """Attends to the first `lengths` cached tokens, skipping unused blocks."""
  batch, width, kv_heads, group, head_dim = query.shape
  shape = (batch, kv_heads, group, width)
  part = _Partial(
      peak=jnp.full(shape, MASKED, jnp.float32),
      total=jnp.zeros(shape, jnp.float32),
      values=jnp.zeros((*shape, head_dim), jnp.float32),
  )
  longest = jnp.max(lengths)
  for index, (key, value) in enumerate(zip(keys, values, strict=True)):
    size = key.shape[2]
    columns = index * size + jnp.arange(size, dtype=jnp.int32)
    mask = jnp.broadcast_to(
        columns[None, None] < lengths[:, None, None], (batch, width, size)
    )
    part = jax.lax.cond(
        longest > index * size,
        lambda part, query, key, value, mask: _attend(
            part, query, rows(key), rows(value), mask
        ),
        lambda part, *_: part,
        *(part, query, key, value, mask),
    )
  return part


def _attend(
    part: _Partial,
    query: Float[Array, "P T Hkv G D"],
    key: Float[Array, "P Hkv C D"],
    value: Float[Array, "P Hkv C D"],
    mask: Bool[Array, "P T C"],
) -> _Partial:
  """Adds a block to an attention by online softmax (arXiv 1805.02867)."""
  scores = jnp.einsum(
      "ptkgd,pkcd->pkgtc",
      query * query.shape[-1] ** -0.5,
      key,
      preferred_element_type=jnp.float32,
  )
  allowed = jnp.broadcast_to(mask[:, None, None], scores.shape)
  scores = jnp.where(allowed, scores, MASKED)
  peak = jnp.maximum(part.peak, jnp.max(scores, axis=-1))
  scale = jnp.exp(part.peak - peak)
  weights = jnp.where(allowed, jnp.exp(scores - peak[..., None]), 0.0)
  added = jnp.einsum(
      "pkgtc,pkcd->pkgtd",
      weights.astype(value.dtype),
      value,
      preferred_element_type=jnp.float32,
  )
  return _Partial(
      peak=peak,
      total=part.total * scale + jnp.sum(weights, axis=-1),
      values=part.values * scale[..., None] + added,
  )


def _attended(
    part: _Partial, dtype: jnp.dtype
) -> Float[Array, "P T Hkv G D"]:
  """Finishes an attention."""
  mean = part.values / part.total[..., None]
  return jnp.transpose(mean, (0, 3, 1, 2, 4)).astype(dtype)


def _write(
    cache: KVCache,
    keys: list[Array],
    values: list[Array],
    slots: Int[Array, "P"],
    starts: Int[Array, "P"],
    lengths: Int[Array, "P"],
) -> KVCache:
  """Puts the first `lengths` tokens of each row into its slot, in place.

  Rows with tokens come first; the others cost nothing.
  """

  def put(block: Array, new: Array, first: int, row: Array) -> Array:
    """Writes the part of a row that falls into one block."""
    _, heads, width, head_dim = new.shape
    size = block.shape[2]
    window = min(width, size)
    begin = jnp.clip(starts[row] - first, 0, size - window)
    offsets = first + begin + jnp.arange(window) - starts[row]
    tokens = jax.lax.dynamic_index_in_dim(new, row, keepdims=True)
    tokens = jnp.take(tokens, offsets, axis=2, mode="clip")
    real = (offsets >= 0) & (offsets < lengths[row])
    corner = (slots[row], 0, begin, 0)
    old = jax.lax.dynamic_slice(block, corner, (1, heads, window, head_dim))
    merged = jnp.where(real[None, None, :, None], tokens, old)
    return jax.lax.dynamic_update_slice(block, merged, corner)

  def put_all(row: Array, layers: tuple, news: list[Array]) -> tuple:
    return tuple(
        tuple(
            put(block, new, index * block.shape[2], row)
            for index, block in enumerate(blocks)
        )
        for blocks, new in zip(layers, news, strict=True)
    )

  return jax.lax.fori_loop(
      0,
      jnp.sum(lengths > 0),
      lambda row, cache: KVCache(
          keys=put_all(row, cache.keys, keys),
          values=put_all(row, cache.values, values),
      ),
      cache,
  )
