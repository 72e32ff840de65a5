"""The records of a run in its bucket, which the leader's word makes facts.

    steps/<step>.json                  a step's tasks, its rollouts' calls, and
                                       what they earned: it is complete
    evaluations/<split>/<steps>.json   what a look at held-out questions found
    stats/<role>/<step>.json           a role's rewards, calls and work

Numbers and names; every record carries its digest. A step is one record, not
one a rollout, for requests are what a bucket charges time for. Records are
written by compare-and-swap, so that one that was given up and arrives late does
not undo a later one; the leader keeps what it told since its oldest checkpoint
(`spool/told_….json`) and tells it again when it resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mgrpo_jax import atomic, leaves
from mgrpo_jax.decoupled import spool, wire
from mgrpo_jax.evaluate import Evaluation
from mgrpo_jax.keys import check_name
from mgrpo_jax.metrics import Accuracy
from mgrpo_jax.rewards import Scores
from mgrpo_jax.store import Store
from mgrpo_jax.types import NO_PARENT, Account, RolloutGroup, Trajectory

_TRIES = 5  # to write a record that an earlier try still changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
  """A group as the leader tells it.

  Attributes:
    task: its id.
    repetition: how often the task stands before it in the step.
    rollouts: the calls of each rollout, callers first, without tokens.
    scores: of the calls.
  """

  task: str
  repetition: int
  rollouts: tuple[tuple[Trajectory, ...], ...]
  scores: Scores


class Board:
  """Reads and writes the records."""

  def __init__(
      self,
      store: Store,
      *,
      rollouts_per_task: int,
      told: pathlib.Path,
      sure: Callable[[], None],
  ) -> None:
    """Reads nothing yet.

    Args:
      store: the bucket.
      rollouts_per_task: K.
      told: folder of this job's disk, for what it wrote.
      sure: raises where this process may write no more.
    """
    self._store = store
    self._num = rollouts_per_task
    self._told = told
    self._sure = sure

  def has_step(self, step: int) -> bool:
    """Whether a step is complete."""
    return self._store.get(_step(step)) is not None

  def announce(
      self,
      step: int,
      groups: Sequence[RolloutGroup],
      scores: Sequence[Scores],
  ) -> int:
    """Writes a step's record, which makes it complete.

    Args:
      step: its number.
      groups: of the step, K rollouts each.
      scores: of the groups.

    Returns:
      Bytes that were written.

    Raises:
      ClaimedError: another process leads now.
      StorageError: it cannot be written.
    """
    record = {
        "step": step,
        "tasks": [group.task.id for group in groups],
        "rollouts": [
            calls
            for group, graded in zip(groups, scores, strict=True)
            for calls in _rollouts(group, graded)
        ],
    }
    records = {_step(step): _sealed(record)}
    self._keep(step + 1, records)
    self._write(records)
    return len(records[_step(step)])

  def repeat(self) -> None:
    """Writes again what was kept, in its order, over whatever differs.

    Raises:
      ClaimedError: another process leads now.
      CorruptError: what was kept is damaged, naming the file.
      StorageError: something cannot be read or written.
    """
    for path in sorted(self._told.glob("*.json")):
      found = leaves.check_seal(atomic.read_json(path))
      self._write({k: text.encode() for k, text in found.items()})

  def trim(self, before: int) -> None:
    """Forgets what was told of steps before one.

    Args:
      before: number of the first step whose records are kept.
    """
    for path in self._told.glob("*.json"):
      if path.name < _told_name(before + 1):
        path.unlink(missing_ok=True)

  def _keep(self, done: int, records: Mapping[str, bytes]) -> None:
    """Keeps records on this job's disk, beside others of as many steps."""
    path = self._told / _told_name(done)
    kept = leaves.check_seal(atomic.read_json(path)) if path.exists() else {}
    kept |= {key: value.decode() for key, value in records.items()}
    atomic.write_json(path, leaves.seal(kept))

  def _write(self, records: Mapping[str, bytes]) -> None:
    """Writes records, one after another."""
    self._sure()
    for key, value in records.items():
      self._put(key, value)

  def _put(self, key: str, value: bytes) -> None:
    """Writes one record, whatever is on its way there."""
    for _ in range(_TRIES):
      if self._store.replace(self._store.read(key), value):
        return
    raise atomic.StorageError(
        f"{self._store.url}/{key} is changed while it is written: another"
        " process writes it"
    )

  def step(self, step: int) -> list[Told] | None:
    """Reads a step.

    Args:
      step: its number.

    Returns:
      Its groups; None while it is not complete.

    Raises:
      CorruptError: its record is damaged, naming it.
      MismatchError: it was written by an older version.
      StorageError: it cannot be read.
    """
    if (found := self._read(_step(step))) is None:
      return None
    if "rollouts" not in found:
      raise atomic.MismatchError(
          f"{self._store.url}/{_step(step)} is of a run that an older version"
          " began: give another bucket and run directory"
      )
    with self._damaged(_step(step)):
      if found["step"] != step:
        raise ValueError(f"it is the record of step {found['step']}")
      tasks, rollouts = list(found["tasks"]), list(found["rollouts"])
      if len(rollouts) != len(tasks) * self._num:
        raise ValueError(
            f"{len(tasks)} tasks have {len(rollouts)} rollouts, not"
            f" {self._num} each"
        )
      return [
          _told(
              check_name(task, "task"),
              tasks[:b].count(task),
              rollouts[b * self._num :][: self._num],
          )
          for b, task in enumerate(tasks)
      ]

  def write_evaluation(
      self, split: str, done: int, found: Evaluation, tokens: Mapping[str, int]
  ) -> None:
    """Writes what a look at held-out questions found.

    Args:
      split: of the questions.
      done: steps that the team had behind it.
      found: the outcome.
      tokens: that were sampled, by policy.
    """
    families = {n: dataclasses.asdict(a) for n, a in found.by_family.items()}
    record = {"families": families, "tokens": dict(tokens)}
    records = {f"evaluations/{split}/{done}.json": _sealed(record)}
    self._keep(done, records)
    self._write(records)

  def evaluation(
      self, split: str, done: int
  ) -> tuple[Evaluation, dict[str, int]] | None:
    """Reads what `write_evaluation` wrote; None where it has not yet."""
    key = f"evaluations/{split}/{done}.json"
    if (record := self._read(key)) is None:
      return None
    with self._damaged(key):
      parts = {n: Accuracy(**part) for n, part in record["families"].items()}
      overall = Accuracy(
          **{
              field.name: sum(
                  getattr(one, field.name) for one in parts.values()
              )
              for field in dataclasses.fields(Accuracy)
          }
      )
      found = Evaluation(overall=overall, by_family=parts, groups=())
      tokens = {name: int(n) for name, n in record["tokens"].items()}
    return found, tokens

  def write_stats(
      self, role: str, step: int, values: Mapping[str, float]
  ) -> None:
    """Writes a role's numbers of a step."""
    self._write({f"stats/{role}/{step}.json": _sealed(dict(values))})

  def stats(self, role: str, step: int) -> dict[str, Any] | None:
    """Reads a role's numbers of a step; None where there are none."""
    return self._read(f"stats/{role}/{step}.json")

  def _read(self, key: str) -> dict[str, Any] | None:
    """Reads a record; raises CorruptError where it is damaged."""
    value = self._store.get(key)
    if value is None:
      return None
    with self._damaged(key):
      return leaves.check_seal(json.loads(value))

  @contextlib.contextmanager
  def _damaged(self, key: str) -> Iterator[None]:
    """Says which record is none, where it cannot be read."""
    try:
      yield
    except (
        AttributeError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
        atomic.CorruptError,
    ) as error:
      raise atomic.CorruptError(
          f"{self._store.url}/{key} is damaged: {error}"
      ) from error


def _told_name(done: int) -> str:
  """Where what was told after so many steps is kept."""
  return f"told_{done:06d}.json"


def _step(step: int) -> str:
  """Where a step's record lies."""
  return f"steps/{step}.json"


def _sealed(record: Mapping[str, Any]) -> bytes:
  """A record with its digest."""
  return wire.dump(leaves.seal(record))


def _rollouts(group: RolloutGroup, scores: Scores) -> list[list[list[Any]]]:
  """The calls of each rollout of a group: a row a call, the scores last."""
  rows = spool.write_scores(scores)
  found: list[list[list[Any]]] = [[] for _ in range(group.num_rollouts)]
  for one, earned in zip(group.trajectories, rows, strict=True):
    found[one.rollout].append([*wire.head(one), *earned])
  return found


def _told(task: str, repetition: int, told: Sequence[Any]) -> Told:
  """A group from the rows of its rollouts' calls."""
  rollouts, rows = [], []
  for k, made in enumerate(told):
    calls = []
    for row in made:
      fields, earned = wire.read_head(row, task, k)
      calls.append(wire.stub(fields | {"seconds": 0.0}, _NOTHING))
      rows.append(earned)
    if not calls or calls[0].parent != NO_PARENT:
      raise ValueError(f"rollout {k} of task {task} has no root")
    rollouts.append(tuple(calls))
  return Told(
      task=task,
      repetition=repetition,
      rollouts=tuple(rollouts),
      scores=spool.read_scores(rows),
  )


_NOTHING = Account(  # the leader has graded; a follower need not know
    sampled=0, turns=0, format=False, correct=None, expert=None, overlong=0.0
)
