"""Arrow 7: which version is sampled from, and which the store has."""

import dataclasses
from collections.abc import Sequence

from mgrpo_jax import credit, manifest, statistics
from mgrpo_jax.resources import Resources
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.types import RolloutGroup


class Publisher:
  """Hands new weights to the samplers and, when due, to the store.

  The store is written to while training goes on (`resources.writer`). A version
  that is due waits for the one before, and the last one is waited for.

  Attributes:
    numbers: of the versions that were sampled from, by policy, the newest last;
      of those before this process, as many as `max_staleness`.
  """

  def __init__(self, resources: Resources) -> None:
    """Starts at version 0, nothing published.

    Args:
      resources: of the run.
    """
    self.numbers = {name: [0] for name in resources.setup.own}
    self._resources = resources
    self._unpublished: set[str] = set()  # newer than what the store has
    self._told: set[str] = set()  # problems of the store

  @property
  def versions(self) -> dict[str, int]:
    """The versions that are sampled from, by policy."""
    return {name: numbers[-1] for name, numbers in self.numbers.items()}

  def recent(self) -> dict[str, list[int]]:
    """Lists the versions that what is trained on may be of, by policy."""
    count = self._resources.setup.max_staleness + 1
    return {name: numbers[-count:] for name, numbers in self.numbers.items()}

  def outgrew(self, stage: Stage, group: RolloutGroup) -> bool:
    """Says whether a policy that learns is too far ahead of its tokens.

    Args:
      stage: of the step.
      group: that would be trained on.

    Returns:
      Whether it has seen more than `max_staleness` updates since it sampled
      one of them.
    """
    if stage.objective == "imitate":
      return False  # what an expert writes does not age
    setup = self._resources.setup
    team = setup.team_in(stage)
    policies = {
        role: team[role].policy
        for role in credit.learning(team, stage.trained)
        if team[role].policy in self.numbers
    }
    age = statistics.age(group, policies=policies, versions=self.numbers)
    return age > setup.max_staleness

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
      if version != self.numbers[policy][-1]:
        self.numbers[policy].append(version)
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
    weights = learner.offered(
        manifest.path(policy, version), short=resources.setup.publish_short
    )
    resources.writer.write(policy, version, weights, meta=meta)
