"""Attention of sampled tokens to their streams, on a CPU's cores.

XLA computes it as many small products, which cost more by their number than by
what they read, and reads whole blocks of cache. `streams.cc` shares the heads
of all streams among the cores, and reads of each what it has (measured, see
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
    query: Float[Array, "S 1 Hkv G D"],
    cached: Blocks,
    own: Block,
    lengths: Int[Array, " S"],
    step: Int[Array, ""],
    *,
    window: int,
) -> Float[Array, "S 1 Hkv G D"]:
  """Attends to each stream; see `online.attend_stream`, which it replaces.

  A stream's numbers are the same bits whatever other streams have.

  Args:
    query: scaled, of any dtype.
    cached: a layer's blocks, float32, keys in the order dc.
    own: likewise, tokens that follow those in the cache.
    lengths: [S] int32, tokens in each slot's cache; 0 where it sees none.
    step: [] int32, the token of `own` that the query belongs to.
    window: tokens that a query sees, itself included; 0 for all before it.

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
  streams, _, *shape = query.shape
  call = jax.ffi.ffi_call(
      targets.ATTEND_STREAMS,
      jax.ShapeDtypeStruct((streams, *shape), jnp.float32),
  )
  blocks = [
      side for block in (*cached, own) for side in (block.keys, block.values)
  ]
  wide = query[:, 0].astype(jnp.float32)
  mean = call(wide, lengths, step, *blocks, window=np.int64(window))
  return mean[:, None].astype(query.dtype)


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
