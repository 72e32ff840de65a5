"""Attention of tokens to their streams, on a CPU's cores.

XLA computes it as many small products, which cost more by their number than by
what they read, and reads whole blocks of cache. `streams.cc` shares the heads
of all tokens among the cores, and reads for each what it sees (measured, see
experiments/README.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mgrpo_jax.policy.cache import Block, Blocks
from mgrpo_jax.policy.config import CacheAttention, TransformerConfig
from mgrpo_jax.policy.native import build, targets


def attend(
    query: Float[Array, "P T Hkv G D"],
    cached: Blocks,
    own: Block,
    lengths: Int[Array, " P"],
    step: Int[Array, ""],
    *,
    window: int,
    slots: Int[Array, " P"] | None = None,
) -> Float[Array, "P T Hkv G D"]:
  """Attends to each stream; see `online.attend_streams`, which it replaces.

  A token's numbers are the same bits whatever other streams have, and whatever
  other tokens attend with it.

  Args:
    query: scaled, of any dtype.
    cached: a layer's blocks, float32, keys in the order dc.
    own: likewise, tokens that follow those in the cache.
    lengths: [P] int32, tokens in each row's cache; 0 where it sees none.
    step: [] int32, the token of `own` that the first query belongs to.
    window: tokens that a query sees, itself included; 0 for all before it.
    slots: [P] int32, each row's slot of the cache; None where row p has slot p.

  Returns:
    Weighted means of the values, in the dtype of the query.

  Raises:
    ValueError: keys lie otherwise, or a block has another dtype.
  """
  for block in (*cached, own):
    if block.order != "dc" or {block.keys.dtype, block.values.dtype} != {
        jnp.dtype(jnp.float32)
    }:
      raise ValueError(
          "blocks must be float32, keys in the order dc, got"
          f" {block.keys.dtype}, {block.values.dtype} and {block.order}"
      )
  if slots is None:
    slots = jnp.arange(len(query), dtype=jnp.int32)
  call = jax.ffi.ffi_call(
      targets.ATTEND_STREAMS,
      jax.ShapeDtypeStruct(query.shape, jnp.float32),
  )
  blocks = [
      side for block in (*cached, own) for side in (block.keys, block.values)
  ]
  wide = query.astype(jnp.float32)
  mean = call(wide, lengths, slots, step, *blocks, window=np.int64(window))
  return mean.astype(query.dtype)


def check(
    config: TransformerConfig,
    *,
    num_slots: int,
    num_rows: int,
    context: int,
    block: int,
    devices: int,
) -> None:
  """Checks that an engine can attend so.

  Args:
    config: sizes of the policy.
    num_slots: of the engine, any.
    num_rows: slots that are computed together, any.
    context: tokens of a slot, any.
    block: tokens of the cache in one piece, any.
    devices: that the sampler's heads are split over.

  Raises:
    ValueError: it cannot, saying what it would need.
  """
  del num_slots, num_rows, context, block
  if config.cache_dtype != "float32":
    raise ValueError(
        "native attention is for a cache in float32 (dtype float32, or kernels"
        f" that are not trained), not {config.cache_dtype}"
    )
  if devices > 1:
    raise ValueError(
        f"native attention is for a sampler of one device, not {devices}"
    )
  if (platform := jax.local_devices()[0].platform) != "cpu":
    raise ValueError(f"native attention is for a CPU, not a {platform}")
  build.library()


ATTENTION = CacheAttention(attend=attend, check=check, key_order="dc", lanes=1)
