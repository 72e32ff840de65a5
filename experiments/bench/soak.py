r"""Trains by real jobs among random faults, and compares with a run left alone.

    python -m experiments.bench.soak --workdir=DIR --faults=200 --seed=0 \
        [--each=2] [--steps=200] [--alone=DIR]

First the recipe runs in one process (or did, in --alone) and keeps all versions
of its weights. Then each policy has its job; their bucket is an emulator of S3
(moto) behind a proxy that spoils requests (`mgrpo_jax.testing.faulty`).
Besides, at moments drawn from a seed, something happens to a job:

    kill               it is killed, and started again; every job once more when
                       it has made its last step, while it winds up
    stop               it is stopped, for longer than a heartbeat perhaps
    long stop          it is stopped for longer than `jobs.patience`
    full disk          its files may grow no more (RLIMIT_FSIZE)
    second directory   the job is started from another run directory, too
    same directory     the job is started a second time from its own
    taken over         it is stopped, started from a copy of its directory, and
                       goes on when the copy has the job: two that write
    clock              every start gets a clock that is up to five minutes off
                       (Python's `time.time`; libfaketime makes sleeps hang)

Jobs that end otherwise than with 0 are started again. A reader reads the newest
versions all the while. When enough was injected everything else is left alone
until the run is over. The command fails unless parameters are equal bit for
bit, every trajectory is there once, whatever version was read is the one of
that number of the run left alone, and every process ended as it should.
"""

import argparse
import collections
import contextlib
import pathlib
import random
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from experiments import cli
from experiments.bench import soak_checks, soak_jobs
from mgrpo_jax import atomic, store
from mgrpo_jax.decoupled import members
from mgrpo_jax.policy.load import load
from mgrpo_jax.testing import faulty, object_servers

_WEIGHTS = pathlib.Path("configs/quickstart_weights")
_LIMIT = 3600.0  # seconds in which the run ends once it is left alone
_SECONDS = 2.0  # that slow answers take


def soak(options: argparse.Namespace) -> dict[str, Any]:
  """Runs the recipe alone and among faults, and compares."""
  root = options.workdir
  like = {name: load(_WEIGHTS / name).params for name in soak_jobs.POLICIES}
  alone = options.alone or root / "alone"
  if not options.alone:
    _run_alone(options, alone)
  expected = soak_checks.versions(store.open_folder(alone / "bucket"), like)
  rng = random.Random(options.seed)
  faults = faulty.Faults(
      seed=options.seed, rate=0.0, seconds=_SECONDS, kinds=faulty.ALL_KINDS
  )
  began = time.monotonic()
  with (
      object_servers.s3() as server,
      faulty.between(server, faults) as proxy,
  ):
    place = f"s3://{object_servers.BUCKET}/run?endpoint="
    bucket = store.open(f"{place}{server}")

    def incarnation(policy: str) -> str:
      member = members.read(bucket, policy)
      return member.incarnation if member else ""

    jobs = soak_jobs.Jobs(options, f"{place}{proxy}", rng, incarnation)
    reader = soak_checks.Reader(f"{place}{proxy}", like)
    with contextlib.closing(jobs), reader.reading():
      jobs.look()
      faults.rate = options.rate
      enough = _disturb(jobs, faults, rng, options)
      faults.rate = 0.0
      _finish(jobs, root)
    problems = jobs.problems + reader.wrong(expected)
    problems += soak_checks.unread(bucket, like, expected, steps=options.steps)
  folders = {job.policy: job.folder for job in jobs.all}
  problems += soak_checks.wrong(alone, folders, steps=options.steps)
  if not enough:
    problems.append("the run was over before enough faults: give more --steps")
  return {
      "seconds": round(time.monotonic() - began, 1),
      "requests": faults.requests,
      "injected": dict(faults.injected) | dict(+jobs.counts),
      "ends": dict(jobs.ends),
      "reads": dict(reader.counts) | {"versions": len(reader.seen)},
      "problems": problems,
  }


def _run_alone(options: argparse.Namespace, folder: pathlib.Path) -> None:
  """Runs the recipe in one process, which keeps all versions."""
  keep = (f"--config.publish.keep={options.steps + 1}",)
  log = folder.with_name("alone.log")
  if soak_jobs.train(options, folder, keep, {}, log).wait():
    raise RuntimeError(f"the run alone failed, see {log}")


def _disturb(
    jobs: soak_jobs.Jobs,
    faults: faulty.Faults,
    rng: random.Random,
    options: argparse.Namespace,
) -> bool:
  """Injects faults until there were enough of them; False: the run was over."""
  due = time.monotonic() + rng.expovariate(1 / options.pause)
  while not jobs.over:
    done = faults.injected + jobs.counts
    kinds: Mapping[str, int] = soak_jobs.KINDS
    if done.total() >= options.faults:
      faults.kinds = _rare(faulty.ALL_KINDS, done, options.each)
      kinds = {k: 1 for k in _rare(soak_jobs.KINDS, done, options.each)}
      if not faults.kinds and not kinds:
        return True
    jobs.look()
    if time.monotonic() > due and not jobs.over:
      if kinds:
        jobs.trouble(kinds)
      due = time.monotonic() + rng.expovariate(1 / options.pause)
    time.sleep(0.1)
  return False


def _rare(
    kinds: Iterable[str], done: collections.Counter[str], each: int
) -> tuple[str, ...]:
  """The kinds of which there were fewer than asked for."""
  return tuple(kind for kind in kinds if done[kind] < each)


def _finish(jobs: soak_jobs.Jobs, root: pathlib.Path) -> None:
  """Waits until jobs and what was done to them come to their end."""
  end = time.monotonic() + _LIMIT
  while not jobs.over or jobs.pending:
    jobs.look()
    time.sleep(0.2)
    if time.monotonic() > end:
      raise RuntimeError(f"the jobs do not come to their end, see {root}")


def main() -> None:
  """Prints the tables and writes them."""
  options = _options()
  if options.workdir.exists():
    cli.fail(f"--workdir={options.workdir}: exists")
  options.workdir.mkdir(parents=True)
  found = soak(options)
  total = sum(found["injected"].values())
  cli.say(
      f"{total} faults, {found['requests']} requests, {found['seconds']} s,"
      f" seed {options.seed}"
  )
  for title in ("injected", "ends", "reads"):
    cli.say(f"\n| {title} | times |\n|---|---|")
    for what, times in sorted(found[title].items()):
      cli.say(f"| {what} | {times} |")
  if options.out:
    atomic.write_json(options.out, found)
  for problem in found["problems"]:
    cli.say(f"WRONG: {problem}")
  if found["problems"]:
    sys.exit(1)
  cli.say(
      "\nparameters equal bit for bit, every trajectory once, no version torn"
  )


def _path(text: str) -> pathlib.Path:
  """An absolute path."""
  return pathlib.Path(text).absolute()


def _options() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=_path, required=True, help="new")
  parser.add_argument("--faults", type=int, default=200, help="at least")
  parser.add_argument("--each", type=int, default=2, help="of a kind, at least")
  parser.add_argument("--seed", type=int, default=0, help="of all draws")
  parser.add_argument(
      "--steps", type=int, default=200, help="of training, half in each stage"
  )
  parser.add_argument(
      "--rate", type=float, default=0.003, help="of requests that are spoilt"
  )
  parser.add_argument(
      "--pause", type=float, default=12.0, help="seconds between job faults"
  )
  parser.add_argument(
      "--patience",
      type=float,
      default=60.0,
      help="jobs.patience: more seconds than a job takes to start",
  )
  parser.add_argument(
      "--alone", type=_path, help="run directory of the recipe left alone"
  )
  parser.add_argument("--out", type=_path, help="JSON file for the counts")
  return parser.parse_args()


if __name__ == "__main__":
  main()
