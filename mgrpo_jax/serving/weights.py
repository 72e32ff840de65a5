"""Other weights for a policy that is served, from a folder named beforehand.

A client names a policy, a version and a label, never a path: the weights lie at
`<folder>/<policy>/handed-v<version>`, as `sampler.handover` writes them.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Mapping

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import huggingface, load
from mgrpo_jax.sampler import handover
from mgrpo_jax.sampler.interface import RolloutEngine
from mgrpo_jax.serving import reading
from mgrpo_jax.serving.errors import RequestError, wrong

_LONGEST_LABEL = 64  # characters


class Weights:
  """Loads versions, and remembers which."""

  def __init__(
      self,
      folder: pathlib.Path,
      *,
      engines: Mapping[str, RolloutEngine],
      configs: Mapping[str, TransformerConfig],
  ) -> None:
    """Starts with the weights that the engines have.

    Args:
      folder: holds a folder of versions for each policy.
      engines: by policy.
      configs: sizes, by policy.
    """
    self._folder = folder
    self._engines = engines
    self._configs = configs
    self._labels = dict.fromkeys(engines, "")
    self._loading = asyncio.Lock()

  def label(self, name: str) -> str:
    """What the weights of a policy were called; empty for the first ones.

    Args:
      name: of the policy.

    Returns:
      The label.

    Raises:
      RequestError: there is no such policy.
    """
    if name not in self._labels:
      raise RequestError(
          404,
          f"there are no weights of {name[:80]!r}, but of"
          f" {', '.join(self._labels)}",
          code="model_not_found",
      )
    return self._labels[name]

  async def load(self, name: str, body: bytes) -> str:
    """Samples a policy from other weights from the next visit on.

    Args:
      name: of the policy.
      body: JSON with the `version`, and the `label` that it gets.

    Returns:
      The label.

    Raises:
      RequestError: there is no such policy, the body is wrong, or there is no
        such version of it.
    """
    self.label(name)
    fields = reading.parse(body)
    reading.check_names(fields, read=("version", "label"), neutral={})
    version = reading.whole(fields, "version", 0, 2**31 - 1)
    if version is None:
      raise RequestError(400, "version: missing", param="version")
    label = reading.text(fields, "label")
    if len(label) > _LONGEST_LABEL:
      raise wrong("label", label, f"at most {_LONGEST_LABEL} characters")
    path = handover.directory(self._folder / name, version)
    async with self._loading:
      try:
        policy = await asyncio.to_thread(load, path)
      except ValueError as error:
        raise RequestError(409, str(error), param="version") from error
      if _said(policy.config) != _said(self._configs[name]):
        raise RequestError(
            409, f"{path}: is another model than {name!r}", param="version"
        )
      if self._configs[name].value_head:  # a critic's, which is not saved
        policy = policy.with_critic()
      self._engines[name].update(policy.params, version)
      self._labels[name] = label
    return label


def _said(config: TransformerConfig) -> dict[str, object]:
  """What a config computes, without how."""
  fields = huggingface.write(config)
  del fields["activation_dtype"]
  return fields
