"""What a client asks for that samples a policy: a completion of token ids.

Pure functions. /v1/completions is for programs that sample from elsewhere: the
prompt is ids, not text, and nothing of it is tokenised again. A field that
would change the answer and cannot be honoured is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mgrpo_jax.policy.sampling import MAX_STOP_IDS
from mgrpo_jax.serving import reading
from mgrpo_jax.serving.errors import RequestError, wrong

_MOST = 2**31 - 1
_LIMIT = 16  # tokens, where a request has no max_tokens: OpenAI's
# What sampling here does not know, and the values at which it changes nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (0,),  # of the sampled tokens; of others they are not known
    "min_p": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "stop": ([],),
    "stream": (False,),
    "suffix": ("",),
    "top_k": (0, -1),
    "top_p": (1,),
}
_READ = (
    "ignore_eos",
    "max_tokens",
    "model",
    "prompt",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "seed",
    "stop_token_ids",
    "temperature",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRequest:
  """A completion of token ids that is asked for.

  Attributes:
    model: its name.
    prompt: ids, at least one.
    max_tokens: that may be sampled.
    temperature: None for the server's.
    seed: 0 to 2^64 - 1; None for any.
    stop_ids: tokens that end it.
    ignore_eos: whether those that end a turn of the model's do not.
    logprobs: whether each token's log-probability is wanted.
    return_token_ids: whether the ids of prompt and completion are wanted.
    names_ids: whether tokens are to be named by their ids, not their texts.
  """

  model: str
  prompt: tuple[int, ...]
  max_tokens: int
  temperature: float | None
  seed: int | None
  stop_ids: tuple[int, ...]
  ignore_eos: bool
  logprobs: bool
  return_token_ids: bool
  names_ids: bool


def parse(body: bytes) -> TokenRequest:
  """Reads the body of a request for a completion.

  Args:
    body: JSON.

  Returns:
    The request.

  Raises:
    RequestError: it is no JSON, or a field is missing, unknown or has a value
      that is not allowed; names the field.
  """
  fields = reading.parse(body)
  reading.check_names(
      fields, read=_READ, neutral=_NEUTRAL, without_effect=("user",)
  )
  seed = reading.whole(fields, "seed", -(2**63), 2**64 - 1)
  return TokenRequest(
      model=reading.text(fields, "model"),
      prompt=_ids(fields, "prompt", 1, _MOST),
      max_tokens=reading.whole(fields, "max_tokens", 1, _MOST) or _LIMIT,
      temperature=reading.temperature(fields),
      seed=None if seed is None else seed % 2**64,
      stop_ids=_ids(fields, "stop_token_ids", 0, MAX_STOP_IDS),
      ignore_eos=reading.flag(fields, "ignore_eos"),
      logprobs="logprobs" in fields,
      return_token_ids=reading.flag(fields, "return_token_ids"),
      names_ids=reading.flag(fields, "return_tokens_as_token_ids"),
  )


def _ids(
    fields: Mapping[str, Any], path: str, least: int, most: int
) -> tuple[int, ...]:
  """A field that is a list of token ids; empty if absent and allowed so."""

  def valid(value: Any) -> bool:
    return (
        isinstance(value, list)
        and least <= len(value) <= most
        and all(type(one) is int and 0 <= one <= _MOST for one in value)
    )

  if least and path not in fields:
    raise RequestError(400, f"{path}: missing", param=path)
  value = fields.get(path, [])
  if not valid(value):
    raise wrong(
        path,
        value,
        f"a list of {least} to {most} token ids; /v1/chat/completions takes"
        " texts",
    )
  return tuple(value)
