"""The sampler's compiled programs, shared by every engine of the process.

Functions are jitted once, here, with the configuration static: two engines of
the same sizes share their compilations. Python runs a jitted function's body
only while tracing, so counting there counts programs, and costs nothing.
`heads` says over which devices the cache is split by heads, so that it stays
there and can be donated; None on one device. What was drawn is whole on each of
them, so that every process of a mesh can read it.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mgrpo_jax import sharding
from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy import decode as decoding
from mgrpo_jax.policy.cache import KVCache
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Drawn, Slots
from mgrpo_jax.policy.params import Params

_TRACED: collections.Counter[str] = collections.Counter()


def compilations() -> Mapping[str, int]:
  """Counts the programs compiled so far in this process, by kind.

  Returns:
    Name of the function -> number of shapes it was compiled for.
  """
  return dict(_TRACED)


def split_heads(mesh: Mesh) -> NamedSharding:
  """Says how a cache is split over a mesh.

  Args:
    mesh: of `sharding.sampler_mesh`.

  Returns:
    The sharding of every block of the cache, whose second axis are the heads
    in whatever order the others are.
  """
  return NamedSharding(mesh, sharding.spec("slot", "kv_heads"))


@functools.partial(
    jax.jit,
    static_argnames=(
        "config",
        "num_slots",
        "length",
        "block",
        "num_rows",
        "heads",
    ),
)
def init_cache(
    *,
    config: TransformerConfig,
    num_slots: int,
    length: int,
    block: int,
    num_rows: int,
    heads: NamedSharding | None = None,
) -> KVCache:
  """Runs `policy.cache.init`."""
  _TRACED["init_cache"] += 1
  cache = caching.init(
      config,
      num_slots=num_slots,
      length=length,
      block=block,
      num_rows=num_rows,
  )
  return _kept(cache, heads)


@functools.partial(
    jax.jit, static_argnames=("config", "heads"), donate_argnames=("cache",)
)
def prefill(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "P T"],
    lengths: Int[Array, " P"],
    slots: Int[Array, " P"],
    starts: Int[Array, " P"],
    *,
    config: TransformerConfig,
    heads: NamedSharding | None = None,
) -> KVCache:
  """Runs `policy.decode.prefill`, in place."""
  _TRACED["prefill"] += 1
  cache = decoding.prefill(
      params, cache, tokens, lengths, slots, starts, config=config
  )
  return _kept(cache, heads)


@functools.partial(
    jax.jit,
    static_argnames=("config", "num_steps", "num_rows", "heads"),
    donate_argnames=("cache",),
)
def decode(
    params: Params,
    cache: KVCache,
    slots: Slots,
    *,
    config: TransformerConfig,
    num_steps: int,
    num_rows: int,
    heads: NamedSharding | None = None,
) -> tuple[KVCache, Drawn]:
  """Runs `policy.decode.decode`, in place."""
  _TRACED["decode"] += 1
  cache, drawn = decoding.decode(
      params,
      cache,
      slots,
      config=config,
      num_steps=num_steps,
      num_rows=num_rows,
  )
  if heads is not None:
    everywhere = NamedSharding(heads.mesh, PartitionSpec())
    drawn = jax.lax.with_sharding_constraint(drawn, everywhere)
  return _kept(cache, heads), drawn


@functools.partial(
    jax.jit, static_argnames=("heads",), donate_argnames=("cache",)
)
def copy_slots(
    cache: KVCache,
    sources: Int[Array, " R"],
    targets: Int[Array, " R"],
    *,
    heads: NamedSharding | None = None,
) -> KVCache:
  """Runs `policy.cache.copy_slots`, in place."""
  _TRACED["copy_slots"] += 1
  return _kept(caching.copy_slots(cache, sources, targets), heads)


def _kept(cache: KVCache, heads: NamedSharding | None) -> KVCache:
  """Leaves a cache where it was, so that it can be donated."""
  if heads is None:
    return cache
  return jax.lax.with_sharding_constraint(cache, heads)
