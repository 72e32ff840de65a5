"""Arrow 7: which version is sampled from, and which the store has."""

import dataclasses
from collections.abc import Sequence

from mgrpo_jax.resources import Resources


class Publisher:
  """Hands new weights to the samplers and, when due, to the store.

  The store is written to while training goes on (`resources.writer`). A version
  that is due waits for the one before, and the last one is waited for.

  Attributes:
    versions: that are sampled from, by policy.
  """

  def __init__(self, resources: Resources) -> None:
    """Starts at version 0, nothing published.

    Args:
      resources: of the run.
    """
    self.versions = dict.fromkeys(resources.setup.own, 0)
    self._resources = resources
    self._unpublished: set[str] = set()  # newer than what the store has
    self._told: set[str] = set()  # problems of the store

  def publish(
      self, policies: Sequence[str], version: int, *, last: bool
  ) -> list[str]:
    """Makes weights a version; the store gets it when that is due.

    Args:
      policies: whose weights are new.
      version: how many steps they have behind them.
      last: whether no step follows; then it is due, for it is evaluated.

    Returns:
      What was found damaged in the store and not told before, a line each.

    Raises:
      StorageError: this version or the one before cannot be written.
    """
    setup, resources = self._resources.setup, self._resources
    for policy in policies:
      weights = resources.learners[policy].weights
      resources.engines[policy].update(weights, version)
      self.versions[policy] = version
      self._unpublished.add(policy)
    if not last and version % setup.publish_every:
      return []
    problems = self.settle()
    for policy in sorted(self._unpublished):
      self._store(policy)
    self._unpublished.clear()
    return problems + (self.settle() if last else [])

  def settle(self) -> list[str]:
    """Waits until what was handed over is in the store.

    Returns:
      What was found damaged there and not told before, a line each.

    Raises:
      StorageError: a version cannot be written.
    """
    found = dict.fromkeys(self._resources.writer.settle())
    problems = [one for one in found if one not in self._told]
    self._told.update(problems)
    return problems

  def _store(self, policy: str) -> None:
    """Has a policy's version written to the store."""
    resources, version = self._resources, self.versions[policy]
    learner = resources.learners[policy]
    meta = {"step": version - 1, "fingerprint": resources.fingerprints[policy]}
    if learner.lora is not None:  # what else it takes to merge it
      meta["adapter"] = dataclasses.asdict(learner.lora)
    resources.writer.write(policy, version, learner.trained, meta=meta)
