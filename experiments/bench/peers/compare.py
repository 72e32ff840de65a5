"""Random ragged batches, our numbers on them, and how far two numbers are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgrpo_jax import losses, numerics
from mgrpo_jax.objectives import PolicyLoss
from mgrpo_jax.types import Prediction, TrainBatch

# Few, because every operation compiles once for each: tasks, members, tokens.
SHAPES = ((1, 1, 1), (2, 4, 7), (3, 7, 5), (5, 2, 33), (1, 6, 12), (4, 3, 2))
SINGLE, DOUBLE = 2e-5, 1e-7  # limits; peers add 1e-8 to some denominators
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
CAP = 2.0  # of importance weights
FAR = 30.0  # nats, of the extreme ratios; beyond it ours is bounded at 40
Numbers = np.ndarray[Any, Any]
Adjust = Callable[[jax.Array, TrainBatch], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """B tasks of K members, N = B·K trajectories of T tokens; float32 values."""

  rewards: Numbers  # [B, K]
  present: Numbers  # [B, K] bool; not all where groups are ragged
  mask: Numbers  # [N, T] 1 on sampled tokens; rows may have none
  now: Numbers  # [N, T] nats
  old: Numbers  # [N, T] nats
  ref: Numbers  # [N, T] nats
  sampler: Numbers  # [N, T] nats
  entropy: Numbers  # [N, T] nats
  advantages: Numbers  # [N]
  values: Numbers  # [N, T]
  old_values: Numbers  # [N, T]

  @property
  def filled(self) -> Numbers:
    """Which trajectories have a sampled token, [N] bool."""
    return self.mask.sum(1) > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
  """The same number there and here."""

  theirs: Any
  ours: Any  # with what is known to differ done their way
  plain: Any  # as it is
  scale: float  # errors of smaller numbers are relative to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
  """A function of a peer beside ours."""

  what: str
  peer: str
  difference: str  # what is known to differ; empty for nothing
  pairs: Callable[[Batch], Iterator[Pair]]
  limit: float | None = None  # None only shows

  def errors(self, batch: Batch) -> tuple[float, float]:
    """The largest relative errors: difference accounted for, and not.

    Returns:
      Both; -1 where the batch holds nothing to compare.
    """
    found = []
    for pair in self.pairs(batch):
      found.append(
          (
              error(pair.theirs, pair.ours, pair.scale),
              error(pair.theirs, pair.plain, pair.scale),
          )
      )
    most = np.max(np.reshape(found, (-1, 2)), axis=0, initial=-1.0)
    return float(most[0]), float(most[1])


def error(theirs: Any, ours: Any, scale: float) -> float:
  """The largest error relative to the larger number, infinite at a NaN."""
  a, b = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
  if a.shape != b.shape:
    raise AssertionError(f"shapes differ: {a.shape}, {b.shape}")
  if not a.size:
    return 0.0
  size = np.maximum(np.maximum(np.abs(a), np.abs(b)), scale)
  with np.errstate(invalid="ignore", divide="ignore"):
    relative = np.abs(a - b) / size
  return float(
      np.where(np.isfinite(a) & np.isfinite(b), relative, np.inf).max()
  )


def draw(rng: np.random.Generator) -> Batch:
  """Draws a batch: on-policy, near, or with extreme ratios."""
  tasks, members, length = SHAPES[rng.integers(len(SHAPES))]
  shape = (tasks * members, length)
  inside = np.arange(length) < rng.integers(0, length + 1, (shape[0], 1))
  mask = inside & (rng.random(shape) < rng.choice([0.5, 1.0]))
  mask[0, rng.integers(length)] = True  # some peers divide by the tokens
  old = -rng.exponential(1.0, shape)
  spread = rng.choice([0.0, 0.05, 0.5])

  def near() -> Numbers:
    moved = old + spread * rng.normal(size=shape)
    far = rng.random(shape) < rng.choice([0.0, 0.0, 0.15])
    return np.where(far, old + rng.uniform(-FAR, FAR, shape), moved)

  return Batch(
      rewards=_single(_rewards(rng, (tasks, members))),
      present=rng.random((tasks, members)) < rng.choice([0.6, 1.0]),
      mask=mask.astype(np.float64),
      now=_single(near()),
      old=_single(old),
      ref=_single(near()),
      sampler=_single(near()),
      entropy=_single(rng.uniform(0, 3, shape)),
      advantages=_single(rng.normal(size=shape[0])),
      values=_single(rng.normal(size=shape)),
      old_values=_single(rng.normal(size=shape)),
  )


def _rewards(rng: np.random.Generator, shape: tuple[int, int]) -> Numbers:
  """Draws rewards: graded, right or wrong, and groups that are all equal."""
  graded = rng.normal(size=shape) * rng.choice([0.01, 1.0, 100.0])
  found = graded if rng.random() < 0.5 else (graded > 0).astype(np.float64)
  equal = rng.random((shape[0], 1)) < 0.25
  return np.where(equal, rng.uniform(-1, 1, (shape[0], 1)), found)


def _single(values: Numbers) -> Numbers:
  """Rounds to float32, so that every precision begins with the same."""
  return np.asarray(values, np.float32).astype(np.float64)


@contextlib.contextmanager
def precision(dtype: Any) -> Iterator[None]:
  """Lets jax compute in float64 where the peer does, too."""
  with jax.enable_x64(dtype == np.float64):
    yield


def objective(**changes: Any) -> PolicyLoss:
  """Our loss: token ratios, asymmetric clipping, a mean over tokens."""
  fields: dict[str, Any] = {
      "ratio": losses.token_ratio,
      "aggregation": losses.token_mean,
      "kl": None,
      "kl_coefficient": 0.0,
      "importance": None,
      "importance_cap": CAP,
      "surrogate": losses.clipped_surrogate,
      "entropy_coefficient": 0.0,
      "critic": None,
      **CLIP,
  }
  return PolicyLoss(**(fields | changes))


def sequence_mean_token_sum_norm(
    values: Any, mask: Any, weight: Any, *, totals: Any = None
) -> Any:
  """Ours where L is the arrays' width, as the peers have it."""
  return losses.sequence_mean_token_sum_norm(
      values, mask, weight, max_tokens=values.shape[1], totals=totals
  )


def policy_loss(
    chosen: PolicyLoss,
    batch: Batch,
    *,
    weight: Numbers | None = None,
    adjust: Adjust | None = None,
    dtype: Any = np.float64,
) -> tuple[Numbers, Numbers, Numbers]:
  """Our loss, its gradient by log-probs, and by entropies.

  Args:
    chosen: the loss.
    batch: where.
    weight: [N], of the trajectories; None for 1.
    adjust: makes of the log-probs what a peer makes of them.
    dtype: computed in.

  Returns:
    The value, and gradients [N, T].
  """
  with precision(dtype):
    train = _train_batch(batch, weight, dtype)
    lengths = train.loss_mask.sum(1)
    totals = losses.Totals(
        trajectories=train.weight.sum(),
        tokens=(train.weight * lengths).sum(),
        context_tokens=jnp.zeros((), dtype),
    )

    def loss(now: jax.Array, entropy: jax.Array) -> jax.Array:
      said = now if adjust is None else adjust(now, train)
      return chosen(Prediction(logprobs=said, entropy=entropy), train, totals)[
          0
      ]

    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(
        jnp.asarray(batch.now, dtype), jnp.asarray(batch.entropy, dtype)
    )
    return np.asarray(value), np.asarray(slopes[0]), np.asarray(slopes[1])


def _train_batch(
    batch: Batch, weight: Numbers | None, dtype: Any
) -> TrainBatch:
  """What our loss reads."""
  nothing = jnp.zeros(batch.mask.shape, dtype)
  return TrainBatch(
      tokens=nothing,
      segment_ids=nothing,
      positions=nothing,
      sampled=nothing,
      row=nothing[:, 0],
      offset=nothing[:, 0],
      loss_mask=jnp.asarray(batch.mask, dtype),
      context_mask=nothing,
      sampler_logprobs=jnp.asarray(batch.sampler, dtype),
      old_logprobs=jnp.asarray(batch.old, dtype),
      ref_logprobs=jnp.asarray(batch.ref, dtype),
      old_values=jnp.asarray(batch.old_values, dtype),
      advantage=jnp.asarray(batch.advantages, dtype),
      weight=jnp.ones(len(batch.mask), dtype)
      if weight is None
      else jnp.asarray(weight, dtype),
  )


def loss_pairs(
    theirs: Sequence[Any],
    ours: Sequence[Numbers],
    plain: Sequence[Numbers],
    *,
    gradients_only: bool = False,
) -> Iterator[Pair]:
  """Pairs a loss with its gradients.

  Args:
    theirs: the value, and gradients [N, T].
    ours: the same, differences accounted for.
    plain: the same, as it is.
    gradients_only: whether values are known to mean other things.

  Yields:
    The value, relative to the gradient's sum where it cancels to less, and
    every gradient, relative to that of an ordinary token.
  """
  if not gradients_only:
    total = float(np.abs(ours[1]).sum())
    yield Pair(
        theirs=theirs[0],
        ours=ours[0],
        plain=plain[0],
        scale=max(total, 1e-6),
    )
  for there, here, as_is in zip(theirs[1:], ours[1:], plain[1:], strict=True):
    yield Pair(theirs=there, ours=here, plain=as_is, scale=1 / here.size)


def aggregated(
    function: Callable[..., Any],
    batch: Batch,
    values: Sequence[Numbers],
    *,
    aggregate: Callable[..., jax.Array] = losses.token_mean,
    weight: Numbers | None = None,
    dtype: Any = np.float64,
) -> tuple[Numbers, ...]:
  """Our aggregate of a function of tokens, and its gradient by the first.

  Args:
    function: of arrays [N, T].
    batch: for its mask.
    values: the arrays.
    aggregate: one of the four.
    weight: [N], of the trajectories; None for 1.
    dtype: computed in.

  Returns:
    The value, and the gradient [N, T].
  """
  with precision(dtype):
    mask = jnp.asarray(batch.mask, dtype)
    counts = jnp.ones(len(mask)) if weight is None else weight
    rest = [jnp.asarray(value, dtype) for value in values[1:]]

    def loss(first: jax.Array) -> jax.Array:
      found = function(numerics.masked(first, mask), *rest)
      return aggregate(found, mask, jnp.asarray(counts, dtype))

    found = jax.value_and_grad(loss)(jnp.asarray(values[0], dtype))
    return tuple(np.asarray(one) for one in found)


def bounded(limit: float) -> Adjust:
  """Bounds log-ratios as peers do, without a gradient beyond the limit."""

  def adjust(now: jax.Array, train: TrainBatch) -> jax.Array:
    gap = now - train.old_logprobs
    kept = jnp.clip(gap, -limit, limit)
    return jnp.where(kept == gap, now, train.old_logprobs + kept)

  return adjust


def bounded_mean(token: float, most: float) -> Adjust:
  """Bounds log-ratios of tokens, with the gradient, then those of rows."""

  def adjust(now: jax.Array, train: TrainBatch) -> jax.Array:
    gap = now - train.old_logprobs
    lost = jax.lax.stop_gradient(gap - jnp.clip(gap, -token, token))
    now = now - lost
    mask = train.loss_mask
    total = jnp.sum((now - train.old_logprobs) * mask, axis=1, keepdims=True)
    mean = total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jnp.where(
        mean > most, jax.lax.stop_gradient(now - (mean - most)), now
    )

  return adjust
