"""Opens a job's part of a run: what `loop.train` is given in place of all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from mgrpo_jax.decoupled import claim, server
from mgrpo_jax.decoupled.ending import Ending
from mgrpo_jax.decoupled.follower import Follower
from mgrpo_jax.decoupled.leader import Leader
from mgrpo_jax.decoupled.members import Heart
from mgrpo_jax.decoupled.part import Job, Part
from mgrpo_jax.decoupled.peer import Peer
from mgrpo_jax.decoupled.remote import Remote, Traffic
from mgrpo_jax.environments import Reach
from mgrpo_jax.hosts.driver import Driver
from mgrpo_jax.learner import Learner
from mgrpo_jax.plan import Setup
from mgrpo_jax.policy.params import Params
from mgrpo_jax.resources import open_resources
from mgrpo_jax.run import Run
from mgrpo_jax.store import Store

_LAST = 30.0  # seconds for what still reads or writes when the job leaves


@contextlib.asynccontextmanager
async def open_job(
    setup: Setup, store: Store, *, job: Job
) -> AsyncIterator[Run]:
  """Starts a job's part of a run, and stops it.

  Args:
    setup: the recipe, restricted to the job's policy by `restricted`.
    store: the bucket that all jobs share.
    job: who this is.

  Yields:
    The run, to be handed to `loop.train`.

  Raises:
    ClaimedError: another run directory has the policy's job, now or later.
    ServerError: other jobs cannot call this one any more.
    StorageError: the bucket cannot be read or written.
  """
  traffic = Traffic()
  part: list[Part] = []
  learner: Callable[..., Learner] = Learner
  if job.channel is not None:
    learner = functools.partial(Driver, channel=job.channel)
  async with contextlib.AsyncExitStack() as stack:
    stack.callback(store.hurry, _LAST)  # threads that still read go, too
    heart, ending = await stack.enter_async_context(alive(store, job))
    peer = functools.partial(
        Peer,
        store,
        token=job.token,
        patience=job.patience,
        timeout=setup.sampler.deadline,
        max_concurrent=2 * setup.sampler.max_concurrent,
        tell=job.tell,
        heart=heart,
    )
    peers = {
        policy: await stack.enter_async_context(peer(policy))
        for policy in sorted(setup.elsewhere)
    }

    def reach(purpose: str) -> dict[str, Remote]:
      return {
          policy: Remote(
              peer, purpose, done=lambda: part[0].opened, traffic=traffic
          )
          for policy, peer in peers.items()
      }

    resources = await stack.enter_async_context(
        open_resources(
            setup,
            store,
            Reach(training=reach("training"), testing=reach("testing")),
            learner,
        )
    )
    resources.writer.guard(heart.sure)
    leads = setup.team[setup.team.root].policy == job.policy
    run = (Leader if leads else Follower)(
        resources, job=job, peers=peers, heart=heart, traffic=traffic
    )
    part.append(run)
    answers = server.serving(
        run.desk, job.policy, job.where, job.token, broken=ending.tell
    )
    await stack.enter_async_context(answers)
    yield run


@contextlib.asynccontextmanager
async def alive(store: Store, job: Job) -> AsyncIterator[tuple[Heart, Ending]]:
  """Keeps a job's record alive; ends the body where something beside it fails.

  Args:
    store: the bucket.
    job: who this is.

  Yields:
    The heart, and what ends the body.

  Raises:
    ClaimedError: another run directory has the job, or another process took
      it: also in place of what was told to have failed.
    StorageError: the bucket cannot be read or written.
  """
  ending = Ending()
  heart = Heart(
      store,
      policy=job.policy,
      address=job.address,
      home=claim.home_of(job.workdir.path),
      every=job.heartbeat,
      patience=job.patience,
      tell=job.tell,
      lost=ending.tell,
  )
  with heart:  # outside: it must see the error, not a cancellation
    async with ending:
      yield heart, ending


def restricted(setup: Setup, policy: str) -> Setup:
  """The part of a recipe that one job carries out.

  Args:
    setup: of the whole team.
    policy: of the job.

  Returns:
    The recipe, other policies without their weights.

  Raises:
    ValueError: there is no such policy, or the recipe has what jobs cannot do.
  """
  if policy not in setup.policies:
    raise ValueError(
        f"policy: {policy!r}, allowed: {', '.join(setup.policies)}"
    )
  if len({team[team.root].policy for team in setup.teams}) > 1:
    raise ValueError("jobs of one policy each do with one policy of the root's")
  refused = {
      "resample": setup.resample,
      "spares": setup.sampler.spares.count,
      "budget": bool(setup.budget.limits()),
      "coded": bool(setup.coded),
  }
  if found := [name for name, value in refused.items() if value]:
    raise ValueError(f"jobs of one policy each do without {', '.join(found)}")

  def only(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {n: one for n, one in mapping.items() if n == policy}

  return dataclasses.replace(
      setup,
      policies={
          name: one
          if name == policy
          else dataclasses.replace(one, params=typing.cast(Params, None))
          for name, one in setup.policies.items()
      },
      adaptations=only(setup.adaptations),
      external=only(setup.external),
      elsewhere=frozenset(setup.policies) - {policy},
  )
