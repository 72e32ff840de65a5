"""One agent call: sample a turn, act on it, append the result, again.

A child call is the same function one level down. Tokens are appended to one
stream and never encoded again, so what is trained on is what was sampled.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from mgrpo_jax.agents.actor import Moment
from mgrpo_jax.agents.context import CallContext
from mgrpo_jax.agents.errors import InfrastructureError, LateTurnError
from mgrpo_jax.agents.protocol import Action, Malformed, Utterance
from mgrpo_jax.agents.team import Role
from mgrpo_jax.agents.tools import ERROR, Memory, Observation, run_tool
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.types import Completion, Status, Trajectory, Turn

NO_VERSION = -1  # of a stream in which nothing was sampled

_LOG = logging.getLogger(__name__)
_SESSIONS = itertools.count()


async def call_agent(
    role: Role, request: str, context: CallContext
) -> Trajectory:
  """Makes one agent call and records it in the rollout's ledger.

  Args:
    role: who is called.
    request: what is asked.
    context: where in the rollout this happens.

  Returns:
    The trajectory; COMPLETED with an answer, MALFORMED or TRUNCATED where
    a budget ran out, FAILED where a machine broke.
  """
  context.environment.counters["calls"] += 1
  position = context.ledger.begin(role.name)
  call = _Call(role, request, context, position)
  try:
    status = await call.run()
  except LateTurnError:  # `rollout.run_groups` tells of all of them at once
    status = Status.FAILED
  except (InfrastructureError, OSError) as error:  # TimeoutError is an OSError
    reason = str(error) or type(error).__name__  # a deadline says nothing
    _LOG.warning("%s failed: %s", call.session, reason)
    status = Status.FAILED
  finally:
    call.actor.release(call.session)
  trajectory = call.trajectory(status)
  context.ledger.finish(position, trajectory)
  return trajectory


async def call_with_retries(
    role: Role, request: str, context: CallContext
) -> Trajectory:
  """Makes an agent call, again while it fails, at most `max_attempts` times.

  A repeated call takes the place, ordinal and seeds of the one that failed,
  which is forgotten along with its children: the rollout comes out as if
  nothing had broken. Once a call failed for good, its ancestors fail without
  being repeated.

  Args:
    role: who is called.
    request: what is asked.
    context: where in the rollout this happens.

  Returns:
    The trajectory of the last attempt.
  """
  environment, ledger = context.environment, context.ledger
  if role.policy in environment.elsewhere:  # where it is made again, too
    return await environment.elsewhere[role.policy](role, request, context)
  start = len(ledger)
  for attempt in range(environment.max_attempts):
    if attempt:
      ledger.roll_back(start)
      environment.counters["retries"] += 1
    trajectory = await call_agent(role, request, context)
    if trajectory.status != Status.FAILED or ledger.exhausted:
      return trajectory
  ledger.exhausted = True
  environment.counters["failed"] += 1
  return trajectory


def turn_seed(*identity: str | int) -> int:
  """A 64-bit seed that depends on the identity of a turn alone.

  Args:
    *identity: run seed, task, rollout, role, call, turn.

  Returns:
    A stable hash of it, in [0, 2**64).
  """
  text = "\x1f".join(str(part) for part in identity)
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


def fit(text: str, encode: Callable[[str], Sequence[int]], room: int) -> str:
  """The longest prefix of a text whose encoding fits.

  Args:
    text: what should be shown.
    encode: text to tokens, with whatever surrounds it; of the empty text it
      fits.
    room: tokens there are.

  Returns:
    The text, or its longest prefix found by bisection.
  """
  if len(encode(text)) <= room:
    return text
  fits, too_long = 0, len(text)
  while too_long - fits > 1:
    middle = (fits + too_long) // 2
    if len(encode(text[:middle])) <= room:
      fits = middle
    else:
      too_long = middle
  return text[:fits]


class _ChildFailedError(InfrastructureError):
  """A child call failed for good."""


class _Stream:
  """The tokens of one call; only ever appended to."""

  def __init__(self) -> None:
    """Starts empty."""
    self.tokens: list[int] = []
    self.mask: list[float] = []
    self.logprobs: list[float] = []
    self.versions: list[int] = []

  def __len__(self) -> int:
    """Number of tokens."""
    return len(self.tokens)

  def add_context(self, ids: Sequence[int]) -> None:
    """Appends tokens that were not sampled."""
    self.tokens += ids
    self.mask += [0.0] * len(ids)
    self.logprobs += [0.0] * len(ids)

  def add_sampled(self, completion: Completion) -> None:
    """Appends sampled tokens with their log-probabilities."""
    self.tokens += completion.tokens.tolist()
    self.mask += [1.0] * len(completion.tokens)
    self.logprobs += completion.logprobs.tolist()
    if len(completion.tokens):
      self.versions += [completion.version_min, completion.version_max]


class _Call:
  """The state of one agent call while it runs."""

  def __init__(
      self, role: Role, request: str, context: CallContext, position: int
  ):
    """Opens the token stream."""
    self.role, self.request, self.context = role, request, context
    self.position = position
    self.environment = context.environment
    self.actor = self.environment.actors[role.policy]
    self.functions = self.environment.functions(role)
    self.identity = (
        context.task_id,
        context.rollout,
        role.name,
        context.ledger.ordinal(position),
    )
    self.session = "/".join(map(str, (*self.identity, next(_SESSIONS))))
    self.stream = _Stream()
    self.turns: list[Turn] = []
    self.memory = Memory()
    self.num_children = 0
    self.result_text = ""
    self.started = time.monotonic()

  async def run(self) -> Status:
    """Turn after turn until there is an answer or a budget runs out."""
    chat, protocol = self.actor.chat, self.actor.protocol
    verdict = Status.TRUNCATED
    if not self._open():
      return verdict
    for number in range(self.role.max_turns):
      completion = await self._sample()
      utterance = chat.read(completion.tokens.tolist())
      action = protocol.parse(utterance, self.functions)
      if isinstance(action, Action) and action.kind == "answer":
        self.result_text = protocol.argument(action)
        self._record(action, utterance, Observation(text=""))
        return Status.COMPLETED
      verdict = self._verdict(action, utterance)
      is_last = number + 1 == self.role.max_turns
      room = 0 if is_last or completion.finish == "context" else self._room()
      if not await self._respond(action, utterance, room):
        return verdict
    return verdict

  def _open(self) -> bool:
    """Begins the stream; False where the request leaves no room for a turn."""
    system = self.environment.system(self.role)
    prompt = self.actor.chat.open(system, self.request)
    self.stream.add_context(prompt[: self.role.max_context])
    if len(prompt) < self.role.max_context:
      return True
    self.environment.counters["long_requests"] += 1
    return False

  async def _sample(self) -> Completion:
    """Samples the next turn into the stream."""
    room = self.role.max_context - len(self.stream)
    identity = (self.context.seed, *self.identity, len(self.turns))
    moment = Moment(
        role=self.role,
        request=self.request,
        turns=tuple(self.turns),
        tokens=tuple(self.stream.tokens),
        sampling=Sampling(
            temperature=self.environment.temperature,
            max_new_tokens=min(self.role.max_new_tokens, room),
            stop_ids=self.actor.chat.stop_ids,
        ),
        seed=turn_seed(*identity),
        session=self.session,
    )
    with self._waiting(f"policy {self.role.policy!r}"):
      completion = await self._spoken(moment)
    self.stream.add_sampled(completion)
    self.environment.counters["turns"] += 1
    return completion

  async def _spoken(self, moment: Moment) -> Completion:
    """The turn, unless it comes too late."""
    limit = asyncio.timeout(self.environment.turn_deadline)
    try:
      async with limit:
        return await self.actor.speak(moment)
    except TimeoutError as error:
      if not limit.expired():
        raise
      self.environment.counters["late_turns"] += 1
      raise LateTurnError from error

  def _verdict(
      self, action: Action | Malformed, utterance: Utterance
  ) -> Status:
    """The status, should this turn be the last one that fits."""
    if isinstance(action, Action):
      return Status.TRUNCATED
    if not utterance.ended:
      self.environment.counters["cut_turns"] += 1
      return Status.TRUNCATED
    self.environment.counters["malformed_turns"] += 1
    return Status.MALFORMED

  def _room(self) -> int:
    """Tokens that a result may take, a whole turn still fitting behind it."""
    role = self.role
    return role.max_context - len(self.stream) - role.max_new_tokens

  async def _respond(
      self, action: Action | Malformed, utterance: Utterance, room: int
  ) -> bool:
    """Acts and appends the result; False where no result fits."""

    def encode(text: str) -> list[int]:
      wrapped = self.actor.protocol.wrap(text)
      return self.actor.chat.extend(utterance.ended, wrapped)

    if room <= len(encode("")):
      self._record(action, utterance, Observation(text=""))
      return False
    observation = await self._act(action)
    text = fit(observation.text, encode, room)
    if text != observation.text:
      self.environment.counters["cut_results"] += 1
    self.stream.add_context(encode(text))
    shown = dataclasses.replace(observation, text=text)
    self._record(action, utterance, shown)
    return True

  async def _act(self, action: Action | Malformed) -> Observation:
    """Runs the tool, makes the child call, or explains what is wrong."""
    if isinstance(action, Malformed):
      return Observation(text=ERROR + action.reason, outcome="error")
    if action.kind == "call":
      return await self._delegate(action)
    tool = self.environment.tools[action.name]
    with self._waiting(f"tool {tool.name!r}"):
      observation = await run_tool(tool, action.arguments, self.memory)
    if observation.outcome != "ok":
      self.environment.counters[f"tool_{observation.outcome}s"] += 1
    return observation

  async def _delegate(self, action: Action) -> Observation:
    """Makes the child call, unless none is left; sees its first attempt."""
    if self.num_children == self.role.max_calls:
      self.environment.counters["refused_calls"] += 1
      return Observation(text=ERROR + "no calls left", outcome="error")
    self.num_children += 1
    child = self.environment.team[action.name]
    reports = []
    for attempt in range(child.attempts):
      context = dataclasses.replace(
          self.context,
          parent=self.position,
          attempt=attempt,
          callers=self._path(),
      )
      reports.append(
          await call_with_retries(
              child, str(action.arguments["request"]), context
          )
      )
      if reports[-1].status == Status.FAILED:
        raise _ChildFailedError(f"the call to {child.name!r} failed")
    report = reports[0]
    if report.status != Status.COMPLETED:
      return Observation(text=ERROR + "no answer", outcome="error")
    return Observation(text=report.result_text)

  def _path(self) -> tuple[str, ...]:
    """The callers, this call and its turn."""
    _, _, role, ordinal = self.identity
    turn = f"{role} {ordinal} in turn {len(self.turns)}"
    return (*self.context.callers, turn)

  def _waiting(self, target: str) -> contextlib.AbstractContextManager[None]:
    """Lets others see what the call waits for."""
    task_id, rollout, _, _ = self.identity
    activity = self.environment.activity
    return activity.waiting(task_id, rollout, self._path(), target)

  def _record(
      self,
      action: Action | Malformed,
      utterance: Utterance,
      observation: Observation,
  ) -> None:
    """Keeps what the turn was and what came back."""
    argument = (
        self.actor.protocol.argument(action)
        if isinstance(action, Action)
        else utterance.tag + utterance.text
    )
    self.turns.append(
        Turn(
            kind=action.kind if isinstance(action, Action) else "malformed",
            name=action.name if isinstance(action, Action) else "",
            argument=argument,
            result=observation.text,
            page=observation.page,
        )
    )

  def trajectory(self, status: Status) -> Trajectory:
    """The call as a record."""
    task_id, rollout, role, ordinal = self.identity
    versions = self.stream.versions or [NO_VERSION]
    return Trajectory(
        task_id=task_id,
        rollout=rollout,
        role=role,
        call=ordinal,
        parent=self.context.parent,
        request=self.request,
        tokens=np.asarray(self.stream.tokens, np.int32),
        loss_mask=np.asarray(self.stream.mask, np.float32),
        sampler_logprobs=np.asarray(self.stream.logprobs, np.float32),
        version_min=min(versions),
        version_max=max(versions),
        status=status,
        turns=tuple(self.turns),
        result_text=self.result_text,
        seconds=time.monotonic() - self.started,
        attempt=self.context.attempt,
    )
