"""Who writes a role's turns: a sampled policy, or plain code."""

import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.protocol import Action, Protocol
from mgrpo_jax.agents.team import Role
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.interface import Generate
from mgrpo_jax.types import Completion, Turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
  """The point at which a role has to write its next turn.

  Attributes:
    role: who writes.
    request: what the call was asked for.
    turns: the turns so far, oldest first.
    tokens: the stream so far, prompt included.
    sampling: temperature, length and stop tokens.
    seed: of this turn's random stream.
    session: names the agent call; equal for all its turns.
  """

  role: Role
  request: str
  turns: tuple[Turn, ...]
  tokens: tuple[int, ...]
  sampling: Sampling
  seed: int
  session: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Actor:
  """Who writes the turns of the roles of one policy.

  Attributes:
    speak: the next turn; raises `InfrastructureError`, `OSError` or
      `TimeoutError` where a machine is at fault.
    release: forgets a session; called once at the end of every call.
    chat: messages to tokens, over the policy's tokenizer.
    protocol: text to actions.
  """

  speak: Callable[[Moment], Coroutine[Any, Any, Completion]]
  release: Callable[[str], None]
  chat: Chat
  protocol: Protocol


def sampled(
    generate: Generate,
    *,
    release: Callable[[str], None],
    chat: Chat,
    protocol: Protocol,
) -> Actor:
  """An actor whose turns are sampled, `sampled(engine.generate, …)`.

  Args:
    generate: `(tokens, sampling, seed, *, session)` to a completion.
    release: forgets a session.
    chat: messages to tokens.
    protocol: text to actions.

  Returns:
    The actor.
  """

  async def speak(moment: Moment) -> Completion:
    return await generate(
        moment.tokens, moment.sampling, moment.seed, session=moment.session
    )

  return Actor(speak=speak, release=release, chat=chat, protocol=protocol)


def scripted(
    act: Callable[[Moment], Action], *, chat: Chat, protocol: Protocol
) -> Actor:
  """An actor that is plain code: turns are rendered actions.

  The same call loop then yields the trajectories to imitate, tokens and
  masks as a policy would have written them, with log-probabilities 0.

  Args:
    act: the next action; what it raises ends the rollout.
    chat: messages to tokens.
    protocol: text to actions.

  Returns:
    The actor.
  """

  async def speak(moment: Moment) -> Completion:
    ids = chat.write(protocol.render(act(moment)))
    kept = ids[: moment.sampling.max_new_tokens]
    return Completion(
        tokens=np.asarray(kept, np.int32),
        logprobs=np.zeros(len(kept), np.float32),
        raw_logprobs=np.zeros(len(kept), np.float32),
        finish="stop" if len(kept) == len(ids) else "length",
        version_min=0,
        version_max=0,
    )

  def release(session: str) -> None:
    del session  # nothing is kept

  return Actor(speak=speak, release=release, chat=chat, protocol=protocol)
