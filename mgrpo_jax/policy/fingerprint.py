"""Which policy a run began with, as digests that a later process compares.

A run directory names the sources of its policies; what lies there may change.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from mgrpo_jax import leaves
from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.policy.lora import LoRA
from mgrpo_jax.policy.policy import Policy


def fingerprint(policy: Policy, lora: LoRA | None = None) -> dict[str, str]:
  """Computes the sha256 of every part of a policy.

  Args:
    policy: as it was loaded.
    lora: the adapter that is trained in place of its weights, or None.

  Returns:
    Part (`chat format`, `sizes`, `tokenizer`, `weights`, and `adapter` where
    there is one) to digest.
  """
  files = policy.tokenizer.files() if policy.tokenizer else {}
  parts: Mapping[str, Any] = {
      "chat format": [policy.chat, policy.system],
      "sizes": {
          field.name: repr(getattr(policy.config, field.name))
          for field in dataclasses.fields(policy.config)
          if field.name != "execution"  # changes no value
      },
      "tokenizer": {
          name: hashlib.sha256(content).hexdigest()
          for name, content in files.items()
      },
      "weights": {  # one at a time: all of them need not fit on the host
          name: leaves.describe(leaves.to_host({name: leaf})[name])
          for name, leaf in leaves.named(policy.params).items()
      },
  }
  if lora is not None:
    parts = {**parts, "adapter": dataclasses.asdict(lora)}
  return {name: leaves.digest(part) for name, part in parts.items()}


def check(
    name: str, kept: Mapping[str, str] | None, policy: Mapping[str, str]
) -> None:
  """Checks that a policy is the one that a run began with.

  Args:
    name: of the policy.
    kept: its fingerprint when the run began; None where that is not known.
    policy: its fingerprint now.

  Raises:
    MismatchError: it is not; names the parts that differ.
  """
  if kept is None:
    raise MismatchError(
        f"policy {name!r}: the run did not record what it began with"
    )
  differ = sorted(
      part for part in {*kept, *policy} if kept.get(part) != policy.get(part)
  )
  if differ:
    raise MismatchError(
        f"policy {name!r} is not the one that the run began with, its source"
        f" has changed: {', '.join(differ)}"
    )
