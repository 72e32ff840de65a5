"""From the body of a request to a job that can be done, by interface."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from mgrpo_jax.serving import request as asking
from mgrpo_jax.serving import token_request, token_response
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.serving.models import Job, Model, Piece
from mgrpo_jax.serving.response import Reply

Look = Callable[[str], Model]  # a model by its name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """A request that can be answered.

  Attributes:
    model: its name.
    choices: that it takes.
    job: that answers it.
    whole: all pieces as one answer.
    stream: tells the pieces as they come; None where that is not wanted.
  """

  model: str
  choices: int
  job: Job
  whole: Callable[[Sequence[Piece]], dict[str, Any]]
  stream: Reply | None


def chat(body: bytes, look: Look, max_choices: int) -> Order:
  """Reads a request of /v1/chat/completions.

  Args:
    body: JSON.
    look: a model by its name.
    max_choices: largest n.

  Returns:
    The order.

  Raises:
    RequestError: it cannot be answered.
  """
  asked = asking.parse(body, max_choices=max_choices)
  model = look(asked.model)
  reply = Reply(
      id=f"chatcmpl-{uuid.uuid4().hex}",
      created=int(time.time()),
      request=asked,
      job=model.prepare(asked),
  )
  return Order(
      model=model.name,
      choices=asked.n,
      job=reply.job,
      whole=reply.completion,
      stream=reply if asked.stream else None,
  )


def tokens(body: bytes, look: Look, max_choices: int) -> Order:
  """Reads a request of /v1/completions; see `chat`."""
  del max_choices  # it has one
  asked = token_request.parse(body)
  model = look(asked.model)
  if model.continue_tokens is None:
    raise RequestError(
        400,
        f"model: {asked.model!r} has no tokens of its own, its policies do",
        param="model",
    )
  job = model.continue_tokens(asked)

  def whole(pieces: Sequence[Piece]) -> dict[str, Any]:
    ids = [token for piece in pieces for token in piece.tokens]
    names = [
        f"token_id:{token}" if asked.names_ids else job.token_text(token)
        for token in ids
    ]
    return token_response.response(
        asked,
        pieces,
        names,
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
    )

  return Order(model=model.name, choices=1, job=job, whole=whole, stream=None)
