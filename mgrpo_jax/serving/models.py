"""What can be asked, and what comes back while it is answered."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from mgrpo_jax.serving.conversation import ToolCall
from mgrpo_jax.serving.request import ChatRequest
from mgrpo_jax.serving.token_request import TokenRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """What a choice says at a time.

  Attributes:
    index: of the choice.
    text: that follows what it said before.
    tokens: sampled since.
    logprobs: of the tokens, nats, under the distribution sampled from.
    calls: that it makes; with the last piece.
    finish: why it ends; None but for the last piece.
    prompt_tokens: read for it, not counted in a piece before.
    sampled_tokens: drawn for it, not counted in a piece before.
    extra: fields of the choice that OpenAI's do not have.
  """

  index: int
  text: str = ""
  tokens: tuple[int, ...] = ()
  logprobs: tuple[float, ...] = ()
  calls: tuple[ToolCall, ...] = ()
  finish: str | None = None
  prompt_tokens: int = 0
  sampled_tokens: int = 0
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Pieces = AsyncGenerator[Piece, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A request that can be done.

  Attributes:
    prompt: ids that the choices continue; empty where there are several.
    token_text: shows one token.
    pieces: begins the work for a client, of which a word is given that no
      other has; closing them ends it. Every choice ends with a piece that has
      `finish`.
  """

  prompt: tuple[int, ...]
  token_text: Callable[[int], str]
  pieces: Callable[[str], Pieces]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """Something that answers under a name.

  Attributes:
    name: of the model.
    prepare: checks a request and makes it a job; raises `RequestError`.
    continue_tokens: the same for token ids; None where it has none of its own.
    context: tokens that a stream of it can have; None where it has many.
  """

  name: str
  prepare: Callable[[ChatRequest], Job]
  continue_tokens: Callable[[TokenRequest], Job] | None
  context: int | None


def any_seed(seed: int | None) -> int:
  """The seed of a request, or one that nobody can know."""
  return secrets.randbits(63) if seed is None else seed
