"""Which stream stands in which slot; host-side book-keeping, no device.

A slot is free, busy with a request, or idle: kept for a session between two of
its requests. A request goes to its session's own slot, and goes on from as much
of the cache there as its tokens begin with; if that is nothing, it goes to a
free slot, else to the slot of the session that has been idle longest, which
loses its cache.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import heapq

import numpy as np

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler.interface import OnTokens, Until
from mgrpo_jax.types import Completion

Prompt = tuple[str, bytes]  # tenant and tokens


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
  """One completion being sampled.

  Attributes:
    tokens: [n] int32, the stream so far.
    sampling: how to go on.
    seed: the two words of the seed.
    session: whose cache to go on from and to leave; None for neither, or once
      it was released.
    tenant: among whose requests caches may be copied.
    limit: length at which the stream must stop.
    future: gets the completion; done early means cancelled.
    until: told each token drawn, says whether it is the last; None: none is.
    on_tokens: told what each visit drew; None for nobody.
    sampled: tokens drawn, of visits that were reported.
    logprobs: their log-probabilities, nats, under what they were drawn from.
    raw_logprobs: the same under the softmax of the logits.
    versions: of the weights, in each visit that drew some.
    drawn: whether the device samples nothing more.
  """

  tokens: np.ndarray
  sampling: Sampling
  seed: tuple[int, int]
  session: str | None
  tenant: str
  limit: int
  future: asyncio.Future[Completion]
  until: Until | None = None
  on_tokens: OnTokens | None = None
  sampled: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  raw_logprobs: list[float] = dataclasses.field(default_factory=list)
  versions: list[int] = dataclasses.field(default_factory=list)
  drawn: bool = False


@dataclasses.dataclass(eq=False, kw_only=True)
class Slot:
  """One slot's stream.

  Attributes:
    index: row of the cache.
    stream: tokens known; all but the newest are cached once a visit ended.
    cached: how many of them are in the device's cache.
    epoch: of the table, when the cache was begun.
    request: being sampled, or None.
    session: that the stream belongs to, or None.
    prompt: the tenant and the whole prompt, as bytes, whose fresh prefill the
      cache begins with; None if other slots may not copy it.
  """

  index: int
  stream: np.ndarray
  cached: int = 0
  epoch: int = 0
  request: Request | None = None
  session: str | None = None
  prompt: Prompt | None = None


class SlotTable:
  """All slots of an engine."""

  def __init__(self, num_slots: int) -> None:
    """Starts with every slot free.

    Args:
      num_slots: S.
    """
    nothing = np.zeros(0, np.int32)
    self.slots = [Slot(index=i, stream=nothing) for i in range(num_slots)]
    self.evictions = 0
    self.mismatches = 0
    self._free = list(range(num_slots))  # a heap
    self._sessions: dict[str, Slot] = {}
    self._idle: collections.OrderedDict[str, Slot] = collections.OrderedDict()
    self._prompts: dict[Prompt, Slot] = {}
    self._epoch = 0  # how often caches were forgotten

  def busy(self) -> list[tuple[Slot, Request]]:
    """Lists the slots with a request, by index, and their requests."""
    return [(slot, slot.request) for slot in self.slots if slot.request]

  def counts(self) -> dict[str, int]:
    """Counts slots by what they are doing."""
    return {
        "free": len(self._free),
        "idle": len(self._idle),
        "busy": len(self.busy()),
    }

  def resume(self, request: Request) -> Slot | None:
    """Gives a request its session's slot, if it begins as the stream there.

    Args:
      request: to place.

    Returns:
      The slot, now busy, cut back to the tokens that the request begins with;
      None if there is none, or nothing left of it.
    """
    if request.session is None or request.session not in self._idle:
      return None
    slot = self._idle[request.session]
    kept = common_length(slot.stream[: slot.cached], request.tokens[:-1])
    if kept < slot.cached:
      self.mismatches += 1
      self._forget_prompt(slot)
      if not kept:
        self.free(slot)
        return None
      slot.cached = kept
    del self._idle[request.session]
    slot.request, slot.stream = request, request.tokens
    return slot

  def place(self, request: Request) -> Slot | None:
    """Gives a request an empty slot, evicting the longest idle session.

    Args:
      request: to place.

    Returns:
      The slot, now busy; None if every slot is busy.
    """
    if not self._free:
      if not self._idle:
        return None
      self.evictions += 1
      self.free(next(iter(self._idle.values())))
    slot = self.slots[heapq.heappop(self._free)]
    self._forget_prompt(slot)
    slot.request, slot.session = request, request.session
    slot.stream, slot.cached, slot.epoch = request.tokens, 0, self._epoch
    if request.session is not None:
      self._sessions[request.session] = slot
    return slot

  def donor(self, slot: Slot, tenant: str) -> Slot | None:
    """Finds a slot whose cache begins with this one's whole prompt.

    Where there is none, this slot becomes the donor of those that follow.

    Args:
      slot: just placed.
      tenant: of its request; slots of others are not looked at.

    Returns:
      The slot to copy, or None: this one must be prefilled.
    """
    prompt = tenant, slot.stream.tobytes()
    donor = self._prompts.get(prompt)
    if donor is None:
      slot.prompt = prompt
      self._prompts[prompt] = slot
    return donor

  def finish(self, slot: Slot) -> None:
    """Ends a slot's request; its session, if current, keeps the cache.

    Args:
      slot: busy.
    """
    slot.request = None
    if slot.session is None or slot.epoch != self._epoch:
      self.free(slot)
    else:
      self._idle[slot.session] = slot

  def free(self, slot: Slot) -> None:
    """Frees a slot that is not free; its session, if any, loses its cache.

    Args:
      slot: busy or idle.
    """
    if slot.session is not None:
      self._sessions.pop(slot.session, None)
      self._idle.pop(slot.session, None)
    slot.request, slot.session = None, None
    heapq.heappush(self._free, slot.index)

  def release(self, session: str) -> None:
    """Ends a session: frees its slot now, or once its request has finished.

    Args:
      session: unknown ones are ignored.
    """
    slot = self._sessions.pop(session, None)
    if slot is None:
      return
    if self._idle.pop(session, None) is not None:
      self.free(slot)
    slot.session = None

  def forget(self) -> None:
    """Drops every cache, those being sampled from once that has ended."""
    self._epoch += 1
    for slot in list(self._idle.values()):
      self.free(slot)
    for slot in self.slots:
      self._forget_prompt(slot)

  def _forget_prompt(self, slot: Slot) -> None:
    """Stops others from copying a slot."""
    if slot.prompt is not None:
      del self._prompts[slot.prompt]
      slot.prompt = None


def common_length(left: np.ndarray, right: np.ndarray) -> int:
  """Counts the tokens that two streams both begin with.

  Args:
    left: [n] int32.
    right: [m] int32.

  Returns:
    The length of the longest common prefix.
  """
  shorter = min(len(left), len(right))
  differing = np.flatnonzero(left[:shorter] != right[:shorter])
  return int(differing[0]) if len(differing) else shorter
