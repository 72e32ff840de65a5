"""From flags to one job of a run in which every policy has its own."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from experiments import cli
from mgrpo_jax import atomic, ownership
from mgrpo_jax.decoupled import claim, members
from mgrpo_jax.decoupled.errors import ServerError
from mgrpo_jax.hosts.channel import Channel
from mgrpo_jax.journal import Journal
from mgrpo_jax.plan import Setup
from mgrpo_jax.run import Run, open_run
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.store import Store
from mgrpo_jax.workdir import Workdir

Opened = Callable[[Setup, Store], contextlib.AbstractAsyncContextManager[Run]]
TOKEN = "MGRPO_JOBS_TOKEN"  # of the environment
_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?!.{{254}}){_LABEL}(\.{_LABEL})*\.?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """Where a job listens, and how others get there.

  Attributes:
    policy: of the job; empty for a run in one process.
    where: socket, listening; None for a run in one process.
    address: http://host:port, as other jobs reach it.
    token: that jobs show each other; empty for none.
  """

  policy: str
  where: socket.socket | None
  address: str
  token: str = dataclasses.field(repr=False)


def token(file: str, *, new: bool) -> str:
  """What jobs show each other.

  Args:
    file: that holds it; empty for the environment's MGRPO_JOBS_TOKEN.
    new: whether this process starts the other jobs and may make one up where
      there is none.

  Returns:
    The token; empty where there is none.

  Raises:
    ValueError: the file cannot be read or is empty.
  """
  if file:
    return cli.secret(file, "--token_file")
  given = os.environ.get(TOKEN, "")
  return secrets.token_hex(16) if new and not given else given


def need_packages(*packages: str) -> None:
  """Raises ValueError where a package of the extra is not installed."""
  for package in packages:
    if importlib.util.find_spec(package) is None:
      raise ValueError(
          f"the package {package!r} is missing: pip install -e '.[decoupled]'"
      )


@contextlib.contextmanager
def placed(
    policy: str, *, host: str, port: int, reached_as: str, token: str
) -> Iterator[Place]:
  """Takes a job's port.

  Args:
    policy: of the job; empty for a run in one process, which takes none.
    host: name or address to listen at.
    port: 0 for any.
    reached_as: host under which others reach it; empty for the same.
    token: that jobs show each other; empty for none.

  Yields:
    The place.

  Raises:
    ModuleNotFoundError: a package of the extra is not installed.
    OSError: the port cannot be had.
    ServerError: somebody else has it yet.
    ValueError: others can reach the port and there is no token, or what they
      are to reach is no host.
  """
  if not policy:
    yield Place(policy="", where=None, address="", token="")
    return
  need_packages("httpx2", "starlette", "uvicorn")
  from mgrpo_jax.serving import limits, listen

  limits.check_exposure(host, token)
  name = _host(reached_as) if reached_as else host
  if _is_anywhere(name):
    raise ValueError(
        f"--listen={host}: is every address of this machine; --reached_as must"
        " name the one that other jobs use"
    )
  try:
    bound = listen.bind(host, port)
  except OSError as error:
    if error.errno != errno.EADDRINUSE:
      raise
    # The one that had it before may be about to end.
    raise ServerError(f"--port={port}: {atomic.reason(error)}") from error
  with bound as where:
    name = name if reached_as else _host(name, flag="listen")
    shown = f"[{name}]" if ":" in name else name
    yield Place(
        policy=policy,
        where=where,
        address=f"http://{shown}:{where.getsockname()[1]}",
        token=token,
    )


def check(config: ml_collections.ConfigDict) -> None:
  """Checks that a recipe asks for nothing that jobs cannot do yet.

  Args:
    config: the whole recipe, checked.

  Raises:
    ValueError: it does; names the key and what is allowed.
  """
  for key, value in {
      "budget.trained_tokens": config.budget.trained_tokens,
      "budget.generated_tokens": config.budget.generated_tokens,
      "rollout.spare": config.rollout.spare,
      "tasks.resample": config.tasks.resample,
      "symbolic": len(config.symbolic),
  }.items():
    if value:
      raise ValueError(
          f"config.{key}: {value}, allowed: 0 where every policy has a job"
      )
  root = config.team.root
  leads = config.team.roles[root].policy
  for name in config.curriculum:
    policy = config.stages[name].cast.get(root, leads)
    if policy != leads:
      raise ValueError(
          f"config.stages.{name}.cast.{root}: {policy!r}, allowed: {leads!r}"
          " where every policy has a job: the root's job leads the run from its"
          " first step to its last"
      )


def naming(
    store: Store, directory: Workdir, values: Mapping[str, Any], place: Place
) -> Callable[[], str] | None:
  """Sees that a bucket is this run's, or may become it.

  Args:
    store: the bucket.
    directory: of the run, or of this job.
    values: of the config.
    place: of this job.

  Returns:
    What names the run of a new directory: all its jobs have one name, that
    of the bucket. None for a run in one process.

  Raises:
    ClaimedError: the directory is new, and another one has trained a policy
      that it would train.
    StorageError: the bucket or the directory cannot be read.
    TakenError: the bucket is another run's, or one of the other kind.
  """
  run_id, jobs = directory.read_id(), place.where is not None
  if run_id or not jobs:
    ownership.check(store, run_id, jobs=jobs)
  else:
    ownership.found(store, values, jobs=jobs)
  if directory.is_new:
    for policy in [place.policy] if jobs else sorted(values["policies"]):
      key = members.key(policy)
      claim.check_new(store, policy=policy, key=key, path=directory.path)
  return functools.partial(ownership.join, store, values) if jobs else None


def restrict(setup: Setup, place: Place) -> Setup:
  """The part of a recipe that this process carries out.

  Args:
    setup: of the whole team.
    place: of this job.

  Returns:
    The setup.

  Raises:
    ValueError: there is no such policy, or the recipe has what jobs cannot do.
  """
  if place.where is None:
    return setup
  from mgrpo_jax.decoupled.run import restricted

  return restricted(setup, place.policy)


def pooled(
    setup: Setup, config: ml_collections.ConfigDict, token: str
) -> Setup:
  """Lets samplers of other processes help, where the recipe says so.

  Args:
    setup: of this process.
    config: the whole recipe.
    token: that they want to see; empty for none.

  Returns:
    The setup.

  Raises:
    ValueError: there is no bucket that replicas could be found in, a server
      samples a policy, the token cannot be sent, or a package of the extra is
      not installed.
  """
  if not config.rollout.replicas:
    return setup
  if not config.publish.bucket:
    raise ValueError(
        "config.rollout.replicas: True needs --bucket, where replicas are found"
    )
  if named := sorted(set(setup.external) & set(setup.own)):
    raise ValueError(
        "config.rollout.replicas: True, allowed: False where servers sample"
        f" policies, as {', '.join(named)}"
    )
  need_packages("httpx2")
  from mgrpo_jax.replicas.pool import Pool
  from mgrpo_jax.sampler.connection import Address

  address = Address(
      url="http://127.0.0.1:1",  # in its place each replica's own
      token=token,
      max_concurrent=1,
      timeout=config.rollout.turn_deadline / 2,  # time to ask somebody else
      attempts=1,  # likewise
  )

  def pool(name: str, engine: Engine, store: Store) -> Pool:
    return Pool(
        engine,
        store,
        name,
        slots=config.engine.num_slots,
        context=config.engine.context,
        vocab_size=setup.policies[name].config.vocab_size,
        address=address,
        every=config.jobs.heartbeat,
    )

  return dataclasses.replace(setup, pooled=pool)


def opened(
    place: Place,
    config: ml_collections.ConfigDict,
    journal: Journal,
    channel: Channel | None,
) -> Opened:
  """What opens this process's part of a run for `loop.train`.

  Args:
    place: of this job.
    config: the whole recipe.
    journal: of this job's run directory.
    channel: to the job's other processes; None where there are none.

  Returns:
    `run.open_run`, or its counterpart of a job.
  """
  if place.where is None:
    return open_run
  from mgrpo_jax.decoupled.part import Job
  from mgrpo_jax.decoupled.run import open_job

  job = Job(
      policy=place.policy,
      workdir=journal.workdir,
      where=place.where,
      address=place.address,
      token=place.token,
      patience=config.jobs.patience,
      heartbeat=config.jobs.heartbeat,
      tell=journal.progress.note,
      channel=channel,
  )
  return functools.partial(open_job, job=job)


def _host(text: str, *, flag: str = "reached_as") -> str:
  """Reads a host name or an IP address, an IPv6 one in brackets or not."""
  bare = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
  try:
    address = ipaddress.ip_address(bare)
  except ValueError:
    # A name that ends in a number would be taken for a broken IPv4 address.
    last = text.rstrip(".").rpartition(".")[2]
    if _HOST.fullmatch(text) and not last.isdecimal():
      return text
  else:
    if "%" not in bare and (address.version == 6 or bare == text):
      return bare
  raise ValueError(
      f"--{flag}={text!r}: allowed: a host name or an IP address, without"
      " scheme, port, path or zone"
  )


def _is_anywhere(host: str) -> bool:
  """Whether a host stands for every address of this machine."""
  try:
    return ipaddress.ip_address(host).is_unspecified
  except ValueError:
    return False
