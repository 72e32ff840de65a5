"""Brings the kernels of a sampler on a CPU into the order it keeps them in."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.native import build, tiles
from mgrpo_jax.policy.params import Layer, Params, ParamSpec, param_specs
from mgrpo_jax.policy.products import Arranged, Turned

_Keep = Callable[[Sequence[Array], Sequence[tuple[int, ...]]], Arranged]


def check(config: TransformerConfig, mesh: jax.sharding.Mesh | None) -> None:
  """Checks that a sampler can keep kernels as its execution says.

  Args:
    config: sizes, dtype and execution.
    mesh: that it samples on, None for one device.

  Raises:
    ValueError: it cannot; says why.
  """
  kernels = config.execution.kernels
  if kernels == "trained":
    return
  if mesh is not None:
    raise ValueError(f"kernels {kernels!r} are for samplers without a mesh")
  if kernels == "tiled":
    if config.dtype != "float32":
      raise ValueError(f"kernels 'tiled' are for float32, not {config.dtype}")
    if (platform := jax.local_devices()[0].platform) != "cpu":
      raise ValueError(f"kernels 'tiled' are for a CPU, not a {platform}")
    build.library()


def arrange(params: Params, *, config: TransformerConfig) -> Params:
  """Turns the kernels of every layer and the head, or cuts them into tiles.

  Those of experts stay as they are.

  Args:
    params: weights, on the default device.
    config: their sizes; its execution says how kernels are kept.

  Returns:
    The same numbers; `multiply_each` takes either. Where kernels were joined,
    the first of them holds all and the others are None. A tied head that is
    turned shares the embedding's memory in float32; else the embedding is made
    float32, for CPUs would do so with all of it to look a token up.

  Raises:
    ValueError: kernels are kept as trained, or cannot be kept so here.
  """
  specs = param_specs(config)
  kept = _keep(config.execution.kernels)
  layers = tuple(
      _arrange_layer(layer, spec, kept)
      for layer, spec in zip(params.layers, specs.layers, strict=True)
  )
  head: Arranged
  if not config.tied_embeddings:
    head = _arrange([params.unembedding], [specs.unembedding], kept)
  elif kept is _turn:
    head = Turned(matrix=params.embedding, outputs=((config.vocab_size,),))
  else:
    head = _arrange_matrices(
        (params.embedding.T,), ((config.vocab_size,),), kept
    )
  return dataclasses.replace(
      params,
      embedding=jnp.asarray(params.embedding, jnp.float32),
      layers=layers,
      unembedding=head,
  )


@functools.cache
def _keep(kernels: str) -> _Keep:
  """Finds the function that keeps kernels so, the same one each time."""
  if kernels == "turned":
    return _turn
  if kernels == "tiled":
    columns = int(build.library().MgrpoTileColumns())
    return functools.partial(tiles.cut, columns=columns)
  raise ValueError(f"kernels {kernels!r} are kept as they are trained")


def _arrange_layer(layer: Layer, specs: Layer, kept: _Keep) -> Layer:
  """Arranges what contracts inputs, but for a sparse layer's feed-forward."""
  joined = [("query", "key", "value"), ("output",)]
  if layer.router is None:
    joined += [("gate", "up"), ("down",)]
  arranged: dict[str, Arranged | None] = {}
  for first, *others in joined:
    names = (first, *others)
    arranged |= dict.fromkeys(others)
    arranged[first] = _arrange(
        [getattr(layer, name) for name in names],
        [getattr(specs, name) for name in names],
        kept,
    )
  return dataclasses.replace(layer, **arranged)


def _arrange(
    kernels: Sequence[Array], specs: Sequence[ParamSpec], kept: _Keep
) -> Arranged:
  """Arranges kernels of the same inputs."""
  outputs = tuple(spec.shape[spec.inputs :] for spec in specs)
  return _arrange_matrices(tuple(kernels), outputs, kept)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _arrange_matrices(
    kernels: Sequence[Array], outputs: Sequence[tuple[int, ...]], kept: _Keep
) -> Arranged:
  """Arranges kernels in one program, not operation by operation."""
  matrices = [
      kernel.reshape(-1, math.prod(shape))
      for kernel, shape in zip(kernels, outputs, strict=True)
  ]
  return kept(matrices, outputs)


def _turn(
    matrices: Sequence[Array], outputs: Sequence[tuple[int, ...]]
) -> Turned:
  """Turns kernels of the same inputs."""
  return Turned(
      matrix=jnp.concatenate([matrix.T for matrix in matrices]),
      outputs=tuple(outputs),
  )
