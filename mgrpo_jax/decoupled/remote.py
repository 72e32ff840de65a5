"""A child call in another job: the same call, over HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mgrpo_jax.agents.context import CallContext
from mgrpo_jax.agents.team import Role
from mgrpo_jax.decoupled import wire
from mgrpo_jax.decoupled.peer import Peer
from mgrpo_jax.decoupled.wire import Call
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.types import NO_PARENT, Status, Trajectory


@dataclasses.dataclass
class Traffic:
  """Counts what calls in other jobs came to.

  Attributes:
    calls: that were reported.
    text_bytes: of their requests and reports.
  """

  calls: int = 0
  text_bytes: int = 0


class Remote:
  """Makes calls of one policy in the job that has it."""

  def __init__(
      self,
      peer: Peer,
      purpose: str,
      *,
      done: Callable[[], int],
      traffic: Traffic,
  ) -> None:
    """Calls nobody yet.

    Args:
      peer: the other job.
      purpose: `training` or `testing`.
      done: steps that the team has behind it.
      traffic: kept up to date in place.
    """
    self._peer = peer
    self._purpose = purpose
    self._done = done
    self._traffic = traffic

  async def __call__(
      self, role: Role, request: str, context: CallContext
  ) -> Trajectory:
    """Makes a call and records it and those below in the rollout's ledger.

    Args:
      role: who is called.
      request: what is asked.
      context: where in the rollout this happens.

    Returns:
      The call, without its tokens, with what its job tells of it.

    Raises:
      AbsentError: the other job gives no sign of life.
      EngineError: it refuses, or reports nonsense.
    """
    environment, ledger = context.environment, context.ledger
    call = Call(
        done=self._done(),
        purpose=self._purpose,
        seed=context.seed,
        task=context.task_id,
        rollout=context.rollout,
        role=role.name,
        attempt=context.attempt,
        earlier={n: c for n, c in ledger.counts().items() if c},
        request=request,
    )
    target = f"the job of policy {role.policy!r}"
    path = (*context.callers, f"{role.name} {call.identity[4]}")
    with environment.activity.waiting(call.task, call.rollout, path, target):
      answer = await self._peer.post(
          "calls", wire.write_call(call), "to answer a call"
      )
    try:
      report = wire.read_report(answer, call)
    except ValueError as error:
      raise EngineError(f"{target} answered {error}") from error
    self._count(report[0])
    return self._enter(report, context)

  def _count(self, first: Trajectory) -> None:
    """Counts a report."""
    self._traffic.calls += 1
    texts = (first.request, first.result_text)
    self._traffic.text_bytes += sum(len(text.encode()) for text in texts)

  def _enter(
      self, report: tuple[Trajectory, ...], context: CallContext
  ) -> Trajectory:
    """Gives the calls their places in this rollout's ledger."""
    ledger, start = context.ledger, len(context.ledger)
    for one in report:
      inside = one.parent != NO_PARENT
      parent = start + one.parent if inside else context.parent
      position = ledger.begin(one.role)
      ledger.finish(position, dataclasses.replace(one, parent=parent))
    if report[0].status == Status.FAILED:
      ledger.exhausted = True
    return report[0]
