"""A call that crosses to another job, and its report, as JSON.

    call    {"done", "purpose", "seed", "task", "rollout", "role", "attempt",
             "earlier": {role: calls}, "request": text}
    report  {"text": text, "calls": [[role, call, parent, attempt, status,
             version_min, version_max, seconds, sampled, turns, format, correct,
             expert, overlong], …]}    the call first, then those it made

Text and numbers, never a token. Pure functions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax.keys import check_name
from mgrpo_jax.serving import reading
from mgrpo_jax.serving.errors import wrong
from mgrpo_jax.types import NO_PARENT, Account, Status, Trajectory

PURPOSES = ("training", "testing")
LONGEST_TEXT = 1 << 20  # characters of a request or report
MOST_CALLS = 4096  # of a report
_FIELDS = (
    "done",
    "purpose",
    "seed",
    "task",
    "rollout",
    "role",
    "attempt",
    "earlier",
    "request",
)
_MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """A call as it is asked of another job.

  Attributes:
    done: steps that the team has behind it; both jobs must agree.
    purpose: `training` or `testing`.
    seed: of the rollout, in [0, 2**64).
    task: id of the task.
    rollout: index within the task's group.
    role: who is called.
    attempt: which of several attempts at the sub-task.
    earlier: calls of the rollout so far, by role.
    request: text.
  """

  done: int
  purpose: str
  seed: int
  task: str
  rollout: int
  role: str
  attempt: int
  earlier: Mapping[str, int]
  request: str

  @property
  def identity(self) -> tuple[int, str, int, str, int, int]:
    """What tells the call from all others of the run."""
    ordinal = self.earlier.get(self.role, 0)
    return identity(
        self.seed, self.task, self.rollout, self.role, ordinal, self.attempt
    )


def identity(
    seed: int, task: str, rollout: int, role: str, ordinal: int, attempt: int
) -> tuple[int, str, int, str, int, int]:
  """What tells a call from all others of a run; see `Call`."""
  return seed, task, rollout, role, ordinal, attempt


def write_call(call: Call) -> dict[str, Any]:
  """A call as JSON values."""
  return dataclasses.asdict(call)


def read_call(body: bytes) -> Call:
  """Reads and checks what another job asks.

  Args:
    body: JSON.

  Returns:
    The call; ids are safe as keys, numbers in their ranges.

  Raises:
    RequestError: it is none, naming the field.
  """
  fields = reading.parse(body)
  reading.check_names(fields, read=_FIELDS, neutral={})
  values: dict[str, Any] = {
      name: reading.text(fields, name)
      for name in ("purpose", "task", "role", "request")
  }
  for name, low, high in (
      ("done", 0, _MOST),
      ("seed", 0, 2**64 - 1),
      ("rollout", 0, _MOST),
      ("attempt", 0, _MOST),
  ):
    values[name] = reading.whole(fields, name, low, high)
    if values[name] is None:
      raise wrong(name, None, f"whole numbers from {low} to {high}")
  if values["purpose"] not in PURPOSES:
    raise wrong("purpose", values["purpose"], " or ".join(PURPOSES))
  try:
    check_name(values["task"], "task")
  except ValueError as error:
    raise wrong("task", values["task"], "a segment of a key") from error
  if len(values["request"]) > LONGEST_TEXT:
    raise wrong("request", "…", f"at most {LONGEST_TEXT} characters")
  earlier = reading.mapping(fields, "earlier")
  for role in earlier:
    path = f"earlier.{role[:32]}"
    if reading.whole(earlier, path, 0, _MOST) is None:
      raise wrong(path, earlier[role], "whole numbers")
  return Call(**values, earlier=earlier)


def write_report(calls: Sequence[Trajectory]) -> dict[str, Any]:
  """What a call came to, as JSON values.

  Args:
    calls: the call and those below it, each with its account; parents are
      places among them.

  Returns:
    The report.
  """
  return {"text": calls[0].result_text, "calls": [_row(one) for one in calls]}


def read_report(value: Any, call: Call) -> tuple[Trajectory, ...]:
  """Reads what another job reports.

  Args:
    value: JSON values.
    call: that was asked for.

  Returns:
    The call and those below it, without tokens; the first has the text.

  Raises:
    ValueError: it is no report of this call.
  """
  try:
    text, rows = value["text"], value["calls"]
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
      raise ValueError(f"no text of at most {LONGEST_TEXT} characters")
    text.encode()  # half of a surrogate pair is no text
    if not 1 <= len(rows) <= MOST_CALLS:
      raise ValueError(f"{len(rows)} calls, allowed: 1 to {MOST_CALLS}")
    found = tuple(_stub(row, call.task, call.rollout) for row in rows)
  except (KeyError, TypeError, IndexError) as error:
    raise ValueError(f"not a report: {error!r}") from error
  first = dataclasses.replace(found[0], result_text=text, request=call.request)
  told = (first.role, first.call, first.attempt)
  asked = (call.role, call.identity[4], call.attempt)
  if told != asked:
    raise ValueError(f"a report of {told}, asked for {asked}")
  if first.parent != NO_PARENT:
    raise ValueError(f"the first call has the parent {first.parent}")
  for place, one in enumerate(found[1:], 1):
    if not 0 <= one.parent < place:
      raise ValueError(f"call {place} has the parent {one.parent}")
  return (first, *found[1:])


def stub(row: Mapping[str, Any], account: Account) -> Trajectory:
  """A call that another job made.

  Args:
    row: fields of the trajectory but for its tokens and text.
    account: what that job tells of it.

  Returns:
    The trajectory, without tokens, turns and text.
  """
  return Trajectory(
      **row,
      request="",
      tokens=np.zeros(0, np.int32),
      loss_mask=np.zeros(0, np.float32),
      sampler_logprobs=np.zeros(0, np.float32),
      turns=(),
      result_text="",
      account=account,
  )


def head(one: Trajectory) -> list[Any]:
  """Says which call a row is of, made with which weights.

  Args:
    one: the call.

  Returns:
    Role, call, parent, attempt, status, and versions: how every row begins.
  """
  return [
      one.role,
      one.call,
      one.parent,
      one.attempt,
      int(one.status),
      one.version_min,
      one.version_max,
  ]


def read_head(
    row: Sequence[Any], task: str, rollout: int
) -> tuple[dict[str, Any], list[Any]]:
  """Reads a row that begins as `head` says.

  Args:
    row: of a call.
    task: id of the call's task.
    rollout: index of the call's rollout within the group.

  Returns:
    Fields of a trajectory, and what is left of the row.

  Raises:
    TypeError: it is no row.
    ValueError: it is too short, or the status is none.
  """
  role, call, parent, attempt, status, oldest, newest, *rest = row
  fields = {
      "task_id": task,
      "rollout": rollout,
      "role": role,
      "call": call,
      "parent": parent,
      "attempt": attempt,
      "status": Status(status),
      "version_min": oldest,
      "version_max": newest,
  }
  return fields, rest


def _row(one: Trajectory) -> list[Any]:
  """A call as a row; the order is the module's."""
  told = one.account
  if told is None:
    raise ValueError(f"call {one.call} of {one.role!r} has no account")
  return [
      *head(one),
      round(one.seconds, 3),
      told.sampled,
      told.turns,
      int(told.format),
      told.correct,
      told.expert,
      told.overlong,
  ]


def _stub(row: Sequence[Any], task: str, rollout: int) -> Trajectory:
  """A row as a call without tokens; raises ValueError where it is none."""
  fields, rest = read_head(row, task, rollout)
  if len(rest) != 7:
    raise ValueError(f"not a row of a report: {str(row)[:80]}")
  seconds, sampled, turns, well_formed, *grades = rest
  whole = [*row[1 : -len(rest)], sampled, turns, well_formed]
  if (
      not isinstance(fields["role"], str)
      or not all(type(n) is int and -1 <= n <= _MOST for n in whole)
      or not all(g is None or _is_share(g) for g in grades)
      or not (_is_number(seconds) and 0 <= seconds <= _MOST)
      or grades[2] is None
  ):
    raise ValueError(f"not a row of a report: {str(row)[:80]}")
  correct, expert, overlong = grades
  return stub(
      fields | {"seconds": float(seconds)},
      Account(
          sampled=sampled,
          turns=turns,
          format=bool(well_formed),
          correct=correct,
          expert=expert,
          overlong=float(overlong),
      ),
  )


def _is_number(value: Any) -> bool:
  """Whether a JSON value is a number; True and False are not."""
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
  """Whether a JSON value is a number in [0, 1]."""
  return _is_number(value) and 0 <= value <= 1


def dump(value: Any) -> bytes:
  """A value as short JSON."""
  return json.dumps(
      value, ensure_ascii=False, separators=(",", ":"), allow_nan=False
  ).encode()
