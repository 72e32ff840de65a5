"""What a client is told that asked for a completion of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mgrpo_jax.serving.models import Piece
from mgrpo_jax.serving.response import Usage
from mgrpo_jax.serving.token_request import TokenRequest


def response(
    asked: TokenRequest,
    pieces: Sequence[Piece],
    names: Sequence[str],
    *,
    id: str,
    created: int,
) -> dict[str, Any]:
  """The whole answer.

  Args:
    asked: what is answered.
    pieces: all of them.
    names: of the sampled tokens.
    id: of the completion.
    created: seconds since 1970.

  Returns:
    A `text_completion`, with `token_ids`, `prompt_token_ids` and
    `policy_versions` (oldest and newest version of the weights that sampled a
    token), which OpenAI's do not have.
  """
  usage = Usage()
  for piece in pieces:
    usage = usage.plus(piece)
  choice: dict[str, Any] = {
      "index": 0,
      "text": "".join(piece.text for piece in pieces),
      "logprobs": None,
      "finish_reason": pieces[-1].finish,
      **pieces[-1].extra,
  }
  if asked.logprobs:
    values = [value for piece in pieces for value in piece.logprobs]
    starts = [0]
    for name in names:
      starts.append(starts[-1] + len(name))
    choice["logprobs"] = {
        "tokens": list(names),
        "token_logprobs": values,
        "top_logprobs": [
            {name: value} for name, value in zip(names, values, strict=True)
        ],
        "text_offset": starts[:-1],
    }
  if asked.return_token_ids:
    choice["token_ids"] = [t for piece in pieces for t in piece.tokens]
    choice["prompt_token_ids"] = list(asked.prompt)
  return {
      "id": id,
      "object": "text_completion",
      "created": created,
      "model": asked.model,
      "choices": [choice],
      "usage": usage.as_json(),
  }
