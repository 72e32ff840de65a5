"""Drawing tokens: inverse CDF, one uniform number per token.

A Gumbel number per vocabulary entry costs more than the layers of a small
model; one uniform per token and two short prefix sums do not. The uniform is a
hash of the request's seed and the token's position, so what a request draws
does not depend on what it is batched with.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as jax_random
from jaxtyping import Array, Bool, Float, Int, UInt32

from mgrpo_jax.policy import filters
from mgrpo_jax.policy.filters import Filters

MAX_STOP_IDS = 8  # stop tokens a request may name
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How one completion is drawn.

  Attributes:
    temperature: logits are divided by it; 0 takes the likeliest token.
    max_new_tokens: tokens at most, at least 1.
    stop_ids: sampling any of these ends the completion.
    top_k: only the k likeliest tokens; 0 for all. Of these three, see
      `filters.bounds`.
    top_p: only the likeliest tokens that hold this share; 1 for all.
    min_p: only tokens of this share of the likeliest one's probability or
      more; 0 for all.

  Raises:
    ValueError: if a field is out of range, naming the field.
  """

  temperature: float
  max_new_tokens: int
  stop_ids: tuple[int, ...]
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self) -> None:
    """Checks every field."""
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
          f"temperature must be finite and >= 0, got {self.temperature!r}"
      )
    if self.max_new_tokens < 1:
      raise ValueError(
          f"max_new_tokens must be >= 1, got {self.max_new_tokens!r}"
      )
    if len(self.stop_ids) > MAX_STOP_IDS:
      raise ValueError(
          f"stop_ids must be at most {MAX_STOP_IDS} tokens, got"
          f" {len(self.stop_ids)}"
      )
    if any(token < 0 for token in self.stop_ids):
      raise ValueError(f"stop_ids must be token ids, got {self.stop_ids!r}")
    if not 0 <= self.top_k < 2**31:
      raise ValueError(f"top_k must be in 0..2^31-1, got {self.top_k!r}")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"min_p must be in [0, 1], got {self.min_p!r}")


@flax.struct.dataclass
class Drawing:
  """How each of S rows is drawn, on host or device."""

  temperature: Any  # [S] float32
  filters: Filters

  def where(self, rows: Bool[Array, " S"]) -> Drawing:
    """Spares the other rows everything that costs.

    Args:
      rows: which are drawn.

    Returns:
      The same; temperature 1 and no filters in the others.
    """
    plain = plainly(len(rows))
    return jax.tree.map(lambda x, y: jnp.where(rows, x, y), self, plain)


def plainly(num_rows: int) -> Drawing:
  """Draws at temperature 1, everything allowed.

  Args:
    num_rows: S.

  Returns:
    Arrays on the host, to be written to.
  """
  return Drawing(
      temperature=np.ones(num_rows, np.float32),
      filters=filters.none(num_rows),
  )


def split_seed(seed: int) -> tuple[int, int]:
  """Splits a seed into the two words that `uniforms` is keyed with.

  Args:
    seed: 0 to 2^64 - 1.

  Returns:
    The high and the low 32 bits.

  Raises:
    ValueError: if the seed is out of range.
  """
  if not 0 <= seed < 2**64:
    raise ValueError(f"seed must be in 0..2^64-1, got {seed!r}")
  return seed >> 32, seed & 0xFFFFFFFF


def uniforms(
    seeds: UInt32[Array, "*S 2"], positions: Int[Array, "*S"]
) -> Float[Array, "*S"]:
  """Hashes (seed, position) to numbers in [0, 1) with Threefry-2x32.

  Args:
    seeds: uint32 words, see `split_seed`.
    positions: int32, of the tokens to be drawn in their streams.

  Returns:
    float32 multiples of 2^-24.
  """
  counter = positions.astype(jnp.uint32)
  bits, _ = jax_random.threefry2x32_p.bind(
      seeds[..., 0], seeds[..., 1], counter, jnp.zeros_like(counter)
  )
  return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def sample(
    logits: Float[Array, "S V"],
    uniform: Float[Array, " S"],
    drawing: Drawing,
) -> tuple[Int[Array, " S"], Float[Array, " S"], Float[Array, " S"]]:
  """Draws one token a row.

      token = min {v : Σ_{u ≤ v} p(u) > uniform},   p ∝ filtered e^(logits / τ)

  Rows are filtered, the likeliest token looked for, and the second
  log-probability computed, only where some row needs it; a row's numbers do not
  depend on that.

  Args:
    logits: float32.
    uniform: float32 in [0, 1), one a row.
    drawing: how; temperature 0 takes the likeliest token.

  Returns:
    Tokens, int32; their log-probabilities in nats under p, and under the
    softmax of the logits, temperature 1 and nothing filtered. At temperature 0
    both are the latter: a point mass would tell nothing.
  """
  greedy = drawing.temperature == 0
  filtered = drawing.filters.active() & ~greedy
  scaled = logits / jnp.where(greedy, 1.0, drawing.temperature)[:, None]
  peak = jnp.max(scaled, axis=-1, keepdims=True)
  weights = jnp.exp(scaled - peak)
  bound = jax.lax.cond(
      jnp.any(filtered),
      filters.bounds,
      lambda weights, _: jnp.zeros(len(weights), jnp.float32),
      *(weights, drawing.filters),
  )
  bound = jnp.where(filtered, bound, 0.0)[:, None]
  weights = jnp.where(weights >= bound, weights, 0.0)
  drawn = inverse_cdf(weights, uniform)
  token = jax.lax.cond(
      jnp.any(greedy),
      lambda logits, drawn: jnp.where(greedy, jnp.argmax(logits, -1), drawn),
      lambda logits, drawn: drawn,
      *(logits, drawn),
  )
  chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1) - peak
  logprob = chosen[:, 0] - jnp.log(jnp.sum(weights, axis=-1))
  changed = filtered | ~(greedy | (drawing.temperature == 1))
  raw = jax.lax.cond(
      jnp.any(changed),
      lambda logits, token, _: _log_softmax(logits, token),
      lambda logits, token, logprob: logprob,
      *(logits, token, logprob),
  )
  return token.astype(jnp.int32), logprob, jnp.where(changed, raw, logprob)


def inverse_cdf(
    weights: Float[Array, "S V"], uniform: Float[Array, " S"]
) -> Int[Array, " S"]:
  """Inverts each row's cumulative distribution in two levels.

  Blocks of about sqrt(V) entries are summed; the uniform picks a block by the
  prefix sums of the blocks, then an entry by those within the block. An entry
  of weight zero is never picked, whatever is rounded.

  Args:
    weights: float32 >= 0, not necessarily normalised, some > 0 in each row.
    uniform: float32 in [0, 1).

  Returns:
    int32 indices into V.
  """
  rows, size = weights.shape
  width = 2 ** round(math.log2(max(size, 2)) / 2)
  padded = jnp.pad(weights, ((0, 0), (0, -size % width)))
  blocks = padded.reshape(rows, -1, width)
  sums = jnp.sum(blocks, axis=-1)
  prefix = jnp.cumsum(sums, axis=-1)
  target = uniform * prefix[:, -1]
  block = _first_above(prefix, sums, target)
  below = jnp.take_along_axis(prefix - sums, block[:, None], axis=1)[:, 0]
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  entry = _first_above(jnp.cumsum(inside, axis=-1), inside, target - below)
  return block * width + entry


def _log_softmax(
    logits: Float[Array, "S V"], token: Int[Array, " S"]
) -> Float[Array, " S"]:
  """Log-probability of one token a row, nats."""
  chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def _first_above(
    prefix: Float[Array, "S M"],
    weights: Float[Array, "S M"],
    target: Float[Array, " S"],
) -> Int[Array, " S"]:
  """Finds the first entry of weight > 0 whose prefix exceeds the target."""
  positive = weights > 0
  above = positive & (prefix > target[:, None])
  index = jnp.arange(weights.shape[1], dtype=jnp.int32)[None]
  last = jnp.max(jnp.where(positive, index, 0), axis=1)
  first = jnp.argmax(above, axis=1).astype(jnp.int32)
  return jnp.where(jnp.any(above, axis=1), first, last)
