"""Log-probabilities of tokens, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mgrpo_jax.policy import transformer
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params


def token_logprobs(
    params: Params,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    segment_ids: Int[Array, "N T"],
    *,
    config: TransformerConfig,
    temperature: float | Float[Array, ""],
    wanted: Bool[Array, "N T"] | None = None,
    most_wanted: int = 0,
) -> Float[Array, "N T"]:
  """Computes the log-probability of every token given its past.

      out[t] = log softmax(logits[t - 1] / temperature)[tokens[t]]

  Logits are computed for `execution.logit_columns` at a time and recomputed in
  the backward pass, so [N, T, V] exists in neither.

  Args:
    params: weights.
    tokens: [N, T] int32.
    positions: [N, T] int32, from 0 in each segment.
    segment_ids: [N, T] int32, 0 is padding.
    config: sizes.
    temperature: > 0, of the distribution that was sampled from.
    wanted: [N, T], tokens whose log-probability is asked for. The head, which
      costs most in a small model, then runs only for them.
    most_wanted: tokens wanted in a row, at most; those beyond count as not
      wanted. 0 scores all tokens, whatever is wanted.

  Returns:
    [N, T] float32, nats; 0 where none is wanted, at t = 0, where a segment
    starts, and in padding.
  """
  hidden = transformer.hidden_states(
      params, tokens, positions, segment_ids, config=config
  )
  predicted = has_past(segment_ids)
  targets = jnp.roll(tokens, -1, axis=1)
  if wanted is not None and most_wanted:
    predicted &= wanted
    following = jnp.roll(predicted, -1, axis=1)
    order = jnp.argsort(~following, axis=1, stable=True)[:, :most_wanted]
    hidden = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
    targets = jnp.take_along_axis(targets, order, axis=1)

  def logprob(logits: Array, targets: Array) -> Array:
    scaled = logits / temperature
    return _at(scaled, targets) - jax.nn.logsumexp(scaled, axis=-1)

  values = _map_chunks(logprob, params, hidden, targets, config=config)
  if wanted is None or not most_wanted:
    values = jnp.roll(values, 1, axis=1)
  else:
    place = jnp.cumsum(predicted, axis=1) - 1
    predicted &= place < most_wanted
    values = jnp.take_along_axis(
        values, jnp.clip(place, 0, most_wanted - 1), axis=1
    )
  return jnp.where(predicted, values, 0.0)


def token_logprobs_and_entropy(
    params: Params,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    segment_ids: Int[Array, "N T"],
    *,
    config: TransformerConfig,
    temperature: float | Float[Array, ""],
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
  """Computes `token_logprobs` and the entropy of what each was drawn from.

      out[t] = -Σ_v p[v] log p[v],   p = softmax(logits[t - 1] / temperature)

  Args:
    params: weights.
    tokens: [N, T] int32.
    positions: [N, T] int32, from 0 in each segment.
    segment_ids: [N, T] int32, 0 is padding.
    config: sizes.
    temperature: > 0.

  Returns:
    Log-probabilities and entropies, [N, T] float32, nats; 0 at t = 0, where
    a segment starts, and in padding.
  """
  hidden = transformer.hidden_states(
      params, tokens, positions, segment_ids, config=config
  )

  def both(logits: Array, targets: Array) -> tuple[Array, Array]:
    logps = jax.nn.log_softmax(logits / temperature, axis=-1)
    return _at(logps, targets), -jnp.sum(jnp.exp(logps) * logps, axis=-1)

  targets = jnp.roll(tokens, -1, axis=1)
  found = _map_chunks(both, params, hidden, targets, config=config)
  real = has_past(segment_ids)
  values, entropies = (jnp.roll(one, 1, axis=1) for one in found)
  return jnp.where(real, values, 0.0), jnp.where(real, entropies, 0.0)


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

  @jax.checkpoint
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

  _, values = jax.lax.scan(body, None, (split(hidden), split(targets)))
  return jax.tree.map(join, values)
