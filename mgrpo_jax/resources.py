"""What a run takes while it lasts: engines, learners, task streams, the store.

Built from a recipe, `plan.Setup`; `run.Run` puts them to use.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mgrpo_jax import atomic, environments, garbage, publish, sharding
from mgrpo_jax.agents.activity import Activity
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.agents.team import Team
from mgrpo_jax.environments import Reach
from mgrpo_jax.hosts import spread
from mgrpo_jax.learner import Learner
from mgrpo_jax.plan import Setup
from mgrpo_jax.policy import fingerprint
from mgrpo_jax.policy.load.peft import save_adapter
from mgrpo_jax.policy.load.safetensors import save_directory
from mgrpo_jax.publish import NoVersionError
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sampler.interface import PooledEngine, RolloutEngine
from mgrpo_jax.store import Store
from mgrpo_jax.tasks.pipeline import TaskQueue
from mgrpo_jax.types import PolicyVersion, TrainState
from mgrpo_jax.writer import Writer


class Resources:
  """Owns engines, learners and task streams; `open_resources` makes some.

  Attributes:
    setup: the recipe.
    store: where weights are published.
    writer: takes them there while other work goes on.
    fingerprints: of the weights and tokenizers to begin with, by policy.
    learners: by policy.
    engines: by policy.
    queues: task streams, by name of stage.
    training: what agent calls share in rollouts of the recipe's team.
    testing: what they share in evaluations of it.
    activity: what calls wait for, in both.
    newest: number of the newest of the versions that were read last, which is
      the steps that the team had behind it then.
  """

  def __init__(
      self,
      setup: Setup,
      store: Store,
      reach: Reach | None = None,
      learner: Callable[..., Learner] = Learner,
  ) -> None:
    """Puts every policy of this job on the device; opens the task streams.

    Args:
      setup: the recipe.
      store: where weights are published.
      reach: makes calls of `setup.elsewhere`; None where that is empty.
      learner: makes them; see `make_learner`.

    Raises:
      ValueError: a size, name or budget of the recipe is impossible.
    """
    self.setup = setup
    self.store = store
    self.writer = Writer(
        store,
        keep=setup.keep_versions,
        short=setup.publish_short,
        whole_every=setup.whole_every,
        tell=self._published,
    )
    loras = {name: one.lora for name, one in setup.adaptations.items()}
    if unknown := sorted(loras.keys() - setup.policies.keys()):
      raise ValueError(f"adaptations of unknown policies {unknown}")
    if unknown := sorted(setup.external.keys() - setup.policies.keys()):
      raise ValueError(f"external engines of unknown policies {unknown}")
    self.fingerprints = {
        name: fingerprint.fingerprint(setup.policies[name], loras.get(name))
        for name in setup.own
    }
    self.learners = {
        name: make_learner(setup, name, learner) for name in setup.own
    }
    self._own: dict[str, Engine] = {}
    self._pools: dict[str, PooledEngine] = {}
    self.engines = {name: self._engine(name) for name in self.learners}
    self.queues = {
        stage.name: TaskQueue(
            setup.tasks[stage.name],
            seed=setup.seed,
            max_retries=setup.max_retries,
        )
        for stage in setup.stages
    }
    actors = {n: setup.actor(n, e) for n, e in self.engines.items()}
    self.newest = 0
    self.activity = Activity()
    self._environments = environments.build(
        setup, {**actors, **setup.coded}, reach, self.activity
    )
    self.training, self.testing = self._environments[setup.team]

  def training_of(self, team: Team) -> Environment:
    """What agent calls share in rollouts of a team.

    Args:
      team: of the recipe, or as one of its stages casts it.

    Returns:
      The environment.
    """
    return self._environments[team][0]

  def testing_of(self, team: Team) -> Environment:
    """What agent calls share in evaluations of a team.

    Args:
      team: see `training_of`.

    Returns:
      The environment, in which every sub-task is tried once.
    """
    return self._environments[team][1]

  @property
  def states(self) -> dict[str, TrainState]:
    """Of every policy."""
    return {name: learner.whole for name, learner in self.learners.items()}

  def get_state(self) -> dict[str, Any]:
    """What a checkpoint keeps of task streams and first weights, as JSON."""
    return {
        "tasks": {name: one.get_state() for name, one in self.queues.items()},
        "fingerprints": self.fingerprints,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues the task streams.

    Args:
      state: what `get_state` returned, among other things.

    Raises:
      MismatchError: it is another run's.
    """
    for name, found in self.fingerprints.items():
      fingerprint.check(name, state.get("fingerprints", {}).get(name), found)
    for name, queue in self.queues.items():
      try:
        queue.set_state(state["tasks"][name])
      except atomic.MismatchError as error:
        raise atomic.MismatchError(f"stage {name!r}: {error}") from error

  def own_engines(self) -> dict[str, Engine]:
    """By policy, without those that another program samples."""
    return dict(self._own)

  def sampled(self) -> int:
    """Tokens that this process has sampled so far."""
    return sum(engine.stats()["generated"] for engine in self.engines.values())

  def counts(self) -> dict[str, int]:
    """Counts what happened in engines so far, by metric."""
    found: dict[str, int] = {}
    for name, engine in self.engines.items():
      stats = engine.stats()
      found[f"evicted/{name}"] = stats["evictions"]
      found[f"mismatched/{name}"] = stats["mismatches"]
      if name in self._pools:
        found[f"replica_tokens/{name}"] = stats["elsewhere"]
    return found

  def replicas(self) -> dict[str, int]:
    """Replicas that helped since this was last asked, by metric."""
    return {f"replicas/{n}": pool.helpers() for n, pool in self._pools.items()}

  def read_published(
      self, version: int | Literal["latest"] = "latest"
  ) -> list[str]:
    """Samples from published weights from now on.

    Args:
      version: `latest` for the newest good one of each policy, or a number:
        that version or, where a policy was not trained then, the one before.

    Returns:
      What was found corrupt on the way, a line each.

    Raises:
      CorruptError: the version asked for by number is corrupt.
      MismatchError: the run that published began with another policy.
      NoVersionError: the store does not keep such a version of any policy, or
        none as old of one of them.
      StorageError: the store cannot be read, or not be written before.
    """
    problems = self.writer.settle()
    kept = {name: publish.versions(self.store, name) for name in self.engines}
    if version != "latest" and not any(
        version in numbers for numbers in kept.values()
    ):
      raise NoVersionError(
          f"there is no version {version} in {self.store.url}, which keeps"
          f" {sorted(set().union(*kept.values()))}"
      )
    awaited = self._awaited(kept, version)
    self.newest = 0
    for name, engine in self.engines.items():
      if name in awaited:
        continue
      learner, meshes = self.learners[name], self.setup.meshes[name]
      merges = learner.lora is not None  # which its base's mesh does
      place = meshes.learner if merges else meshes.sampler
      if spread.is_spread(place):
        place = None  # others do not read now; the learner hands it to them
      like = sharding.shapes(learner.specs, place)
      number: int | Literal["latest"] = "latest"
      if version != "latest":
        number = max((n for n in kept[name] if n <= version), default=version)
      weights = publish.read(self.store, name, number, like=like)
      fingerprint.check(
          name, weights.meta.get("fingerprint"), self.fingerprints[name]
      )
      engine.update(learner.merged(weights.params), weights.version.number)
      self.newest = max(self.newest, weights.version.number)
      problems += weights.skipped
    return problems

  def _awaited(
      self,
      kept: Mapping[str, Sequence[int]],
      version: int | Literal["latest"],
  ) -> set[str]:
    """The policies that come later than a version: nobody calls them yet."""
    if self.setup.elsewhere:
      return set()  # this is such a job
    newest = max((n for numbers in kept.values() for n in numbers), default=0)
    done = newest if version == "latest" else version
    playing = self.setup.team_after(done).policies
    late = {n for n, has in kept.items() if min(has, default=done + 1) > done}
    return late - {*playing}

  def pieces(
      self, role: str, tokens: Sequence[int], *, team: Team | None = None
  ) -> list[str]:
    """The text of each token of a role's stream.

    Args:
      role: its name.
      tokens: ids.
      team: whose role it is; None for the recipe's.

    Returns:
      One text a token.

    Raises:
      ValueError: the role's policy has no tokenizer.
    """
    policies = self.setup.policies
    policy = (team or self.setup.team)[role].policy
    if policy in self.setup.coded:  # it writes as the first policy does
      policy = next(iter(policies))
    tokenizer = policies[policy].tokenizer
    if tokenizer is None:
      raise ValueError(f"policy {policy!r} has no tokenizer")
    return [tokenizer.token_text(token) for token in tokens]

  def save_policies(self, directory: pathlib.Path) -> None:
    """Writes every policy as a directory that `policy.load` reads.

    Adapters are merged, and also stand beside in `adapter/`, for PEFT.

    Args:
      directory: what has that name is replaced, whole or not at all.

    Raises:
      StorageError: it cannot be replaced.
    """
    with atomic.replacing(directory) as made:
      for name, learner in self.learners.items():
        policy = self.setup.policies[name]
        trained = dataclasses.replace(policy, params=learner.weights)
        save_directory(made / name, trained.without_critic())
        if adaptation := self.setup.adaptations.get(name):
          save_adapter(
              made / name / "adapter",
              learner.trained,
              lora=adaptation.lora,
              config=learner.config,
              base=adaptation.base,
          )

  def _engine(self, name: str) -> RolloutEngine:
    """What samples a policy: a server where there is one for it, or we."""
    setup, learner = self.setup, self.learners[name]
    if name in setup.external:
      policy = dataclasses.replace(setup.policies[name], params=learner.weights)
      return setup.external[name](policy)
    self._own[name] = engine = Engine(
        learner.config,
        learner.weights,
        0,
        mesh=setup.meshes[name].sampler,
        **setup.sampler.engine,
    )
    if setup.pooled is None:
      return engine
    self._pools[name] = pool = setup.pooled(name, engine, self.store)
    return pool

  def _published(self, version: PolicyVersion) -> None:
    """Has those who sample elsewhere take a version that is in the store."""
    if version.policy in self._pools:
      self._pools[version.policy].published(version)


def make_learner(
    setup: Setup, name: str, make: Callable[..., Learner] = Learner
) -> Learner:
  """Makes the learner of a policy, the same in every process of a job.

  Args:
    setup: the recipe.
    name: of the policy.
    make: `Learner`, or what takes its arguments.

  Returns:
    The learner.

  Raises:
    ValueError: the mesh does not divide the parameters, naming one.
  """
  policy, method = setup.policies[name], setup.method
  adaptation = setup.adaptations.get(name)
  # Equal policies get different adapters.
  seeds = np.random.SeedSequence(setup.seed).generate_state(len(setup.policies))
  return make(
      policy.config,
      policy.params,
      lora=adaptation.lora if adaptation else None,
      shape=method.shape,
      optimizer=method.optimizer,
      temperature=setup.sampler.temperature,
      reference=method.reference,
      seed=int(seeds[list(setup.policies).index(name)]),
      mesh=setup.meshes[name].learner,
  )


@contextlib.asynccontextmanager
async def open_resources(
    setup: Setup,
    store: Store,
    reach: Reach | None = None,
    learner: Callable[..., Learner] = Learner,
) -> AsyncIterator[Resources]:
  """Starts the engines that a recipe takes, and stops them.

  Args:
    setup: the recipe.
    store: where weights are published.
    reach: see `Resources`.
    learner: see `Resources`.

  Yields:
    The resources.

  Raises:
    StorageError: weights cannot be written to the store.
    ValueError: a size, name or budget of the recipe is impossible.
  """
  resources = Resources(setup, store, reach, learner)
  async with contextlib.AsyncExitStack() as stack:
    for engine in resources.engines.values():
      await stack.enter_async_context(engine)
    # Before the engines end: a pool that leaves gives their store less time.
    stack.callback(resources.writer.close)
    stack.enter_context(garbage.passed_over())
    yield resources
    resources.writer.settle()
