"""Scripted stand-ins for the sampler: `generate` functions without a model."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.interface import Generate
from mgrpo_jax.types import Completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
  """One call of a `generate` function.

  Attributes:
    tokens: the stream it was given.
    sampling: how it was asked to sample.
    seed: of the turn.
    session: of the agent call.
    completion: what it returned.
  """

  tokens: tuple[int, ...]
  sampling: Sampling
  seed: int
  session: str | None
  completion: Completion


def complete(
    ids: Sequence[int], sampling: Sampling, *, seed: int, version: int
) -> Completion:
  """A completion as an engine would return it.

  Args:
    ids: what is sampled, unless a stop token or the budget ends it earlier.
    sampling: budget and stop tokens.
    seed: of the log-probabilities, which are arbitrary numbers below 0.
    version: of the policy.

  Returns:
    The completion.
  """
  kept: list[int] = []
  for token in ids[: sampling.max_new_tokens]:
    kept.append(int(token))
    if token in sampling.stop_ids:
      break
  stopped = bool(kept) and kept[-1] in sampling.stop_ids
  logprobs = -np.random.default_rng(seed).random(len(kept), np.float32)
  return Completion(
      tokens=np.asarray(kept, np.int32),
      logprobs=logprobs,
      raw_logprobs=logprobs,
      finish="stop" if stopped else "length",
      version_min=version,
      version_max=version,
  )


def drawing(
    draw: Callable[[np.random.Generator], Sequence[int]],
    *,
    version: int = 0,
    pause: Callable[[int], float] | None = None,
) -> Generate:
  """A `generate` whose turns are drawn from the turn's seed alone.

  Args:
    draw: random generator to token ids.
    version: of the policy.
    pause: seed to seconds before it answers.

  Returns:
    The function.
  """

  async def generate(
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      *,
      session: str | None = None,
  ) -> Completion:
    del tokens, session  # the seed says it all
    await asyncio.sleep(pause(seed) if pause else 0)
    ids = draw(np.random.default_rng(seed))
    return complete(ids, sampling, seed=seed, version=version)

  return generate


def replaying(turns: Sequence[Sequence[int]]) -> Generate:
  """A `generate` that yields given turns, each session from the first on.

  Args:
    turns: token ids of the first, second, … turn of a session; the last one
      is repeated for ever.

  Returns:
    The function.
  """
  said: dict[str | None, int] = {}

  async def generate(
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      *,
      session: str | None = None,
  ) -> Completion:
    del tokens
    turn = said.get(session, 0)
    said[session] = turn + 1
    ids = turns[min(turn, len(turns) - 1)]
    return complete(ids, sampling, seed=seed, version=turn)

  return generate


def recording(generate: Generate, log: list[Recorded]) -> Generate:
  """Wraps a `generate` so that its calls are kept.

  Args:
    generate: the function.
    log: where its calls are appended, in order of completion.

  Returns:
    The wrapped function.
  """

  async def wrapped(
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      *,
      session: str | None = None,
  ) -> Completion:
    completion = await generate(tokens, sampling, seed, session=session)
    log.append(
        Recorded(
            tokens=tuple(tokens),
            sampling=sampling,
            seed=seed,
            session=session,
            completion=completion,
        )
    )
    return completion

  return wrapped
