"""What a client is told: OpenAI's objects, built from pieces."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mgrpo_jax.serving.conversation import ToolCall
from mgrpo_jax.serving.models import Job, Model, Piece
from mgrpo_jax.serving.request import ChatRequest

DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
  """Tokens that a request took.

  Attributes:
    prompt: read.
    sampled: drawn.
  """

  prompt: int = 0
  sampled: int = 0

  def plus(self, piece: Piece) -> Usage:
    """The same with a piece more."""
    return Usage(
        prompt=self.prompt + piece.prompt_tokens,
        sampled=self.sampled + piece.sampled_tokens,
    )

  def as_json(self) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": self.prompt,
        "completion_tokens": self.sampled,
        "total_tokens": self.prompt + self.sampled,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """Builds the objects that answer one request.

  Attributes:
    id: of the completion.
    created: seconds since 1970.
    request: that is answered.
    job: that answers it.
  """

  id: str
  created: int
  request: ChatRequest
  job: Job

  def completion(self, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The whole answer.

    Args:
      pieces: all of them.

    Returns:
      A `chat.completion`.
    """
    usage = Usage()
    for piece in pieces:
      usage = usage.plus(piece)
    choices = [
        self._choice([piece for piece in pieces if piece.index == index])
        for index in range(self.request.n)
    ]
    return self._object("chat.completion", choices) | {"usage": usage.as_json()}

  def first(self) -> dict[str, Any]:
    """The chunk that opens every choice of a stream."""
    delta = {"role": "assistant", "content": ""}
    choices = [
        {"index": index, "delta": delta, "finish_reason": None}
        for index in range(self.request.n)
    ]
    return self._chunk(choices, self._prompt())

  def chunk(self, piece: Piece) -> dict[str, Any] | None:
    """A piece as a chunk of a stream.

    Args:
      piece: of any choice.

    Returns:
      A `chat.completion.chunk`; None where there is nothing to tell.
    """
    delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
    if piece.calls:
      delta["tool_calls"] = [
          {"index": number} | _call(call)
          for number, call in enumerate(piece.calls)
      ]
    details = self._details([piece])
    shown = self.request.logprobs or self.request.return_token_ids
    if not (delta or piece.finish or (shown and piece.tokens)):
      return None
    choice = {
        "index": piece.index,
        "delta": delta,
        "finish_reason": piece.finish,
    }
    return self._chunk([choice | details | dict(piece.extra)], {})

  def last(self, usage: Usage) -> dict[str, Any]:
    """The chunk without choices that says what a stream took."""
    return self._object("chat.completion.chunk", []) | {
        "usage": usage.as_json()
    }

  def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
    """One choice of a whole answer."""
    text = "".join(piece.text for piece in pieces)
    calls = [_call(call) for piece in pieces for call in piece.calls]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not text else text,
        "refusal": None,
    }
    if calls:
      message["tool_calls"] = calls
    choice = {
        "index": pieces[0].index,
        "message": message,
        "finish_reason": pieces[-1].finish,
    }
    return choice | self._details(pieces) | dict(pieces[-1].extra)

  def _details(self, pieces: Sequence[Piece]) -> dict[str, Any]:
    """What a choice says of its tokens, as far as it is asked to."""
    told: dict[str, Any] = {"logprobs": None}
    if self.request.logprobs:
      told["logprobs"] = {
          "content": [
              {
                  "token": self.job.token_text(token),
                  "logprob": logprob,
                  "bytes": None,
                  "top_logprobs": [],
              }
              for piece in pieces
              for token, logprob in zip(
                  piece.tokens, piece.logprobs, strict=True
              )
          ],
          "refusal": None,
      }
    if self.request.return_token_ids:
      told["token_ids"] = [token for piece in pieces for token in piece.tokens]
    return told

  def _prompt(self) -> dict[str, Any]:
    """The ids of the prompt, if wanted."""
    if not self.request.return_token_ids:
      return {}
    return {"prompt_token_ids": list(self.job.prompt)}

  def _chunk(
      self, choices: Sequence[Any], more: Mapping[str, Any]
  ) -> dict[str, Any]:
    """A chunk; where usage follows, every other chunk says that it is null."""
    usage = {"usage": None} if self.request.include_usage else {}
    return self._object("chat.completion.chunk", choices) | usage | dict(more)

  def _object(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
    """The fields that all of them have."""
    told = {
        "id": self.id,
        "object": kind,
        "created": self.created,
        "model": self.request.model,
        "choices": list(choices),
    }
    return told | (self._prompt() if kind == "chat.completion" else {})


def models(found: Iterable[Model], created: int) -> dict[str, Any]:
  """The list of models.

  Args:
    found: the models.
    created: seconds since 1970.

  Returns:
    OpenAI's list object; policies have vLLM's `max_model_len` in it, tokens.
  """
  return {"object": "list", "data": [model(one, created) for one in found]}


def model(one: Model, created: int) -> dict[str, Any]:
  """One model of the list; see `models`."""
  return {
      "id": one.name,
      "object": "model",
      "created": created,
      "owned_by": "mgrpo_jax",
  } | ({} if one.context is None else {"max_model_len": one.context})


def dump(value: Any) -> bytes:
  """A JSON value as ASCII, which holds whatever a model or a client wrote."""
  return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
  """A JSON value as one server-sent event."""
  return b"data: " + dump(value) + b"\n\n"


def _call(call: ToolCall) -> dict[str, Any]:
  """A call, its arguments as text."""
  return {
      "id": call.id,
      "type": "function",
      "function": {
          "name": call.name,
          "arguments": json.dumps(dict(call.arguments)),
      },
  }
