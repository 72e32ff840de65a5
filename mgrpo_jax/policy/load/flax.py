"""Parameters out of the trees of other JAX code: flax nnx, flax linen, dicts.

Such a tree has its own names and layouts. The caller gives a table from our
names to the paths there; kernels are reshaped where only heads are joined or
apart, [E, H·D] to [E, Hkv, G, D], and nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params, ParamSpec, param_specs


def params_from_tree(
    tree: Any, names: Mapping[str, str], config: TransformerConfig
) -> Params:
  """Maps a tree of arrays to parameters.

  Args:
    tree: linen's `params`, an `nnx.State`, or any nest of dicts, lists and
      dataclasses of arrays.
    names: field of `Params` or `Layer` -> path in the tree, its keys joined by
      dots, `{}` for the number of the layer; fields that the config does not
      declare may be absent.
    config: sizes that the arrays must have, but for joined axes.

  Returns:
    Float32 parameters on the arrays' devices.

  Raises:
    ValueError: listing every field without a name, and every path that is
      missing, unexpected or misshaped.
  """
  if isinstance(tree, nnx.State):
    tree = nnx.to_pure_dict(tree)
  found = {
      ".".join(_keys(path)): value
      for path, value in jax.tree.flatten_with_path(tree)[0]
  }
  specs = param_specs(config)
  problems: list[str] = []
  used: set[str] = set()

  def take(path: tuple[Any, ...], spec: ParamSpec) -> Array | None:
    *layer, field = _keys(path)
    if field not in names:
      problems.append(f"no name for {field}")
      return None
    name = names[field].format(*layer[1:])
    used.add(name)
    if name not in found:
      problems.append(f"missing {name}")
      return None
    value = found[name]
    if not _joins(tuple(value.shape), spec.shape):
      problems.append(
          f"{name} has shape {tuple(value.shape)}, not {spec.shape}"
      )
      return None
    return jnp.asarray(value, spec.dtype).reshape(spec.shape)

  params = jax.tree.map_with_path(take, specs)
  problems += [f"unexpected {name}" for name in found if name not in used]
  if problems:
    raise ValueError(f"tree: {'; '.join(dict.fromkeys(problems))}")
  return params


def _keys(path: tuple[Any, ...]) -> list[str]:
  """Spells a path of a tree."""
  return [
      str(next(getattr(k, a) for a in ("key", "name", "idx") if hasattr(k, a)))
      for k in path
  ]


def _joins(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
  """Says whether a shape is another with neighbouring axes joined."""
  rest = list(wanted)
  for size in shape:
    joined = rest.pop(0) if rest else 0
    while joined < size and rest:
      joined *= rest.pop(0)
    if joined != size:
      return False
  return not rest
