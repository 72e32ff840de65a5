"""Log-probabilities of tokens, without ever holding all logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mgrpo_jax.policy import transformer
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params
from mgrpo_jax.types import Prediction


def token_logprobs(
    params: Params,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    segment_ids: Int[Array, "N T"],
    *,
    config: TransformerConfig,
    temperature: float | Float[Array, ""],
) -> Float[Array, "N T"]:
  """Computes the log-probability of every token given its past.

      out[t] = log softmax(logits[t - 1] / temperature)[tokens[t]]

  Args:
    params: weights.
    tokens: [N, T] int32.
    positions: [N, T] int32, from 0 in each segment.
    segment_ids: [N, T] int32, 0 is padding.
    config: sizes.
    temperature: > 0, of the distribution that was sampled from.

  Returns:
    [N, T] float32, nats; 0 at t = 0, where a segment starts, and in padding.
  """
  return predict(
      params,
      tokens,
      positions,
      segment_ids,
      config=config,
      temperature=temperature,
  ).logprobs


def predict(
    params: Params,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    segment_ids: Int[Array, "N T"],
    *,
    config: TransformerConfig,
    temperature: float | Float[Array, ""],
    wanted: Bool[Array, "N T"] | None = None,
    most_wanted: int = 0,
    entropy: bool = False,
    prefix_ids: Int[Array, "N T"] | None = None,
) -> Prediction:
  """Computes `token_logprobs`, and what else is said of every token.

      entropy[t] = -Σ p log p,   p = softmax(logits[t - 1] / temperature)
      values[t] = value_head · hidden[t - 1]

  Logits are computed for `execution.logit_columns` at a time, and again in the
  backward pass unless that is all columns: else [N, T, V] exists in neither.

  Args:
    params: weights.
    tokens: [N, T] int32.
    positions: [N, T] int32, from 0 in each segment, or behind its prefix.
    segment_ids: [N, T] int32, 0 is padding.
    config: sizes; with a value head there are values.
    temperature: > 0, of the distribution that was sampled from.
    wanted: [N, T], tokens that are asked for. The head, which costs most in a
      small model, then runs only for them.
    most_wanted: tokens wanted in a row, at most; those beyond count as not
      wanted. 0 scores all tokens, whatever is wanted.
    entropy: whether to compute entropies.
    prefix_ids: [N, T] int32, the segment that a token sees besides its own, 0
      for none; None where rows share nothing.

  Returns:
    [N, T] float32; 0 where none is wanted, at t = 0, where a segment starts,
    and in padding.
  """
  hidden = transformer.hidden_states(
      params,
      tokens,
      positions,
      segment_ids,
      config=config,
      prefix_ids=prefix_ids,
  )
  predicted = has_past(segment_ids)
  targets = jnp.roll(tokens, -1, axis=1)
  some = False
  if wanted is not None and most_wanted:
    some = True
    predicted &= wanted
    following = jnp.roll(predicted, -1, axis=1)
    order = jnp.argsort(~following, axis=1, stable=True)[:, :most_wanted]
    hidden = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
    targets = jnp.take_along_axis(targets, order, axis=1)

  def say(logits: Array, targets: Array) -> Prediction:
    scaled = logits / temperature
    normaliser = jax.nn.logsumexp(scaled, axis=-1)
    mean = None
    if entropy:
      share = jnp.exp(scaled - normaliser[..., None])
      mean = normaliser - jnp.sum(share * scaled, axis=-1)
    chosen = _at(scaled, targets) - normaliser
    return Prediction(logprobs=chosen, entropy=mean)

  said = _map_chunks(say, params, hidden, targets, config=config)
  if config.value_head:
    said = dataclasses.replace(said, values=_values(params, hidden))
  if not some:
    spread = functools.partial(jnp.roll, shift=1, axis=1)
  else:
    place = jnp.cumsum(predicted, axis=1) - 1
    predicted &= place < most_wanted
    place = jnp.clip(place, 0, most_wanted - 1)
    spread = functools.partial(jnp.take_along_axis, indices=place, axis=1)
  return jax.tree.map(lambda x: jnp.where(predicted, spread(x), 0.0), said)


def has_past(segment_ids: Int[Array, "N T"]) -> Array:
  """Says which tokens are predicted by an earlier one of their segment.

  Args:
    segment_ids: [N, T] int32, 0 is padding.

  Returns:
    [N, T] bool; false at t = 0, where a segment starts, and in padding.
  """
  same = segment_ids[:, 1:] == segment_ids[:, :-1]
  later = same & (segment_ids[:, 1:] > 0)
  return jnp.pad(later, ((0, 0), (1, 0)))


def _values(
    params: Params, hidden: Float[Array, "N T E"]
) -> Float[Array, "N T"]:
  """What a critic expects after each token, in float32."""
  head = jnp.asarray(params.value_head, jnp.float32)
  return jnp.einsum("nte,e->nt", hidden.astype(jnp.float32), head)


def _at(values: Array, targets: Array) -> Array:
  """Picks values[..., targets] by a masked sum, which may be sharded."""
  ids = jax.lax.broadcasted_iota(targets.dtype, values.shape, values.ndim - 1)
  return jnp.sum(jnp.where(ids == targets[..., None], values, 0.0), axis=-1)


def _map_chunks(
    function: Callable[[Array, Array], Any],
    params: Params,
    hidden: Array,
    targets: Array,
    *,
    config: TransformerConfig,
) -> Any:
  """Maps (logits, targets) -> [N, chunk] trees over chunks of columns."""
  length = targets.shape[1]
  chunk = min(config.execution.logit_columns, length)
  num_chunks = -(-length // chunk)
  extra = num_chunks * chunk - length

  kernel = transformer.unembedding(params, config=config)

  def body(_: None, inputs: tuple[Array, Array]) -> tuple[None, Any]:
    columns, following = inputs
    logits = transformer.logits(kernel, columns, config=config)
    return None, function(logits, following)

  def split(x: Array) -> Array:
    padded = jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))
    chunks = padded.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:])
    return jnp.swapaxes(chunks, 0, 1)

  def join(chunks: Array) -> Array:
    flat = jnp.swapaxes(chunks, 0, 1).reshape(targets.shape[0], -1)
    return flat[:, :length]

  # All in one chunk exist at once anyhow, so nothing is computed again.
  kept = body if num_chunks == 1 else jax.checkpoint(body)
  _, values = jax.lax.scan(kept, None, (split(hidden), split(targets)))
  return jax.tree.map(join, values)
