"""Conversations over HTTP: what the turn before left in the cache is reused.

A request brings its whole conversation and names no session, so its session is
found by tokens: the kept one of the same client whose last prompt it begins
with. The engine prefills only what follows the tokens that both have, which is
all but the new messages where the client sends back what it was told.

What a request yields then depends on the turns before it as `Engine` says: its
stream was prefilled turn by turn, not at once, which rounds differently in the
last place. A client sees from the time to the first token whether it asked for
such a prefix lately; of other clients' requests nothing is reused.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.interface import Generate
from mgrpo_jax.sampler.slots import common_length
from mgrpo_jax.types import Completion

_NAMES = itertools.count()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Kept:
  """A conversation that may go on.

  Attributes:
    name: of the engine's session.
    client: whose it is.
    stream: [n] int32, its last prompt and what was sampled then.
    asked: tokens of that prompt.
  """

  name: str
  client: str
  stream: np.ndarray
  asked: int


class Sessions:
  """The conversations with one policy whose cache is kept."""

  def __init__(
      self,
      generate: Generate,
      release: Callable[[str], None],
      *,
      limit: int,
  ) -> None:
    """Keeps none yet.

    Args:
      generate: `Engine.generate`.
      release: `Engine.release`.
      limit: conversations to keep, the least recently used goes first; the
        engine gives their cache up before, where slots run out. 0 for none.
    """
    self._generate = generate
    self._release = release
    self._limit = limit
    self._kept: collections.OrderedDict[str, _Kept] = collections.OrderedDict()

  def __len__(self) -> int:
    """Conversations kept."""
    return len(self._kept)

  async def go_on(
      self,
      client: str,
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      **told: Any,
  ) -> Completion:
    """Samples the next turn of a conversation, and keeps it for another.

    Args:
      client: who asks.
      tokens: the whole conversation.
      sampling: see `Engine.generate`.
      seed: see there.
      **told: its other arguments.

    Returns:
      The completion.
    """
    stream = np.asarray(tokens, np.int32)
    found = self._take(client, stream)
    name = f"served/{next(_NAMES)}" if found is None else found.name
    try:
      completion = await self._generate(
          tokens, sampling, seed, session=name, tenant=client, **told
      )
    except BaseException:
      self._release(name)
      raise
    self._kept[name] = _Kept(
        name=name,
        client=client,
        stream=np.append(stream, completion.tokens),
        asked=len(stream),
    )
    while len(self._kept) > self._limit:
      self._release(self._kept.popitem(last=False)[0])
    return completion

  async def begin(
      self,
      client: str,
      tokens: Sequence[int],
      sampling: Sampling,
      seed: int,
      **told: Any,
  ) -> Completion:
    """Samples a turn that finds nothing and leaves nothing; see `go_on`."""
    return await self._generate(tokens, sampling, seed, tenant=client, **told)

  def _take(self, client: str, stream: np.ndarray) -> _Kept | None:
    """Takes out the conversation that most tokens of a stream go on from."""
    best, most = None, 0
    for one in self._kept.values():
      if one.client != client:
        continue
      same = common_length(one.stream, stream)
      if same >= max(one.asked, most):
        best, most = one, same
    return None if best is None else self._kept.pop(best.name)
