"""A model's products with nothing between them, the least a program takes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mgrpo_jax.policy import attention, params, products, transformer
from mgrpo_jax.policy.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """How many tokens meet the kernels, and each other.

  Attributes:
    layers: tokens of every layer.
    head: tokens that get logits.
    length: tokens of a row, in which queries meet the keys up to the end of
      their block (`attention.cut`); 0 where attention is left out.
  """

  layers: int
  head: int
  length: int = 0


def forward(
    weights: params.Params, rows: Rows, config: TransformerConfig
) -> Callable[[], float]:
  """Multiplies tokens with every kernel.

  Args:
    weights: of the policy, arranged where the config says so.
    rows: tokens.
    config: sizes.

  Returns:
    A function that runs it and returns seconds.
  """
  return _runner(_multiply, weights, rows, config)


def both_ways(
    weights: params.Params, rows: Rows, config: TransformerConfig
) -> Callable[[], float]:
  """Multiplies forwards, then for the gradients of tokens and kernels.

  What the backward pass computes again is not counted.

  Args:
    weights: of the policy.
    rows: tokens.
    config: sizes.

  Returns:
    A function that runs it and returns seconds.
  """
  return _runner(_there_and_back, weights, rows, config)


def timed(program: Callable[..., Any], *arguments: Any) -> float:
  """Runs a compiled program.

  Args:
    program: to run.
    *arguments: of it.

  Returns:
    Seconds until its results are there.
  """
  start = time.perf_counter()
  jax.block_until_ready(program(*arguments))
  return time.perf_counter() - start


def _runner(
    function: Callable[..., Any],
    weights: params.Params,
    rows: Rows,
    config: TransformerConfig,
) -> Callable[[], float]:
  """Compiles (weights, inputs, config) -> products; returns what to time."""
  program = jax.jit(functools.partial(function, config=config))
  inputs = _inputs(rows, config)
  return lambda: timed(program, weights, inputs)


def _inputs(rows: Rows, config: TransformerConfig) -> dict[str, Any]:
  """Random tokens of every width that a kernel takes."""
  draw = np.random.default_rng(0).normal

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(draw(size=shape), config.dtype)

  keys, width = config.num_kv_heads, config.head_dim
  group = config.num_heads // keys
  found: dict[str, Any] = {
      "narrow": normal(rows.layers, 1, config.embed_dim),
      "wide": normal(rows.layers, 1, config.mlp_dim),
      "attended": normal(rows.layers, 1, keys, group, width),
      "last": normal(rows.head, 1, config.embed_dim),
  }
  if rows.length:
    held = rows.layers // rows.length
    # Of each layer its own: the compiler multiplies equal ones once.
    found["met"] = [
        (
            normal(held, keys, group, rows.length, width),
            normal(held, keys, rows.length, width),
        )
        for _ in range(config.num_layers)
    ]
  return found


def _multiply(
    weights: params.Params, inputs: dict[str, Any], config: TransformerConfig
) -> list[Any]:
  """All products of all layers, and the head's."""
  narrow = inputs["narrow"]
  found = []
  for layer in weights.layers:
    for into in (
        (layer.query, layer.key, layer.value),
        (layer.gate, layer.up),
    ):
      found += products.multiply_each(narrow, into, [()] * len(into))
    found.append(products.multiply(inputs["attended"], layer.output))
    found.append(products.multiply(inputs["wide"], layer.down))
  for queries, keys in inputs.get("met", ()):
    found += _meet(queries, keys)
  return [*found, transformer.unembed(weights, inputs["last"], config=config)]


def _meet(
    queries: Float[Array, "N Hkv G T D"], keys: Float[Array, "N Hkv T D"]
) -> list[Float[Array, "N Hkv GQ D"]]:
  """Attention's two products, with nothing between them; keys are values."""
  found = []
  for start, stop in attention.cut(keys.shape[2]):
    block = queries[:, :, :, start:stop]
    block = block.reshape(*block.shape[:2], -1, block.shape[4])
    seen = keys[:, :, :stop]
    scores = jnp.einsum("nkqd,nksd->nkqs", block, seen)
    found.append(jnp.einsum("nkqs,nksd->nkqd", scores, seen))
  return found


def _there_and_back(
    weights: params.Params, inputs: dict[str, Any], config: TransformerConfig
) -> Any:
  """All products, then those for the gradients of weights and inputs."""
  multiply = functools.partial(_multiply, config=config)
  found, pull = jax.vjp(multiply, weights, inputs)
  # What comes back must not be a constant, nor known before the products.
  return pull(found)
