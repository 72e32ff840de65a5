"""The sampler's compiled programs, shared by every engine of the process.

Functions are jitted once, here, with the configuration static: two engines of
the same sizes share their compilations. Python runs a jitted function's body
only while tracing, so counting there counts programs, and costs nothing.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Int

from mgrpo_jax.policy import cache as caching
from mgrpo_jax.policy import decode as decoding
from mgrpo_jax.policy.cache import KVCache
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Slots
from mgrpo_jax.policy.params import Params

_TRACED: collections.Counter[str] = collections.Counter()


def compilations() -> Mapping[str, int]:
  """Counts the programs compiled so far in this process, by kind.

  Returns:
    Name of the function -> number of shapes it was compiled for.
  """
  return dict(_TRACED)


@functools.partial(
    jax.jit, static_argnames=("config", "num_slots", "length", "block")
)
def init_cache(
    *, config: TransformerConfig, num_slots: int, length: int, block: int
) -> KVCache:
  """Runs `policy.cache.init`."""
  _TRACED["init_cache"] += 1
  return caching.init(config, num_slots=num_slots, length=length, block=block)


@functools.partial(
    jax.jit, static_argnames=("config",), donate_argnames=("cache",)
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
) -> KVCache:
  """Runs `policy.decode.prefill`, in place."""
  _TRACED["prefill"] += 1
  return decoding.prefill(
      params, cache, tokens, lengths, slots, starts, config=config
  )


@functools.partial(
    jax.jit,
    static_argnames=("config", "num_steps"),
    donate_argnames=("cache",),
)
def decode(
    params: Params,
    cache: KVCache,
    slots: Slots,
    *,
    config: TransformerConfig,
    num_steps: int,
) -> tuple[KVCache, Int[Array, "N S"], Float[Array, "N S"]]:
  """Runs `policy.decode.decode`, in place."""
  _TRACED["decode"] += 1
  return decoding.decode(
      params, cache, slots, config=config, num_steps=num_steps
  )


@functools.partial(jax.jit, donate_argnames=("cache",))
def copy_slots(
    cache: KVCache, sources: Int[Array, " R"], targets: Int[Array, " R"]
) -> KVCache:
  """Runs `policy.cache.copy_slots`, in place."""
  _TRACED["copy_slots"] += 1
  return caching.copy_slots(cache, sources, targets)
