"""What of an engine lives on its device: the weights and the cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgrpo_jax import sharding
from mgrpo_jax.policy import products
from mgrpo_jax.policy.cache import KVCache
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.decode import Drawn
from mgrpo_jax.policy.params import Params, param_specs
from mgrpo_jax.sampler import device
from mgrpo_jax.sampler.schedule import Visit

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
      num_slots: int,
      context: int,
      block: int,
      decode_steps: int,
      decode_rows: int,
      mesh: jax.sharding.Mesh | None,
  ) -> None:
    """Allocates the cache; compiles nothing else yet.

    Args:
      config: sizes of the policy.
      params: weights.
      num_slots: streams that the cache holds.
      context: tokens that a stream can have.
      block: tokens of cache that are attended or skipped together.
      decode_steps: tokens sampled for each slot in a visit.
      decode_rows: slots that are computed together, 1 to `num_slots`.
      mesh: of `sharding.sampler_mesh`, None for the default device.
    """
    self._config = config
    self._decode_steps = decode_steps
    self._decode_rows = decode_rows
    self._heads: jax.sharding.NamedSharding | None = None
    self._place: Any = jax.local_devices()[0]
    if mesh is not None:
      self._heads = device.split_heads(mesh)
      self._place = sharding.params_shardings(param_specs(config), mesh)
    self.params = self.placed(params)
    self._cache: KVCache = jax.device_put(
        device.init_cache(
            config=config,
            num_slots=num_slots,
            length=context,
            block=block,
            num_rows=decode_rows,
        ),
        self._heads or self._place,
    )

  def placed(self, params: Params) -> Params:
    """Puts weights where they are sampled from, in the dtype they are used in.

    Args:
      params: weights of any dtype, anywhere.

    Returns:
      The same weights.
    """
    used = jax.tree.map(lambda w: jnp.asarray(w, self._config.dtype), params)
    if self._config.execution.outputs_first:
      used = products.turn(used, config=self._config)
    return jax.device_put(used, self._place)

  def visit(self, params: Params, visit: Visit) -> Drawn:
    """Does what was planned, and waits for it.

    One visit at a time, so each finds the cache that the last one left.

    Args:
      params: weights, of `placed`.
      visit: what to do.

    Returns:
      What was drawn, on the host.
    """
    cache = self._cache
    for call in visit.prefills:
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
    for first in range(0, len(visit.copies), _COPIES):
      pairs = visit.copies[first : first + _COPIES]
      pairs = pairs + pairs[-1:] * (_COPIES - len(pairs))
      sources, targets = np.asarray(pairs, np.int32).T
      cache = device.copy_slots(cache, sources, targets, heads=self._heads)
    self._cache, drawn = device.decode(
        params,
        cache,
        visit.slots,
        config=self._config,
        num_steps=self._decode_steps,
        num_rows=self._decode_rows,
        heads=self._heads,
    )
    return jax.tree.map(np.asarray, drawn)
