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

from mgrpo_jax.policy import params, products, transformer
from mgrpo_jax.policy.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """How many tokens meet the kernels.

  Attributes:
    layers: tokens of every layer.
    head: tokens that get logits.
  """

  layers: int
  head: int


def forward(
    weights: params.Params, rows: Rows, config: TransformerConfig
) -> Callable[[], float]:
  """Multiplies tokens with every kernel.

  Args:
    weights: of the policy, turned where the config says so.
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

  def tokens(count: int, *shape: int) -> jax.Array:
    return jnp.asarray(draw(size=(count, 1, *shape)), config.dtype)

  heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads)
  return {
      "narrow": tokens(rows.layers, config.embed_dim),
      "wide": tokens(rows.layers, config.mlp_dim),
      "attended": tokens(rows.layers, *heads, config.head_dim),
      "last": tokens(rows.head, config.embed_dim),
  }


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
  return [*found, transformer.unembed(weights, inputs["last"], config=config)]


def _there_and_back(
    weights: params.Params, inputs: dict[str, Any], config: TransformerConfig
) -> Any:
  """All products, then those for the gradients of weights and inputs."""
  multiply = functools.partial(_multiply, config=config)
  found, pull = jax.vjp(multiply, weights, inputs)
  # What comes back must not be a constant, nor known before the products.
  return pull(found)
