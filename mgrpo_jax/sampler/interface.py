"""What agents, runs and servers need of whoever samples a policy.

`engine.Engine` samples in this process, `external.ExternalEngine` asks a server
to. Who uses them knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, Self

from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.types import Completion, PolicyVersion

Generate = Callable[..., Coroutine[Any, Any, Completion]]  # `RolloutEngine`'s
Until = Callable[[int], bool]
OnTokens = Callable[[Sequence[int], Sequence[float]], None]


class EngineError(RuntimeError):
  """The engine cannot go on; every waiting request gets one."""


class RolloutEngine(Protocol):
  """Samples completions from one policy, within `async with`."""

  async def __aenter__(self) -> Self:
    """Starts on the running event loop."""

  async def __aexit__(self, *exception: object) -> None:
    """Ends; requests still waiting get an error."""

  async def generate(
      self,
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      *,
      session: str | None = None,
      on_tokens: OnTokens | None = None,
  ) -> Completion:
    """Samples what follows a stream of tokens.

    Args:
      tokens: the whole stream.
      sampling: temperature, budget, stop tokens.
      seed: 0 to 2^64 - 1.
      session: names the stream that later calls extend; one request of a
        session at a time, ended with `release`.
      on_tokens: called with the tokens drawn since the last time, and their
        log-probabilities, nats; together they are the completion's.

    Returns:
      The completion.
    """

  def release(self, session: str) -> None:
    """Ends a session; unknown ones are ignored."""

  def update(self, params: Params, version: int) -> None:
    """Samples from other weights from now on; `version` is their number."""

  def stats(self) -> dict[str, Any]:
    """Counts what was done so far; the keys are those of `Engine.stats`."""


class PooledEngine(RolloutEngine, Protocol):
  """Samples here and in other processes, which take weights from the store."""

  def published(self, version: PolicyVersion) -> None:
    """Has them take a version that is in the store; from any thread."""

  def helpers(self) -> int:
    """Counts who of them has sampled something since it was last asked."""
