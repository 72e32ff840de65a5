"""Attention to the cache by JAX's kernel for TPUs, on pages of it.

    m = max_c s_c,   z = Σ_c e^(s_c - m),   o = Σ_c e^(s_c - m) v_c

over the tokens c that a stream has cached, s_c = q · k_c: what `online.attend`
goes on from. The kernel fetches a stream's pages while it computes the ones
before, and none beyond its end; scores never leave the chip.

The cache stays where it is and as it is: one block as long as the context, of
[S, Hkv, L, D], is S · Hkv · L / C pages of C tokens without moving a byte, and
each head of a slot a stream of its own. JAX's own wrapper of the kernel drops
its normalisers, without which nothing can be added; so its body is called here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mgrpo_jax.policy import online
from mgrpo_jax.policy.attention import MASKED
from mgrpo_jax.policy.cache import Block, Blocks
from mgrpo_jax.policy.config import CacheAttention, TransformerConfig
from mgrpo_jax.policy.online import Partial

LANES = 128  # numbers that a TPU's vector registers hold side by side
PAGES = (128, 64, 32, 16)  # tokens of a page; the largest that divides a block
FETCHED = 4  # pages at most that are fetched and computed together
# Bytes of a chip's 1 MiB of scalar memory that the kernel may have: a length
# for each head of each slot, and a number for each page.
_SCALARS = 1_000_000


def attend(
    query: Float[Array, "S Hkv G 1 D"],
    blocks: Blocks,
    lengths: Int[Array, " S"],
    *,
    window: int,
    interpret: bool = False,
) -> Partial:
  """Attends to cached tokens on a TPU, one query a slot.

  Args:
    query: of every slot, scaled, see `online.heads_first`.
    blocks: a layer's, only one, its keys in the order cd.
    lengths: [S] int32, tokens in each slot's cache; 0 where it sees none.
    window: must be 0.
    interpret: simulates a TPU, anywhere, slowly.

  Returns:
    An attention to go on with, see `online.attend`.

  Raises:
    ValueError: the kernel cannot do it, saying what it needs.
  """
  if window or len(blocks) > 1 or blocks[0].order != "cd":
    raise ValueError(
        "paged attention: window must be 0 and the cache one block in the order"
        f" cd, got {window} and {[block.order for block in blocks]}"
    )
  keys, values = blocks[0].keys, blocks[0].values
  slots, heads, group, _, head_dim = query.shape
  rows = slots * heads
  size = _page(rows, keys.shape[2])
  fetched = _fetched(keys.shape[2] // size)
  kernel = _kernel(rows, group, head_dim, keys, size, fetched, interpret)
  pages = (1, -1, size, head_dim)  # one head, whose sequences are ours
  mean, peak, total = kernel(
      jnp.repeat(lengths, heads),
      jnp.arange(keys.size // (size * head_dim), dtype=jnp.int32),
      jnp.zeros(1, jnp.int32),  # of two buffers, the one to begin with
      jnp.ones(1, jnp.int32),  # that nothing was fetched yet
      # So that a head's vector has a tile of its own.
      query.astype(jnp.float32).reshape(rows, group, 1, head_dim),
      keys.reshape(pages),
      None,
      values.reshape(pages),
      None,
  )
  shape = (slots, heads, group, 1)
  total = total.reshape(shape)
  return Partial(
      peak=jnp.maximum(peak.reshape(shape), MASKED),  # -inf where nothing is
      total=total,
      values=mean.reshape(*shape, head_dim) * total[..., None],
  )


def attend_streams(
    query: Float[Array, "P T Hkv G D"],
    cached: Blocks,
    own: Block,
    lengths: Int[Array, " P"],
    step: Int[Array, ""],
    *,
    window: int,
    slots: Int[Array, " P"] | None = None,
    interpret: bool = False,
) -> Float[Array, "P T Hkv G D"]:
  """Attends to each stream: one token's cache by the kernel, the rest without.

  See `online.attend_streams`, which it replaces, and `attend`.
  """
  if query.shape[1] > 1 or slots is not None:  # prefill
    return online.attend_streams(
        query, cached, own, lengths, step, window=window, slots=slots
    )
  queries = online.heads_first(query)
  part = attend(queries, cached, lengths, window=window, interpret=interpret)
  part = online.attend_own(part, queries, own, step, window=window)
  return online.attended(part, query.dtype)


def widened(
    heads: Sequence[Array], *, config: TransformerConfig
) -> tuple[Array, ...]:
  """Fills queries, keys and values up to the width that the cache has.

  A TPU would keep them so wide anyway, or copy them for the kernel.

  Args:
    heads: arrays whose last dimension is a head's.
    config: sizes.

  Returns:
    The same numbers, and zeros, which change no score.
  """
  more = config.cache_dim - config.head_dim
  if not more:
    return tuple(heads)
  return tuple(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) for x in heads)


def narrowed(
    mean: Float[Array, "P T Hkv G D"], *, config: TransformerConfig
) -> Float[Array, "P T Hkv G D"]:
  """Leaves out what `widened` has filled up.

  Args:
    mean: what was attended to.
    config: sizes.

  Returns:
    The width that a head has.
  """
  if config.cache_dim == config.head_dim:
    return mean
  return mean[..., : config.head_dim]


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
    num_slots: of the engine.
    num_rows: slots that are computed together.
    context: tokens of a slot.
    block: tokens of the cache in one piece.
    devices: that the sampler's heads are split over.

  Raises:
    ValueError: it cannot, saying what it would need.
  """
  if config.dtype != "bfloat16":
    raise ValueError(
        "paged attention is for dtype bfloat16, to which it rounds keys and"
        f" values, not {config.dtype}"
    )
  if any(config.windows):
    raise ValueError("paged attention is for layers without a window")
  if block < context or num_rows < num_slots:
    raise ValueError(
        "paged attention is for a cache in one piece: block >= context"
        f" ({context}) and decode_rows 0, not block {block} and"
        f" decode_rows {num_rows}"
    )
  if devices > 1:
    raise ValueError(
        f"paged attention is for a sampler of one device, not {devices}"
    )
  _page(num_slots * config.num_kv_heads, block)


def _page(rows: int, length: int) -> int:
  """Tokens of a page; raises where the kernel has no room for their numbers."""
  size = next((size for size in PAGES if length % size == 0), 0)
  if not size:
    raise ValueError(
        f"paged attention is for blocks of a multiple of {PAGES[-1]} tokens,"
        f" not {length}"
    )
  needed = 4 * rows * (1 + length // size)
  if needed > _SCALARS:
    raise ValueError(
        f"paged attention is for at most {_SCALARS} bytes of lengths and page"
        f" numbers, not {needed}: {rows} heads of slots with {length // size}"
        f" pages of {size} tokens; lower num_slots or use a multiple of"
        f" {PAGES[0]} tokens"
    )
  return size


def _fetched(pages: int) -> int:
  """The most pages, of those of a stream, that can be fetched at a time."""
  return max(n for n in range(1, FETCHED + 1) if pages % n == 0)


def _kernel(
    rows: int,
    group: int,
    head_dim: int,
    block: Any,
    size: int,
    fetched: int,
    interpret: bool,
) -> Callable[..., tuple[Array, Array, Array]]:
  """Builds the kernel over [rows, G, 1, D] queries and [1, pages, C, D]."""
  # Takes most of a second to import, and only TPUs need it.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu
  from jax.experimental.pallas.ops.tpu.paged_attention import (
      paged_attention_kernel as pallas,
  )

  pages = block.size // (rows * size * head_dim)

  def of_a_row(width: int) -> pl.BlockSpec:
    return pl.BlockSpec(
        (None, group, None, width), lambda core, row, head, *_: (row, 0, 0, 0)
    )

  def result(width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, group, 1, width), jnp.float32)

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  buffer = pltpu.VMEM((2, fetched, size, head_dim), block.dtype)
  return pl.pallas_call(
      functools.partial(
          pallas.paged_flash_attention_kernel_inline_seq_dim,
          pages_per_sequence=pages,
          batch_size=rows,
          pages_per_compute_block=fetched,
          mask_value=pallas.DEFAULT_MASK_VALUE,
          attn_logits_soft_cap=None,
          megacore_mode=None,
      ),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=4,
          # Keys and values would come with scales, were they quantised.
          in_specs=[of_a_row(head_dim), anywhere, None, anywhere, None],
          out_specs=[of_a_row(head_dim), of_a_row(1), of_a_row(1)],
          grid=(1, rows, 1),
          scratch_shapes=(
              *(buffer, None, buffer, None),
              *(pltpu.SemaphoreType.DMA((2,)),) * 2,
          ),
      ),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary", "arbitrary")
      ),
      out_shape=[result(head_dim), result(1), result(1)],
      cost_estimate=pl.CostEstimate(
          flops=4 * group * block.size,
          bytes_accessed=2 * block.size * block.dtype.itemsize,
          transcendentals=group * math.prod(block.shape[:3]),
      ),
      interpret=pltpu.InterpretParams() if interpret else False,
  )


ATTENTION = CacheAttention(
    attend=attend_streams, check=check, key_order="cd", lanes=LANES
)
