"""FLOPs: what a model's training needs, and what a traced program does."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from mgrpo_jax.policy import params
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """FLOPs of matrix products.

  Attributes:
    products: that the compiler sees.
    kernels: inside kernels, whose time the compiler does not estimate.
  """

  products: float = 0.0
  kernels: float = 0.0

  def __add__(self, other: Work) -> Work:
    """One after the other."""
    return Work(
        products=self.products + other.products,
        kernels=self.kernels + other.kernels,
    )

  def __mul__(self, times: int) -> Work:
    """The same several times."""
    return Work(products=self.products * times, kernels=self.kernels * times)


def active_params(config: TransformerConfig) -> int:
  """Counts the weights that multiply a token.

  Args:
    config: sizes.

  Returns:
    All weights, of the experts only the share that a token is sent to, and
    the embedding only where it is the unembedding too: a look-up multiplies
    nothing.
  """
  experts = config.experts

  def count(spec: ParamSpec) -> int:
    size = math.prod(spec.shape)
    if experts is not None and "expert" in spec.logical_axes:
      return size * experts.per_token // experts.number
    return size

  total = sum(map(count, jax.tree.leaves(params.param_specs(config))))
  if not config.tied_embeddings:
    total -= config.vocab_size * config.embed_dim
  return total


def visible_pairs(length: int, window: int) -> int:
  """Counts the (query, key) pairs of one causal row.

      T (T + 1) / 2;   with a window w < T:  w T - w (w - 1) / 2

  Args:
    length: T, tokens of the row, all of one segment.
    window: w, tokens that a query sees, itself included; 0 for all.

  Returns:
    The number of pairs.
  """
  if not window or window >= length:
    return length * (length + 1) // 2
  return window * length - window * (window - 1) // 2


def training(
    config: TransformerConfig, *, rows: int, length: int, targets: int
) -> float:
  """Computes the model FLOPs of training on full rows.

      6 · (active params · tokens + V · E · targets)
        + 12 · H · D · Σ_layers pairs · rows,   params but for the unembedding

  Forward once and backward twice; of attention 2 D FLOPs a pair and head for
  each of q·k and the weighted sum of values. Only visible pairs count, and
  nothing that is computed twice (PaLM, arXiv 2204.02311, appendix B, which
  counts all pairs).

  Args:
    config: sizes.
    rows: packed rows, each of one segment.
    length: tokens of a row.
    targets: tokens of a row whose logits are needed.

  Returns:
    FLOPs of one forward and backward pass.
  """
  pairs = sum(
      visible_pairs(length, config.window(layer))
      for layer in range(config.num_layers)
  )
  width = config.num_heads * config.head_dim
  head = config.vocab_size * config.embed_dim
  inner = (active_params(config) - head) * length
  dense = 6.0 * rows * (inner + head * targets)
  return dense + 12.0 * width * pairs * rows


def traced(jaxpr: Any, *, loops: int = 1) -> Work:
  """Counts the matrix products of a traced program, as often as they run.

  XLA's own count takes the body of a loop once, and knows no kernels.

  Args:
    jaxpr: of the whole program, on all devices; what none of its results
      needs is left out, as compilers do.
    loops: times that a `while` of unknown length runs.

  Returns:
    FLOPs on all devices together; of a condition's branches the most.
  """
  whole = getattr(jaxpr, "jaxpr", jaxpr)
  used, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))
  return _count(used, loops)


def _count(jaxpr: Any, loops: int) -> Work:
  """Adds up the operations of a program and of what they run."""
  total = Work()
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if eqn.primitive.name in _COUNTED:
      total += _COUNTED[eqn.primitive.name](eqn)
      continue
    parts = [_count(one, loops) for one in _inner(eqn.params)]
    if eqn.primitive.name == "cond":
      parts = [max(parts, key=lambda part: part.products + part.kernels)]
    total += sum(parts, Work()) * _times(eqn, loops)
  return total


def _times(eqn: Any, loops: int) -> int:
  """How often an operation runs what is inside it, on all devices."""
  if eqn.primitive.name == "scan":
    return eqn.params["length"]
  if eqn.primitive.name == "shard_map":
    return math.prod(eqn.params["mesh"].shape.values())
  return loops if eqn.primitive.name == "while" else 1


def _dot(eqn: Any) -> Work:
  """Twice the numbers of the result, times what is summed over."""
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
  inner = math.prod(lhs.shape[axis] for axis in contracted)
  return Work(products=2.0 * math.prod(out.shape) * inner)


def _ragged(eqn: Any) -> Work:
  """Every row of the left meets one group's matrix; a kernel, on TPUs."""
  numbers = eqn.params["ragged_dot_dimension_numbers"]
  lhs, rhs = eqn.invars[0].aval, eqn.invars[1].aval
  (_, contracted), (_, batch) = numbers.dot_dimension_numbers
  bound = {*contracted, *batch, *numbers.rhs_group_dimensions}
  free = [size for axis, size in enumerate(rhs.shape) if axis not in bound]
  return Work(kernels=2.0 * math.prod(lhs.shape) * math.prod(free))


def _kernel(eqn: Any) -> Work:
  """What a kernel says of itself, else what splash attention computes.

  Its grid walks over n blocks of queries and m of keys, all of a row's or, with
  a window, the m that a block of queries can see. A causal mask leaves

      1/2 + 1/(2 min(n, m))       of all blocks: below the diagonal and on it
      1 - (m - 1) / (2 n)         of a window's: early queries see fewer
  """
  estimate = eqn.params.get("cost_estimate")
  if estimate is not None:
    return Work(kernels=float(estimate.flops))
  grid = eqn.params["grid_mapping"].grid
  sizes = [int(size) for size in grid if isinstance(size, int | np.integer)]
  body = _count(eqn.params["jaxpr"], 1)
  return Work(
      kernels=body.products * math.prod(sizes) * _visible(eqn.params, sizes)
  )


def _visible(params: Mapping[str, Any], sizes: Sequence[int]) -> float:
  """The share of an attention kernel's grid that a causal mask leaves."""
  # The gradient of keys has its heads in the middle, and queries last.
  of_keys = "dkv" in params["name"]
  queries, keys = (sizes[-1], sizes[-3]) if of_keys else (sizes[-2], sizes[-1])
  blocks = json.loads(params["metadata"]["xprof_metadata"])
  suffix = next(s for s in ("_dkv", "_dq", "") if s[1:] in params["name"])
  if queries * blocks[f"block_q{suffix}"] == keys * blocks[f"block_kv{suffix}"]:
    return 0.5 + 0.5 / min(queries, keys)
  few, many = sorted((queries, keys))
  return 1 - (few - 1) / (2 * many)


_COUNTED: Mapping[str, Callable[[Any], Work]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "pallas_call": _kernel,
}


def _inner(values: Any) -> list[Any]:
  """The programs among an operation's parameters."""
  flat = jax.tree.leaves(
      list(values.values()), is_leaf=lambda one: hasattr(one, "eqns")
  )
  return [
      one
      for one in flat
      if hasattr(one, "eqns") or hasattr(getattr(one, "jaxpr", None), "eqns")
  ]
