"""A completion as /v1/completions is asked for it, and what it answers.

Pure functions. The prompt goes out as token ids; sampled ids and their
log-probabilities are taken as they come back, never from text. An answer that
does not add up is refused whole: nobody would see that it was trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import stream
from mgrpo_jax.types import Completion

# What would bend the distribution, or end a completion early, if a server had
# defaults of its own for it.
_PLAIN: Mapping[str, Any] = {
    "n": 1,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,  # only the stop tokens asked for end it
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
_UNFILTERED: Mapping[str, float] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
_LARGEST = float(np.finfo(np.float32).max)
_ROUNDING = 1e-3  # nats by which a logarithm of at most 1 may exceed 0


class AnswerError(ValueError):
  """An answer does not say what was sampled; the text says why."""


class AbortedError(AnswerError):
  """The server gave the request up; it may be asked again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A completion that a server is asked for.

  Attributes:
    tokens: ids, the whole stream.
    sampling: temperature and stop tokens.
    seed: 0 to 2^64 - 1.
    limit: tokens that may be sampled, at least 1.
  """

  tokens: tuple[int, ...]
  sampling: Sampling
  seed: int
  limit: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What was sampled; n tokens.

  Attributes:
    tokens: [n] int32.
    logprobs: [n] float32, nats.
    stopped: whether the last token is a stop token.
    versions: oldest and newest version of the weights that sampled a token;
      None where the server does not say.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  stopped: bool
  versions: tuple[int, int] | None


def body(question: Question, model: str, *, top: int = 0) -> dict[str, Any]:
  """Writes the body of a request.

  Args:
    question: what is asked.
    model: its name at the server.
    top: likeliest tokens whose log-probabilities are wanted, too.

  Returns:
    JSON. The seed is written as a signed number of 64 bits.

  Raises:
    ValueError: a field of `sampling` would filter tokens, naming it.
  """
  seed, sampling = question.seed, question.sampling
  for name, neutral in _UNFILTERED.items():
    if getattr(sampling, name) != neutral:
      raise ValueError(
          f"{name} must be {neutral}, for a server's log-probabilities may be"
          f" of the whole distribution, got {getattr(sampling, name)!r}"
      )
  return {
      **_PLAIN,
      "model": model,
      "prompt": list(question.tokens),
      "max_tokens": question.limit,
      "temperature": question.sampling.temperature,
      "stop_token_ids": list(question.sampling.stop_ids),
      "seed": seed - 2**64 if seed >= 2**63 else seed,
      "logprobs": top,
  }


def read(
    answer: Any, question: Question, *, vocab_size: int, newest: int
) -> Answer:
  """Reads what was sampled.

  Args:
    answer: JSON.
    question: that it answers.
    vocab_size: of the policy.
    newest: version that can have sampled it.

  Returns:
    The tokens as they are.

  Raises:
    AbortedError: the server gave up before the end.
    AnswerError: it cannot be what was sampled; says what is wrong and, where
      that is known, what the server must be told.
  """
  choice = _only_choice(answer)
  if choice.get("finish_reason") == "abort":
    raise AbortedError("finish_reason is 'abort'")
  prompt = choice.get("prompt_token_ids")
  if prompt is not None and prompt != list(question.tokens):
    raise AnswerError("prompt_token_ids are not the ids that were sent")
  tokens = _tokens(choice, question, vocab_size)
  return Answer(
      tokens=np.asarray(tokens, np.int32),
      logprobs=_logprobs(choice, len(tokens)),
      stopped=_stopped(choice.get("finish_reason"), tokens, question),
      versions=_versions(choice, newest),
  )


def completion(
    answer: Answer | None,
    length: int,
    *,
    context: int,
    versions: tuple[int, int],
) -> Completion:
  """Makes an answer a completion; without one, an empty one.

  Args:
    answer: what was sampled.
    length: of the stream before.
    context: tokens that a stream can have.
    versions: oldest and newest of the weights, where the server has no word.

  Returns:
    The completion.
  """
  nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
  tokens, logprobs = (answer.tokens, answer.logprobs) if answer else nothing
  oldest, newest = (answer and answer.versions) or versions
  return Completion(
      tokens=tokens,
      logprobs=logprobs,
      raw_logprobs=None,
      finish=stream.finish(
          length + len(tokens),
          stopped=answer is not None and answer.stopped,
          context=context,
      ),
      version_min=oldest,
      version_max=newest,
  )


def top_logprob(answer: Any) -> float:
  """Reads the log-probability of the likeliest first token.

  Args:
    answer: JSON, to a body with `top=1`.

  Returns:
    Nats.

  Raises:
    AnswerError: there is none.
  """
  logprobs = _only_choice(answer).get("logprobs")
  top = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
  first = top[0] if isinstance(top, list) and top else None
  values = list(first.values()) if isinstance(first, dict) else []
  if not values or not all(_is_finite(value) for value in values):
    raise AnswerError("logprobs.top_logprobs has no log-probabilities")
  return max(map(float, values))


def _only_choice(answer: Any) -> dict[str, Any]:
  """The one choice of an answer."""
  choices = answer.get("choices") if isinstance(answer, dict) else None
  if not isinstance(choices, list) or len(choices) != 1:
    raise AnswerError("choices must be a list of one")
  if not isinstance(choices[0], dict):
    raise AnswerError("choices[0] must be an object")
  return choices[0]


def _tokens(
    choice: Mapping[str, Any], question: Question, vocab_size: int
) -> list[int]:
  """The sampled ids."""
  tokens = choice.get("token_ids")
  if tokens is None:
    raise AnswerError(
        "it has text but no token_ids, and text is never tokenised again; the"
        " server must know return_token_ids (vLLM does, and experiments.serve)"
    )
  if not isinstance(tokens, list) or not 1 <= len(tokens) <= question.limit:
    raise AnswerError(f"token_ids must be a list of 1 to {question.limit} ids")
  wrong = [t for t in tokens if type(t) is not int or not 0 <= t < vocab_size]
  if wrong:
    raise AnswerError(
        f"token_ids has {wrong[0]!r}, must be in 0..{vocab_size - 1}; does the"
        " server have another model?"
    )
  return tokens


def _logprobs(choice: Mapping[str, Any], count: int) -> np.ndarray:
  """Log-probabilities of the sampled ids."""
  logprobs = choice.get("logprobs")
  found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
  if not isinstance(found, list) or len(found) != count:
    said = len(found) if isinstance(found, list) else "none"
    raise AnswerError(
        f"logprobs.token_logprobs must be {count} numbers, one a token, are"
        f" {said}"
    )
  for value in found:
    if not _is_finite(value) or value > _ROUNDING:
      raise AnswerError(
          f"logprobs.token_logprobs has {value!r}, must be finite and <= 0"
      )
  return np.asarray(found, np.float32)


def _stopped(finish: Any, tokens: Sequence[int], question: Question) -> bool:
  """Whether a stop token ended it; raises where the reason is not true."""
  stops = question.sampling.stop_ids
  if finish not in ("stop", "length"):
    raise AnswerError(
        f"finish_reason is {finish!r}, must be 'stop' or 'length'"
    )
  if any(token in stops for token in tokens[:-1]):
    raise AnswerError("token_ids go on behind a stop token")
  if (tokens[-1] in stops) != (finish == "stop"):
    raise AnswerError(
        f"finish_reason is {finish!r} and the last token {tokens[-1]}, while"
        f" the stop tokens are {list(stops)}; a server's own stop tokens must"
        " be off (vllm serve --generation-config vllm)"
    )
  if finish == "length" and len(tokens) != question.limit:
    raise AnswerError(
        f"finish_reason is 'length' after {len(tokens)} of {question.limit}"
        " tokens"
    )
  return finish == "stop"


def _versions(choice: Mapping[str, Any], newest: int) -> tuple[int, int] | None:
  """The versions of the weights, where the server says them."""
  found = choice.get("policy_versions")
  if found is None:
    return None
  if (
      not isinstance(found, list)
      or len(found) != 2
      or any(type(number) is not int for number in found)
      or not 0 <= found[0] <= found[1] <= newest
  ):
    raise AnswerError(
        f"policy_versions is {str(found)[:80]}, must be the oldest and the"
        f" newest, in 0..{newest}"
    )
  return found[0], found[1]


def _is_finite(value: Any) -> bool:
  """Whether a JSON value is a finite number as float32, too."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number and -_LARGEST <= value <= _LARGEST
