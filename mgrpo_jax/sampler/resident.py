"""What of an engine lives on its device: the weights and the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgrpo_jax import sharding
from mgrpo_jax.policy import arranging
from mgrpo_jax.policy.cache import KVCache
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Drawn
from mgrpo_jax.policy.params import Params, param_specs
from mgrpo_jax.sampler import device
from mgrpo_jax.sampler.orders import Orders
from mgrpo_jax.sampler.sizes import Sizes

_COPIES = 8  # slots copied by one call


class Resident:
  """Weights to sample from, and the cache of every slot.

  Attributes:
    params: the weights of the visits that are begun from now on.
  """

  def __init__(
      self,
      config: TransformerConfig,
      params: Params,
      *,
      sizes: Sizes,
      mesh: jax.sharding.Mesh | None,
  ) -> None:
    """Allocates the cache; compiles nothing else yet.

    Args:
      config: sizes of the policy.
      params: weights.
      sizes: of the engine.
      mesh: of `sharding.sampler_mesh`, None for the default device.

    Raises:
      ValueError: the cache's kernel is not for an engine like this one.
    """
    if (attention := config.execution.decode_attention) is not None:
      attention.check(
          config,
          num_slots=sizes.num_slots,
          num_rows=sizes.rows,
          context=sizes.context,
          block=sizes.block,
          devices=1 if mesh is None else mesh.size,
      )
    self._config = config
    self._decode_steps = sizes.decode_steps
    self._decode_rows = sizes.rows
    self._heads: jax.sharding.NamedSharding | None = None
    self._place: Any = jax.local_devices()[0]
    self._shared = mesh is not None and sharding.spans_processes(mesh)
    if mesh is not None:
      self._heads = device.split_heads(mesh)
      self._place = sharding.params_shardings(param_specs(config), mesh)
    self.params = self.placed(params)
    cache: KVCache = device.init_cache(
        config=config,
        num_slots=sizes.num_slots,
        length=sizes.context,
        block=sizes.block,
        num_rows=sizes.rows,
        heads=self._heads,
    )
    # On a mesh it was made in place.
    self._cache = cache if mesh else jax.device_put(cache, self._place)

  def placed(self, params: Params) -> Params:
    """Puts weights where they are sampled from, in the dtype they are used in.

    Args:
      params: weights of any dtype, anywhere; over several processes either
        whole and equal in each of them, or spread over all of them.

    Returns:
      The same weights.
    """
    if self._shared:
      spread = functools.partial(_spread, dtype=self._config.dtype)
      return jax.tree.map(spread, params, self._place)
    used = jax.tree.map(lambda w: jnp.asarray(w, self._config.dtype), params)
    used = jax.device_put(used, self._place)
    if self._config.execution.kernels == "trained":
      return used
    return arranging.arrange(used, config=self._config)

  def visit(
      self,
      params: Params,
      orders: Orders,
      begun: Callable[[], None] = lambda: None,
  ) -> Drawn:
    """Does what was ordered, and waits for it.

    One visit at a time, so each finds the cache that the last one left.

    Args:
      params: weights, of `placed`.
      orders: what to do.
      begun: called when the device has it all.

    Returns:
      What was drawn, on the host.
    """
    cache = self._cache
    for call in orders.prefills:
      cache = device.prefill(
          params,
          cache,
          call.tokens,
          call.lengths,
          call.slots,
          call.starts,
          config=self._config,
          heads=self._heads,
      )
    for first in range(0, len(orders.copies), _COPIES):
      pairs = list(orders.copies[first : first + _COPIES])
      pairs += pairs[-1:] * (_COPIES - len(pairs))
      sources, targets = np.asarray(pairs, np.int32).T
      cache = device.copy_slots(cache, sources, targets, heads=self._heads)
    self._cache, drawn = device.decode(
        params,
        cache,
        orders.slots,
        config=self._config,
        num_steps=self._decode_steps,
        num_rows=self._decode_rows,
        heads=self._heads,
    )
    begun()
    return jax.tree.map(np.asarray, drawn)


def _spread(
    weight: Any, place: jax.sharding.NamedSharding, *, dtype: str
) -> jax.Array:
  """A weight on the devices of several processes, each of which calls this."""
  if isinstance(weight, jax.Array) and not weight.is_fully_addressable:
    return jax.device_put(weight.astype(dtype), place)
  whole = np.asarray(weight)
  return jax.make_array_from_callback(
      whole.shape, place, lambda part: whole[part].astype(dtype)
  )
