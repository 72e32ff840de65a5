r"""Trains a team, or continues where its run directory stands.

    python -m experiments.train --config=configs/quickstart.py \
        --workdir=runs/quickstart [--config.key=value]

Any key of configs/default.py can be set.

With --policy=NAME this process is the job of one policy; the jobs of the others
are started with the same config and bucket and a --workdir of their own, here
or elsewhere. --launch=local starts them all on this machine. Between machines
all need the same token, by --token_file or MGRPO_JOBS_TOKEN.

Exit codes: 0 it has ended; 2 it would end so again (one line says why), or is
no job; 75 it is a job and ended because of what may pass; 130 Ctrl-C; 143
SIGTERM. After the last three, or a kill, the same command goes on.

A job may have several processes, one a host of its slice: the same command on
each, with --processes=0 on TPUs, else with --coordinator, --processes and
--process. With --launch=local, --hosts=2 gives every job two.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import pathlib
import sys
import time
import typing
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import cli
from mgrpo_jax.hosts import signals

with cli.user_errors(ModuleNotFoundError):
  from ml_collections import config_flags

if typing.TYPE_CHECKING:
  import ml_collections

  from experiments.joining import Opened, Place
  from mgrpo_jax.hosts.channel import Channel
  from mgrpo_jax.journal import Journal
  from mgrpo_jax.plan import Setup
  from mgrpo_jax.store import Store

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "recipe, such as configs/quickstart.py"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "directory of the run; made, or resumed"
)
_POLICY = flags.DEFINE_string(
    "policy", "", "Trains this one alone, as researcher; empty: all, in here."
)
_BUCKET = flags.DEFINE_string(
    "bucket",
    "",
    "URL that all jobs share: file:///shared/run; for config.publish.bucket.",
)
_LAUNCH = flags.DEFINE_enum(
    "launch",
    "",
    ["", "local", "ray"],
    "local: a job for each policy, all here; ray: on a Ray cluster",
)
_HOSTS = flags.DEFINE_integer(
    "hosts", 1, "processes of each job, with --launch"
)
_RAY_ADDRESS = flags.DEFINE_string(
    "ray_address", "auto", "of the Ray cluster; local: starts one here"
)
_RAY_TPU = flags.DEFINE_string(
    "ray_tpu", "", "slice of each policy, such as v6e:4x4; empty: CPUs"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT where the processes of this job meet, on the host of process 0",
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 1, "of this job; 0: the machines know, as TPU slices do"
)
_PROCESS = flags.DEFINE_integer(
    "process", 0, "number of this one in its job; 0 decides"
)
_SILENCE = flags.DEFINE_integer(
    "silence",
    100,
    "seconds without a sign of life after which the processes of a job end,"
    " where one of them is lost",
)
_LISTEN = flags.DEFINE_string(
    "listen",
    "127.0.0.1",
    "where the job is called; any but 127.0.0.1, ::1 and localhost needs a"
    " token, see --token_file",
)
_PORT = flags.DEFINE_integer("port", 0, "where it is called; 0 for any")
_REACHED_AS = flags.DEFINE_string(
    "reached_as", "", "host by which other jobs reach it; empty for --listen"
)
_TOKEN_FILE = flags.DEFINE_string(
    "token_file",
    "",
    "File with the token of all jobs, 16 characters up; else MGRPO_JOBS_TOKEN.",
)


def main() -> None:
  """Trains; see the module."""
  started = time.monotonic()
  with contextlib.ExitStack() as stack:
    with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
      with signals.held():  # extensions abort where one cuts off their import
        _check_flags()
        cli.config_of(_CONFIG)  # before others wait: each may find it wrong
        from mgrpo_jax.hosts import ending, group
    with signals.held() as told:  # until there is who can be told of them
      with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
        group.join(  # first: much of what is imported later uses devices
            coordinator=_COORDINATOR.value,
            processes=_PROCESSES.value,
            process=_PROCESS.value,
            silence=_SILENCE.value,
        )
        channel = group.open_channel()
      if not group.decides():
        _assist(told)
        return
      stack.enter_context(ending.driving(channel, cli.interruption))
    if _LAUNCH.value == "ray" or (_LAUNCH.value and _HOSTS.value > 1):
      _launch()
    else:
      _run(started, channel)


def _run(started: float, channel: Channel | None) -> None:
  """Trains all, or one policy's job."""
  with contextlib.ExitStack() as stack:
    with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
      with signals.held():  # as above
        from experiments import fleet, joining, recipe
        from mgrpo_jax import journal, metrics, ownership, workdir
        from mgrpo_jax.decoupled.errors import ServerError
        from mgrpo_jax.tasks import curriculum

      cli.need("matplotlib")  # which only the report imports, at the very end
      compiled = stack.enter_context(metrics.count_compilations())
      config = _checked()
      if channel is not None:
        channel.patience = config.jobs.patience
      values = recipe.plain(config)
      workdir.check(_WORKDIR.value, values)
      directory = workdir.Workdir(pathlib.Path(_WORKDIR.value))
      store = recipe.open_store(config, directory)
      with cli.user_errors(ServerError, code=cli.BROKEN):
        place = stack.enter_context(_placed(config))
      with (
          cli.user_errors(*_failures()),
          _passing(),  # the bucket may be back in a while
      ):
        naming = joining.naming(store, directory, values, place)
      setup = joining.restrict(recipe.build(config, only=place.policy), place)
      token = place.token or joining.token(_TOKEN_FILE.value, new=False)
      setup = joining.pooled(setup, config, token)
    with (
        fleet.failures(),
        cli.user_errors(*_failures()),  # closing may fail as well
        _passing(),
        workdir.hold(directory.path, values, name=naming),
    ):
      jobs = place.where is not None
      ownership.claim(store, directory.read_id(), values, jobs=jobs)
      with (
          journal.Journal(
              directory,
              total_steps=curriculum.num_steps(setup.stages),
              limits=setup.budget.limits(),
              keep_checkpoints=setup.keep_checkpoints,
              stream=sys.stderr,
              started=started,
              compiled=compiled,
          ) as kept,
          _others(setup, config, place, kept),
      ):
        opened = joining.opened(place, config, kept, channel)
        _train(setup, store, kept, values, opened)


def _launch() -> None:
  """Runs every process of every job here."""
  with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
    from experiments import (
        fleet,
        joining,
        launch,
        placing,
        ray_fleet,
        recipe,
    )

    if _LAUNCH.value == "ray" and importlib.util.find_spec("ray") is None:
      raise ValueError("the package 'ray' is missing: pip install -e '.[ray]'")
    config, hosts = _config(), _HOSTS.value
    joining.check(config)
    team = recipe.build_team(config)
    root = team[team.root].policy
    plans = fleet.plans(
        config,
        [root, *sorted({*placing.weighted(config, team)} - {root})],
        hosts=hosts,
        workdir=pathlib.Path(_WORKDIR.value).absolute(),
        arguments=launch.recipe_arguments(sys.argv[1:]),
    )
    token = joining.token(_TOKEN_FILE.value, new=True)
    tpu = ray_fleet.parse_slice(_RAY_TPU.value)
  with cli.user_errors(OSError, code=cli.BROKEN), fleet.failures():
    if _LAUNCH.value == "local":
      fleet.run(plans, hosts=hosts, token=token)
      return
    ray_fleet.run(
        plans, hosts=hosts, token=token, address=_RAY_ADDRESS.value, tpu=tpu
    )
    cli.say(f"all jobs have ended; see {_WORKDIR.value}")


def _assist(told: list[int]) -> None:
  """Does this process's part of a job that another one decides for."""
  with cli.user_errors(ValueError, OSError, ModuleNotFoundError):
    from experiments import hosting, recipe
    from mgrpo_jax import store
    from mgrpo_jax.decoupled.run import restricted

    config, policy = _checked(), _POLICY.value
    bucket, patience = store.open(config.publish.bucket), config.jobs.patience
    setup = restricted(recipe.build(config, only=policy), policy)
  hosting.assist(setup, policy, bucket, patience=patience, told=told)


def _check_flags() -> None:
  """Raises ValueError where flags do not go together."""
  if _LAUNCH.value and _POLICY.value:
    raise ValueError("--launch and --policy: allowed: one of them")
  if _PROCESSES.value != 1 and not _POLICY.value:
    raise ValueError("--processes: is for the job of one --policy")
  if _HOSTS.value != 1 and not _LAUNCH.value:
    raise ValueError("--hosts: goes with --launch")
  if _HOSTS.value < 1 or _PROCESSES.value < 0:
    raise ValueError("--hosts: allowed: 1 up; --processes: 0 up")


def _checked() -> ml_collections.ConfigDict:
  """The recipe; it fits this job's devices."""
  from experiments import hosting, recipe

  config = _config()
  recipe.check(config, only=_POLICY.value)
  hosting.check(config, _POLICY.value)
  return config


def _failures() -> tuple[type[Exception], ...]:
  """What ends a run in one line: the world's doing, or the recipe's."""
  from mgrpo_jax import atomic, journal, ownership, publish
  from mgrpo_jax.agents.watchdog import StuckError
  from mgrpo_jax.decoupled.errors import ClaimedError
  from mgrpo_jax.hosts.channel import SilentError
  from mgrpo_jax.sampler.interface import EngineError

  return (
      OSError,
      ClaimedError,
      atomic.MismatchError,
      journal.NonFiniteError,
      ownership.TakenError,
      publish.NoVersionError,
      EngineError,
      SilentError,
      StuckError,
  )


def _passing() -> contextlib.AbstractContextManager[None]:
  """Ends a job in one line where starting it again may help."""
  if not (_POLICY.value or _LAUNCH.value):
    return contextlib.nullcontext()
  from experiments.fleet import CutOffError
  from mgrpo_jax.agents.watchdog import StuckError
  from mgrpo_jax.decoupled import errors
  from mgrpo_jax.hosts.channel import SilentError
  from mgrpo_jax.sampler.interface import EngineError

  return cli.user_errors(
      OSError,
      CutOffError,
      errors.AbsentError,
      errors.ServerError,
      errors.StuckJobsError,
      SilentError,
      EngineError,
      StuckError,
      code=cli.BROKEN,
  )


def _config() -> ml_collections.ConfigDict:
  """The recipe, with the bucket that the jobs share."""
  from experiments import recipe

  config, url = cli.config_of(_CONFIG), _BUCKET.value
  if _LAUNCH.value and not url and not config.publish.bucket:
    folder = pathlib.Path(_WORKDIR.value).absolute() / "bucket"
    url = folder.as_uri()
  recipe.name_bucket(config, url)
  if _POLICY.value and not config.publish.bucket:
    raise ValueError("--policy: needs --bucket, which all jobs share")
  return config


def _placed(
    config: ml_collections.ConfigDict,
) -> contextlib.AbstractContextManager[Place]:
  """Where this job is called; nowhere in a run in one process."""
  from experiments import joining, recipe

  policy = _POLICY.value
  if policy or _LAUNCH.value:
    joining.check(config)
  if _LAUNCH.value:  # this is the job that leads
    team = recipe.build_team(config)
    policy = team[team.root].policy
  token = joining.token(_TOKEN_FILE.value, new=bool(_LAUNCH.value))
  if policy:
    cli.check_exposure(_LISTEN.value, token, cli.TOKEN_ADVICE)
  return joining.placed(
      policy,
      host=_LISTEN.value,
      port=_PORT.value,
      reached_as=_REACHED_AS.value,
      token=token,
  )


def _others(
    setup: Setup,
    config: ml_collections.ConfigDict,
    place: Place,
    journal: Journal,
) -> contextlib.AbstractContextManager[None]:
  """Runs the other jobs, if this process is to."""
  from experiments import fleet, launch

  if not _LAUNCH.value:
    return contextlib.nullcontext()
  plans = fleet.plans(
      config,
      [place.policy, *sorted(setup.elsewhere)],
      hosts=1,
      workdir=journal.workdir.path,
      arguments=launch.recipe_arguments(sys.argv[1:]),
  )
  return launch.others(plans[1:], token=place.token, tell=journal.progress.note)


def _train(
    setup: Setup,
    store: Store,
    journal: Journal,
    values: Mapping[str, Any],
    opened: Opened,
) -> None:
  """Runs the loop, writes the report and says what came out."""
  from mgrpo_jax import loop
  from mgrpo_jax.report import page
  from mgrpo_jax.report.progress import comparison

  outcome, table = asyncio.run(loop.train(setup, store, journal, opened=opened))
  journal.progress.close()
  summary = journal.summarise({"config": values} | outcome)
  report = page.write(journal.workdir.path)
  if table:
    cli.say(comparison(table))
  cli.say(
      f"{summary['steps']} steps in {summary['seconds']:.0f} s,"
      f" {summary['compilations']} compilations,"
      f" {summary['peak_rss_bytes'] / 2**30:.1f} GiB of memory"
  )
  cli.say(f"report: {report.page}")
  for name in sorted(setup.elsewhere) if _LAUNCH.value else ():
    cli.say(f"policy {name}: {report.page.parents[1]}/jobs/{name}")


if __name__ == "__main__":
  cli.run(main, required=("config", "workdir"), resumes=True)
