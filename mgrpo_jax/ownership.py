"""Whose a bucket is: one run writes there, and no other by mistake.

    <bucket>/run.json      format, the run's id, sha256 of its config, whether
                           every policy has a job

Versions are numbered by step, so a second run in the same bucket would replace
the first one's weights by its own of the same number. The first to come
creates the record; who finds another's stops before any work. So does who
would go on in jobs with a run of one process, or the other way round: neither
has the other's checkpoints. Runs begun before the record said so are not told
apart.
"""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from mgrpo_jax import atomic, leaves
from mgrpo_jax.store import Store

FORMAT = 1
KEY = "run.json"
_PAUSE = 5.0  # seconds in which others that saw no record have written theirs


class TakenError(ValueError):
  """The bucket belongs to another run; the text says what to change."""


def claim(
    store: Store, run_id: str, config: Mapping[str, Any], *, jobs: bool
) -> None:
  """Makes a bucket this run's, or sees that it is already.

  Where the store has no compare-and-swap, of two that begin in the same moment
  the last to write is the owner: so who writes waits, then reads it again. One
  that wrote later still is told by `check` when it is next asked.

  Args:
    store: the bucket.
    run_id: of the run directory.
    config: nested dictionaries of JSON values.
    jobs: whether every policy has a job; False for a run in one process.

  Raises:
    CorruptError: the bucket's record cannot be read.
    StorageError: the bucket cannot be read or written.
    TakenError: it is another run's, or one of the other kind.
  """
  record = leaves.seal(
      {
          "format": FORMAT,
          "run": run_id,
          "config": leaves.seal(config)["digest"],
          "jobs": jobs,
      }
  )
  value = json.dumps(record).encode()
  before = store.read(KEY)
  if before.value is None:
    store.replace(before, value)  # `check` says whether we came first
    if not store.can_swap:
      time.sleep(_PAUSE)
  check(store, run_id, jobs=jobs)


def join(store: Store, config: Mapping[str, Any]) -> str:
  """Claims a bucket for a run of several jobs, or joins the run it is of.

  Args:
    store: the bucket.
    config: nested dictionaries of JSON values, the same for all jobs.

  Returns:
    The id of the run, which the run directories of all its jobs have.

  Raises:
    CorruptError: the bucket's record cannot be read.
    StorageError: the bucket cannot be read or written.
    TakenError: it is another run's, of one with another config, or of one in
      one process.
  """
  if store.get(KEY) is None:
    try:
      claim(store, uuid.uuid4().hex, config, jobs=True)
    except TakenError:  # another job came first
      pass
  run = found(store, config, jobs=True)
  if not run:
    raise atomic.StorageError(f"{store.url}/{KEY} cannot be read back")
  return run


def found(
    store: Store, config: Mapping[str, Any], *, jobs: bool | None = None
) -> str:
  """Reads which run a bucket is of, for who helps it.

  Args:
    store: the bucket.
    config: nested dictionaries of JSON values, the run's.
    jobs: whether every policy of the run must have a job; None for either.

  Returns:
    The id of the run; empty where the bucket is nobody's yet.

  Raises:
    CorruptError: the bucket's record cannot be read.
    StorageError: the bucket cannot be read.
    TakenError: it is of a run with another config, or of the other kind.
  """
  record = _read(store)
  if record is None:
    return ""
  if record["config"] != leaves.seal(config)["digest"]:
    raise TakenError(
        f"bucket {store.url} belongs to a run with another config; all jobs of"
        " a run are given the same one"
    )
  _check_kind(store, record, jobs)
  return str(record["run"])


def check(store: Store, run_id: str, *, jobs: bool | None = None) -> None:
  """Raises unless a bucket is this run's, or nobody's yet.

  Args:
    store: the bucket.
    run_id: of the run directory; empty where it has none yet.
    jobs: whether every policy of the run must have a job; None for either.

  Raises:
    CorruptError: the bucket's record cannot be read.
    StorageError: the bucket cannot be read.
    TakenError: it is another run's, or one of the other kind.
  """
  record = _read(store)
  if record is None:
    return
  if record["run"] != run_id:
    raise TakenError(
        f"bucket {store.url} belongs to another run (its id in {KEY} is"
        f" {record['run']}, here it is {run_id or 'none'}); give another"
        " config.publish.bucket, or that run's --workdir"
    )
  _check_kind(store, record, jobs)


def _check_kind(
    store: Store, record: Mapping[str, Any], jobs: bool | None
) -> None:
  """Raises where a run of one process would go on in jobs, or in reverse."""
  began = record.get("jobs")
  if None in (jobs, began) or jobs == began:
    return
  kinds = {True: "with a job for each policy", False: "in one process"}
  raise TakenError(
      f"bucket {store.url} belongs to a run {kinds[bool(began)]}, which one"
      f" {kinds[bool(jobs)]} cannot continue: give another bucket and"
      " --workdir, or go on as it began"
  )


def _read(store: Store) -> dict[str, Any] | None:
  """The bucket's record; None where it is nobody's yet."""
  value = store.get(KEY)
  if value is None:
    return None
  where = f"{store.url}/{KEY}"
  try:
    record = leaves.check_seal(json.loads(value))
    form, _ = record["format"], (record["run"], record["config"])
    if record.get("jobs") not in (None, True, False):
      raise ValueError("jobs")
  except (KeyError, ValueError, RecursionError, atomic.CorruptError) as error:
    raise atomic.CorruptError(
        f"{where} is damaged; remove it if the bucket is this run's"
    ) from error
  if form != FORMAT:
    raise TakenError(f"{where}: format {form} is not {FORMAT}")
  return record
