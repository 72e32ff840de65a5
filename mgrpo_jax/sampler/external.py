"""Completions from an OpenAI-compatible server, weights by a directory.

The same calls as `engine.Engine`. The server must take prompts as token ids and
return the ids that it sampled with their log-probabilities, as vLLM and
`experiments.serve` do; one that cannot is refused when the engine is entered.

Answers are believed only while the server is known to sample from the weights
it was given: that is asked again whenever a connection had to be opened, which
is the one thing that no restart of a server can avoid. A server started anew
gets them once more; one that another run gave weights to is an error.

What a machine may cure (no connection, 5xx) is an `UnreachableError`, which
fails one agent call; what it will not cure is an `EngineError`, which ends the
run.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

from mgrpo_jax.fields import check
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.policy.sampling import Sampling, split_seed
from mgrpo_jax.sampler import exchange
from mgrpo_jax.sampler.connection import Connection, UnreachableError
from mgrpo_jax.sampler.exchange import Answer, AnswerError, Question
from mgrpo_jax.sampler.interface import EngineError, OnTokens
from mgrpo_jax.sampler.lease import Lease, Server
from mgrpo_jax.sampler.stream import checked
from mgrpo_jax.types import Completion

_UNEVEN = 0.01  # nats
_NOISE = 1e-4  # nats by which equal log-probabilities may differ
_WARMTHS = (1.0, 0.5)  # at which a server's log-probabilities must differ


class ExternalEngine:
  """Samples completions from one policy, at a server.

  Use it within `async with`; calls must come from that event loop.
  """

  def __init__(
      self, policy: Policy, version: int, *, server: Server, context: int
  ) -> None:
    """Connects to nothing yet.

    Args:
      policy: with the weights to begin with, which the server is given.
      version: number of these weights.
      server: that samples.
      context: tokens that a stream can have.

    Raises:
      ValueError: a size is not positive, naming it.
    """
    check("context", context, context >= 1, ">= 1")
    self._policy = policy.without_critic()
    self._version = version
    self._server = server
    self._context = context
    self._counts: collections.Counter[str] = collections.Counter()
    self._busy = 0
    self._lease = Lease(server)
    self._known_at = -1  # connections when it was last known to have them
    self._tempered = False  # see `Dialect`
    self._connection: Connection | None = None
    self._asking = asyncio.Lock()
    self._stack = contextlib.AsyncExitStack()

  async def __aenter__(self) -> Self:
    """Sees that the server will do, and gives it the weights.

    Raises:
      EngineError: it will not do, or refuses; says what to do about it.
      StorageError: the weights cannot be written, or another engine writes to
        the folder.
      UnreachableError: it does not answer.
    """
    if self._connection is not None:
      raise RuntimeError("the engine is already running")
    self._asking = asyncio.Lock()
    async with contextlib.AsyncExitStack() as stack:
      lease = await stack.enter_async_context(self._lease)
      connection = await stack.enter_async_context(
          Connection(self._server.address)
      )
      await self._check_model(connection)
      if self._server.dialect.untied:
        await self._check_loading(connection)
      await lease.take(self._policy, self._version)
      await self._check_answers(connection)
      self._known_at = -1
      await self._make_sure(connection)
      self._stack, self._connection = stack.pop_all(), connection
    return self

  async def __aexit__(self, *exception: object) -> None:
    """Closes all connections; requests under way fail."""
    self._connection = None
    await self._stack.aclose()

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

    Cancelling the call closes its connection, upon which servers give up.

    Args:
      tokens: the whole stream, 1 to `context` ids.
      sampling: temperature, budget, stop tokens.
      seed: 0 to 2^64 - 1.
      session: says nothing here: servers find shared prefixes themselves.
      on_tokens: called once, at the end.

    Returns:
      The completion, ids and log-probabilities as the server sent them. Its
      versions are the server's word or, where it has none, those of the
      weights it had when asked and when it answered.

    Raises:
      ValueError: if an argument is out of range; nothing has been done.
      EngineError: the server refuses, or its answer does not add up.
      UnreachableError: it does not answer.
    """
    del session
    vocab_size = self._policy.config.vocab_size
    stream = checked(tokens, context=self._context, vocab_size=vocab_size)
    split_seed(seed)  # raises for those out of range
    connection = self._connection
    if connection is None:
      raise EngineError("the engine is not running; use `async with engine:`")
    self._check_warmth(sampling)
    limit = min(sampling.max_new_tokens, self._context - len(stream))
    first = self._version
    if not limit:
      return exchange.completion(
          None, len(stream), context=self._context, versions=(first, first)
      )
    question = Question(
        tokens=tuple(stream.tolist()),
        sampling=sampling,
        seed=seed,
        limit=limit,
    )
    self._busy += 1
    try:
      answer = await self._answer(connection, question)
    except asyncio.CancelledError:
      self._counts["cancelled"] += 1
      raise
    finally:
      self._busy -= 1
    self._counts["visits"] += 1
    self._counts["generated"] += len(answer.tokens)
    if on_tokens is not None:
      on_tokens(answer.tokens.tolist(), answer.logprobs.tolist())
    return exchange.completion(
        answer,
        len(stream),
        context=self._context,
        versions=(first, self._version),
    )

  def release(self, session: str) -> None:
    """Ends a session, of which nothing is kept here."""
    del session

  def update(self, params: Params, version: int) -> None:
    """Gives the server other weights, and waits until it samples from them.

    Outside `async with` they are kept until it is entered.

    Args:
      params: weights.
      version: their number.

    Raises:
      EngineError: the server refuses, or another run has given it weights.
      StorageError: they cannot be written.
      UnreachableError: the server does not answer.
    """
    policy = dataclasses.replace(self._policy, params=params)
    self._policy = policy.without_critic()
    self._version = version
    if self._connection is None:
      return
    self._lease.replace(self._policy, version)

  def stats(self) -> dict[str, Any]:
    """Counts what was done so far.

    Returns:
      What `Engine.stats` has: `visits` are answers; what happens to caches,
      compilations and the device's time is the server's to know, and 0 here.
      Also `retries` of requests, and `handovers` of weights.
    """
    waiting = self._connection.waiting if self._connection else 0
    retries = self._connection.retries if self._connection else 0
    running = self._busy - waiting
    names = ("generated", "visits", "cancelled")
    unknown = ("prefilled", "copied", "evictions", "mismatches")
    return {
        **{name: self._counts[name] for name in names},
        "handovers": self._lease.handovers,
        **dict.fromkeys(unknown, 0),
        "slots": {
            "free": max(0, self._server.address.max_concurrent - running),
            "idle": 0,
            "busy": running,
        },
        "seconds": {"busy": 0.0, "idle": 0.0},
        "requests": waiting,
        "retries": retries,
        "compilations": {},
    }

  async def _check_model(self, connection: Connection) -> None:
    """Raises unless the server has the model, with room for the context."""
    url, told = self._server.address.url, await connection.get("models")
    data = told.get("data") if isinstance(told, dict) else None
    found = {
        one["id"]: one
        for one in (data if isinstance(data, list) else [])
        if isinstance(one, dict) and isinstance(one.get("id"), str)
    }
    if self._server.model not in found:
      raise EngineError(
          f"{url}/models: has no {self._server.model!r}, but {sorted(found)}"
      )
    longest = found[self._server.model].get("max_model_len")
    if isinstance(longest, int) and longest < self._context:
      raise EngineError(
          f"{url}/models: {self._server.model!r} has max_model_len {longest},"
          f" must be at least the context, {self._context}"
      )

  async def _check_loading(self, connection: Connection) -> None:
    """Raises unless a head of zeros makes every token as likely."""
    path = await self._lease.blank(self._policy)
    sampling = Sampling(temperature=1.0, max_new_tokens=1, stop_ids=())
    question = Question(tokens=(0,), sampling=sampling, seed=0, limit=1)
    body = exchange.body(question, self._server.model)
    told = await connection.post("completions", body)
    with self._naming():
      found = float(self._read(told, question).logprobs[0])
    if abs(found + math.log(self._policy.config.vocab_size)) > _UNEVEN:
      raise EngineError(
          f"{self._server.address.url}: keeps the output head that it was"
          " started with; start it from a directory whose embeddings are not"
          f" tied, such as {path}"
      )

  async def _check_answers(self, connection: Connection) -> None:
    """Raises unless token ids come back; sees what log-probabilities mean."""
    tempered = self._server.dialect.tempered
    tops = []
    for warmth in _WARMTHS:
      sampling = Sampling(temperature=warmth, max_new_tokens=1, stop_ids=())
      question = Question(tokens=(0,), sampling=sampling, seed=0, limit=1)
      told = await connection.post(
          "completions",
          exchange.body(question, self._server.model, top=int(not tempered)),
      )
      with self._naming():
        self._read(told, question)
        if not tempered:
          tops.append(exchange.top_logprob(told))
    self._tempered = tempered or max(tops) - min(tops) > _NOISE

  def _check_warmth(self, sampling: Sampling) -> None:
    """Raises where log-probabilities would be of another temperature."""
    if sampling.temperature not in (0.0, 1.0) and not self._tempered:
      raise EngineError(
          f"{self._server.address.url}: log-probabilities are not of the"
          f" distribution sampled from at temperature {sampling.temperature};"
          " start vLLM with --logprobs-mode processed_logprobs"
      )

  async def _answer(self, connection: Connection, question: Question) -> Answer:
    """Asks until there is an answer from the weights that were given."""
    body = exchange.body(question, self._server.model)
    for _ in range(self._server.address.attempts):
      await self._lease.settled()
      losses = self._lease.losses
      told = await connection.post("completions", body)
      await self._make_sure(connection)
      if losses != self._lease.losses:
        continue
      with contextlib.suppress(exchange.AbortedError), self._naming():
        return self._read(told, question)
    raise UnreachableError(
        f"{self._server.address.url}/completions: no whole answer in"
        f" {self._server.address.attempts} attempts"
    )

  def _read(self, told: Any, question: Question) -> Answer:
    """Reads an answer; raises `AnswerError` where it does not add up."""
    vocab_size = self._policy.config.vocab_size
    return exchange.read(
        told, question, vocab_size=vocab_size, newest=self._version
    )

  async def _make_sure(self, connection: Connection) -> None:
    """Gives a server that was started anew the weights again."""
    if self._is_known(connection):
      return
    async with self._asking:
      if self._is_known(connection):
        return
      opened = connection.opened
      await self._lease.ensure(self._policy, self._version)
      self._known_at = opened

  def _is_known(self, connection: Connection) -> bool:
    """Whether all connections are to a server that has our weights."""
    return self._lease.is_sure and connection.opened == self._known_at

  @contextlib.contextmanager
  def _naming(self) -> Iterator[None]:
    """Says whose answer it is that does not add up."""
    try:
      yield
    except exchange.AbortedError:
      raise
    except AnswerError as error:
      url = self._server.address.url
      raise EngineError(f"{url}/completions: {error}") from error
