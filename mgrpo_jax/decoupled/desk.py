"""Answers other jobs' calls: each once, kept on disk before it is reported.

    calls/step_000012.jsonl      a line for each call that was answered

The process may be killed at any moment: a line that is not whole was never
reported. (What the machine itself loses with its power may have been.)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from mgrpo_jax import atomic, leaves, rollout
from mgrpo_jax.agents.call import call_with_retries
from mgrpo_jax.agents.context import CallContext, Environment, Ledger
from mgrpo_jax.decoupled import codec, wire
from mgrpo_jax.decoupled.wire import Call
from mgrpo_jax.plan import Method
from mgrpo_jax.rewards import appraise
from mgrpo_jax.serving.errors import RequestError, wrong
from mgrpo_jax.tasks import curriculum
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.types import NO_PARENT, Account, Status, Task, Trajectory

_CLOSED = -1
_LATER = 1  # seconds after which to ask again

Identity = tuple[int, str, int, str, int, int]


@dataclasses.dataclass(frozen=True)
class _Answer:
  """What a call came to: what was asked, what is told, what is kept."""

  request: str
  report: dict[str, Any]
  own: tuple[Trajectory, ...]


class Desk:
  """Answers calls of one step at a time."""

  def __init__(
      self,
      folder: pathlib.Path,
      *,
      environments: Callable[[int], Mapping[str, Environment]],
      tasks: Mapping[str, Task],
      stages: Sequence[Stage],
      method: Method,
  ) -> None:
    """Answers nothing yet.

    Args:
      folder: where calls are kept.
      environments: steps done -> what calls share then, by purpose.
      tasks: that may be trained on, by id.
      stages: of the run; a call is graded by that of its step.
      method: how calls are graded.
    """
    self._failure: Exception | None = None
    self._failed = asyncio.Event()
    self._folder = folder
    self._environments = environments
    self._here: Mapping[str, Environment] = {}  # of the step
    self._tasks = tasks
    self._stages = stages
    self._method = method
    self._done = _CLOSED
    self._answers: dict[Identity, _Answer] = {}
    self._own: dict[Identity, Trajectory] = {}
    self._file: BinaryIO | None = None
    self._telling = contextlib.ExitStack()

  def open(self, done: int) -> None:
    """Answers calls from now on; those kept of the step count as made.

    Args:
      done: steps that the team has behind it.

    Raises:
      StorageError: calls cannot be kept.
    """
    if done == self._done:
      return
    self.close()
    path = self._folder / f"step_{done:06d}.jsonl"
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      for other in self._folder.glob("step_*.jsonl"):
        if other != path:
          other.unlink()
      self._file = open(path, "a+b")
      self._load(self._file)
    except OSError as error:
      raise atomic.StorageError(
          f"cannot keep calls in {path}: {atomic.reason(error)}"
      ) from error
    self._here = self._environments(done)
    for environment in self._here.values():
      team = environment.team
      if team[team.root].policy not in environment.elsewhere:
        continue  # who leads rolls out, and tells of its calls there
      self._telling.enter_context(rollout.telling_late_turns(environment))
    self._done = done

  def close(self) -> None:
    """Answers nothing any more; what was kept is forgotten at the next step."""
    self._telling.close()
    if self._file is not None:
      self._file.close()
    self._file = None
    self._done = _CLOSED
    self._answers, self._own = {}, {}

  def own(self, identity: Identity) -> Trajectory | None:
    """A call that was answered here, or made below one that was."""
    return self._own.get(identity)

  async def answer(self, call: Call) -> dict[str, Any]:
    """Makes a call, or tells again what it came to.

    Args:
      call: that another job asks for.

    Returns:
      The report, as JSON values.

    Raises:
      RequestError: 425 where this job is not there yet, 409 where it is past
        that step, 400 where there is no such task or role, 503 where something
        broke that ends this job, see `failed`.
    """
    self._check(call)
    known = self._answers.get(call.identity)
    if known is None or known.request != call.request:
      try:
        known = await self._made(call)
      except RequestError:
        raise
      except Exception as error:
        self._failure = error
        self._failed.set()
        raise RequestError(503, "this job ends: a call broke it") from error
    return known.report

  async def failed(self) -> Exception:
    """Waits for what breaks a call, which ends this job.

    Returns:
      The error.
    """
    while self._failure is None:
      await self._failed.wait()
    return self._failure

  def _check(self, call: Call) -> None:
    """Raises RequestError for a call that cannot be answered now, or ever."""
    if self._done == _CLOSED or call.done > self._done:
      raise RequestError(
          425,
          f"not ready for calls after {call.done} steps",
          retry_after=_LATER,
      )
    if call.done < self._done:
      raise RequestError(
          409,
          f"done: {call.done}, but this job has done {self._done} steps: the"
          " caller's workdir is not that of this run, or older",
      )
    environment = self._here[call.purpose]
    roles = {
        role.name
        for role in environment.team.roles
        if role.policy not in environment.elsewhere
    }
    if call.role not in roles:
      raise wrong("role", call.role, f"one of {sorted(roles)}")
    if unknown := sorted(
        {*call.earlier} - {role.name for role in environment.team.roles}
    ):
      raise wrong("earlier", unknown, "roles of the team")
    if call.purpose == "training":
      if call.task not in self._tasks:
        raise wrong("task", call.task, "a task of the recipe")
      if call.done >= (total := curriculum.num_steps(self._stages)):
        raise wrong("done", call.done, f"below {total}, the steps of the run")

  async def _made(self, call: Call) -> _Answer:
    """Makes a call and keeps it, unless a machine failed on it."""
    environment, done = self._here[call.purpose], self._done
    ledger = Ledger(call.earlier)
    context = CallContext(
        environment=environment,
        task_id=call.task,
        rollout=call.rollout,
        seed=call.seed,
        ledger=ledger,
        parent=NO_PARENT,
        attempt=call.attempt,
    )
    role = environment.team[call.role]
    made = await call_with_retries(role, call.request, context)
    if done != self._done:
      raise RequestError(409, "the step is over")
    known = self._answers.get(call.identity)
    if known is not None and known.request == call.request:
      return known  # asked twice at a time: what was kept first is told
    calls = ledger.trajectories()
    told = [self._told(call, one) for one in calls]
    answer = _Answer(
        call.request,
        wire.write_report(told),
        tuple(one for one in calls if one.account is None),
    )
    if call.purpose == "training" and made.status != Status.FAILED:
      self._keep(call.identity, answer)
    return answer

  def _told(self, call: Call, one: Trajectory) -> Trajectory:
    """A call with its account."""
    if one.account is not None:
      return one
    if call.purpose == "training" and one.status != Status.FAILED:
      stage, _ = curriculum.stage_at(self._stages, call.done)
      account = appraise(
          self._tasks[call.task],
          one,
          weights=self._method.rewards_of(stage)[one.role],
          rules=self._method.rules,
      )
    else:  # an evaluation grades only the root; nothing a call that FAILED
      account = Account(
          sampled=one.sampled,
          turns=one.num_turns,
          format=False,
          correct=0.0,
          expert=0.0,
          overlong=0.0,
      )
    return dataclasses.replace(one, account=account)

  def _keep(self, identity: Identity, answer: _Answer) -> None:
    """Writes an answer down."""
    record = {
        "identity": list(identity),
        "request": answer.request,
        "report": answer.report,
        "own": [codec.encode(one) for one in answer.own],
    }
    if self._file is None:
      raise RuntimeError("the desk is closed")
    try:
      self._file.write(wire.dump(leaves.seal(record)) + b"\n")
      self._file.flush()
    except OSError as error:
      raise atomic.StorageError(
          f"cannot keep calls in {self._file.name}: {atomic.reason(error)}"
      ) from error
    self._remember(identity, answer)

  def _remember(self, identity: Identity, answer: _Answer) -> None:
    """Takes an answer in; a later one to the same call replaces it."""
    self._answers[identity] = answer
    self._own |= {_identity(identity[0], one): one for one in answer.own}

  def _load(self, file: BinaryIO) -> None:
    """Reads what an earlier process kept; cuts off a line that is not whole."""
    file.seek(0)
    whole = 0
    for line in file:
      if not line.endswith(b"\n"):
        break  # cut; another would be written behind it
      try:
        record = leaves.check_seal(json.loads(line))
        seed, task, rollout, role, ordinal, attempt = record["identity"]
        own = tuple(codec.decode(one) for one in record["own"])
      except (KeyError, ValueError, RecursionError, atomic.CorruptError):
        break  # what follows was not reported either: one writer, in order
      identity = wire.identity(seed, task, rollout, role, ordinal, attempt)
      self._remember(
          identity, _Answer(record["request"], record["report"], own)
      )
      whole += len(line)
    file.truncate(whole)
    file.seek(0, os.SEEK_END)


def _identity(seed: int, one: Trajectory) -> Identity:
  """What tells a call from all others of the run."""
  return wire.identity(
      seed, one.task_id, one.rollout, one.role, one.call, one.attempt
  )
