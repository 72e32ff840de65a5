"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): a small pytree.

    W' = W + alpha / r · A B,   A [inputs, r],  B [r, outputs]

The forward pass knows nothing of adapters: it is given merged weights. So the
trainer differentiates through `merge`, the sampler serves merged weights, and
only the adapter has an optimizer, checkpoints and published versions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params, ParamSpec, param_specs

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """Which kernels get an adapter, and of what size; hashable.

  Attributes:
    rank: r, >= 1.
    alpha: the product A B is scaled by alpha / r, > 0.
    targets: kernels of a layer, of `TARGETS`; gate, up and down are those of
      the experts in sparse layers.

  Raises:
    ValueError: if a field is out of range, naming it.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]

  def __post_init__(self) -> None:
    """Checks every field."""
    if self.rank < 1:
      raise ValueError(f"rank must be >= 1, got {self.rank!r}")
    if not 0 < self.alpha < math.inf:
      raise ValueError(f"alpha must be positive, got {self.alpha!r}")
    unknown = [name for name in self.targets if name not in TARGETS]
    if (
        unknown
        or not self.targets
        or len(set(self.targets)) < len(self.targets)
    ):
      raise ValueError(
          f"targets must be some of {TARGETS}, each once, got {self.targets}"
      )

  @property
  def scale(self) -> float:
    """What the product A B is multiplied by."""
    return self.alpha / self.rank


@flax.struct.dataclass
class Pair:
  """The two factors of one kernel's adapter, float32."""

  a: Any  # [*inputs, r], or [X, *inputs, r]
  b: Any  # [r, *outputs], or [X, r, *outputs]


@flax.struct.dataclass
class Adapter:
  """An adapter of a whole transformer; L layers."""

  layers: tuple[dict[str, Pair], ...]  # field of `Layer` -> its factors


def adapter_specs(config: TransformerConfig, lora: LoRA) -> Adapter:
  """Declares every factor.

  A starts uniform with variance 1 / (3 fan-in), as PEFT does, B at zero: an
  adapter begins as no change.

  Args:
    config: sizes of the transformer.
    lora: which kernels, and the rank.

  Returns:
    `Adapter` whose leaves are `ParamSpec`.
  """
  return Adapter(
      layers=tuple(
          {
              name: _pair_specs(getattr(layer, name), lora.rank)
              for name in lora.targets
          }
          for layer in param_specs(config).layers
      )
  )


def init(key: Key[Array, ""], config: TransformerConfig, lora: LoRA) -> Adapter:
  """Draws an adapter that changes nothing yet.

  Args:
    key: PRNG key; each factor gets its own.
    config: sizes of the transformer.
    lora: which kernels, and the rank.

  Returns:
    Float32 factors.
  """
  specs = adapter_specs(config, lora)
  keys = iter(jax.random.split(key, len(jax.tree.leaves(specs))))
  return jax.tree.map(lambda s: s.init(next(keys), s.shape, s.dtype), specs)


def merge(params: Params, adapter: Adapter, *, lora: LoRA) -> Params:
  """Adds an adapter to the weights it was made for.

  Args:
    params: the base, float32.
    adapter: factors.
    lora: of the adapter.

  Returns:
    W + alpha / r · A B where there is an adapter, the base's own arrays
    elsewhere.
  """
  layers = tuple(
      dataclasses.replace(
          layer,
          **{
              name: getattr(layer, name) + lora.scale * _product(pair)
              for name, pair in pairs.items()
          },
      )
      for layer, pairs in zip(params.layers, adapter.layers, strict=True)
  )
  return dataclasses.replace(params, layers=layers)


def _product(pair: Pair) -> Array:
  """A B, expert by expert where there are several."""
  multiply = functools.partial(jnp.tensordot, axes=1)
  if pair.a.ndim == pair.b.ndim == 3:  # so are only those of experts
    multiply = jax.vmap(multiply)
  return multiply(pair.a, pair.b)


def _pair_specs(spec: ParamSpec, rank: int) -> Pair:
  """Declares the factors of one kernel."""
  first = int(spec.logical_axes[0] == "expert")
  cut = first + spec.inputs
  fan_in = math.prod(spec.shape[first:cut])

  def factor(
      shape: tuple[int, ...], axes: tuple[str, ...], draw: Any, inputs: int
  ) -> ParamSpec:
    lead, lead_axes = spec.shape[:first], spec.logical_axes[:first]
    return ParamSpec(
        (*lead, *shape), spec.dtype, (*lead_axes, *axes), draw, inputs
    )

  return Pair(
      a=factor(
          (*spec.shape[first:cut], rank),
          (*spec.logical_axes[first:cut], "rank"),
          functools.partial(_draw_uniform, fan_in),
          spec.inputs,
      ),
      b=factor(
          (rank, *spec.shape[cut:]),
          ("rank", *spec.logical_axes[cut:]),
          _draw_zeros,
          1,
      ),
  )


def _draw_uniform(
    fan_in: int, key: Any, shape: tuple[int, ...], dtype: np.dtype
) -> Array:
  """Draws uniformly from ±fan_in^-1/2."""
  bound = fan_in**-0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def _draw_zeros(key: Any, shape: tuple[int, ...], dtype: np.dtype) -> Array:
  """Ignores the key."""
  del key
  return jnp.zeros(shape, dtype)
