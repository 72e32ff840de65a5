"""From what is published to what a sampler takes, without a learner."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax

from mgrpo_jax import contents, publish, sharding, trainer
from mgrpo_jax.policy import fingerprint
from mgrpo_jax.policy import lora as adapters
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.policy.params import param_specs
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.store import Store


class Weights:
  """Reads published weights of a policy, or of its adapter.

  An adapter's base stays in memory; nothing of an optimizer does. So does, on
  the host, the version that what is published is the difference to, if it is.
  """

  def __init__(
      self,
      policy: Policy,
      lora: LoRA | None,
      mesh: jax.sharding.Mesh | None,
  ) -> None:
    """Reads nothing yet.

    Args:
      policy: with the weights to begin with.
      lora: the adapter that is trained in place of them; None if they are.
      mesh: of the sampler, None for the default device.

    Raises:
      ValueError: the mesh does not divide the parameters, naming one.
    """
    specs: Any = param_specs(policy.config)
    self._fingerprint = fingerprint.fingerprint(policy, lora)
    self._lora, self._mesh = lora, mesh
    self._base: Any = None
    if lora is not None:
      self._base = policy.params
      if mesh is not None:
        resting = sharding.params_shardings(specs, mesh)
        self._base = jax.device_put(policy.params, resting)
      specs = adapters.adapter_specs(policy.config, lora)
    self._like = sharding.shapes(specs, mesh)
    self._held = contents.Held()

  def read(self, store: Store, policy: str) -> publish.Weights:
    """Reads the newest good version.

    Args:
      store: the bucket.
      policy: its name.

    Returns:
      What was read; its parameters are the transformer's.

    Raises:
      MismatchError: another policy was published.
      NoVersionError: there is none.
      StorageError: the store cannot be read.
    """
    found = publish.read(
        store, policy, "latest", like=self._like, held=self._held
    )
    fingerprint.check(policy, found.meta.get("fingerprint"), self._fingerprint)
    if self._lora is None:
      return found
    on_mesh: Any = contextlib.nullcontext()
    if self._mesh is not None:
      on_mesh = jax.set_mesh(self._mesh)
    with on_mesh:
      merged = trainer.merge(self._base, found.params, lora=self._lora)
    return dataclasses.replace(found, params=merged)
