"""A completion as a sampler of a policy is asked for it, and what it answers.

    question    {"version", "digest", "tokens": [id, …], "seed", "session",
                 "sampling": {temperature, max_new_tokens, stop_ids, …}}
    answer      {"tokens": [id, …], "logprobs": [nats, …], "raw_logprobs": […],
                 "finish", "versions": [oldest, newest]}

Pure functions. A float32 crosses as the same number: JSON's are float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.serving import reading
from mgrpo_jax.serving.errors import RequestError, wrong
from mgrpo_jax.types import Completion

_FIELDS = ("version", "digest", "tokens", "seed", "session", "sampling")
_MOST = 2**31 - 1
_LARGEST = float(np.finfo(np.float32).max)
_FINISHES = ("stop", "length", "context")


class AnswerError(ValueError):
  """An answer does not say what was sampled; the text says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A completion that is asked for.

  Attributes:
    version: number of the weights to sample from.
    digest: of these weights, as they were published.
    tokens: ids, the whole stream, at least one.
    seed: 0 to 2^64 - 1.
    session: names the stream that later questions extend; empty for none.
    sampling: temperature, filters, budget, stop tokens.
  """

  version: int
  digest: str
  tokens: tuple[int, ...]
  seed: int
  session: str
  sampling: Sampling


def write_question(question: Question) -> dict[str, Any]:
  """A question as JSON values."""
  return dataclasses.asdict(question)


def read_question(body: bytes) -> Question:
  """Reads and checks what is asked.

  Args:
    body: JSON.

  Returns:
    The question; ids may be beyond the policy's.

  Raises:
    RequestError: it is none, naming the field.
  """
  fields = reading.parse(body)
  reading.check_names(fields, read=_FIELDS, neutral={})
  tokens = fields.get("tokens")
  if not (isinstance(tokens, list) and tokens and all(map(_is_id, tokens))):
    raise wrong("tokens", tokens, "a list of token ids, at least one")
  return Question(
      version=_whole(fields, "version", _MOST),
      seed=_whole(fields, "seed", 2**64 - 1),
      tokens=tuple(tokens),
      digest=reading.text(fields, "digest"),
      session=reading.text(fields, "session"),
      sampling=_sampling(reading.mapping(fields, "sampling")),
  )


def read_session(body: bytes) -> str:
  """Reads which session is over.

  Args:
    body: JSON, `{"session": name}`.

  Returns:
    Its name.

  Raises:
    RequestError: it is none.
  """
  fields = reading.parse(body)
  reading.check_names(fields, read=("session",), neutral={})
  return reading.text(fields, "session")


def read_version(body: bytes) -> tuple[int, str]:
  """Reads which weights are to be followed.

  Args:
    body: JSON, `{"version": number, "digest": text}`.

  Returns:
    Number and digest.

  Raises:
    RequestError: they are none.
  """
  fields = reading.parse(body)
  reading.check_names(fields, read=("version", "digest"), neutral={})
  return _whole(fields, "version", _MOST), reading.text(fields, "digest")


def write_answer(completion: Completion) -> dict[str, Any]:
  """A completion as JSON values."""
  raw = completion.raw_logprobs
  return {
      "tokens": completion.tokens.tolist(),
      "logprobs": completion.logprobs.tolist(),
      "raw_logprobs": None if raw is None else raw.tolist(),
      "finish": completion.finish,
      "versions": [completion.version_min, completion.version_max],
  }


def read_answer(
    answer: Any, question: Question, *, newest: int, vocab_size: int
) -> Completion:
  """Reads what was sampled.

  Args:
    answer: JSON values.
    question: that it answers.
    newest: version that can have sampled it.
    vocab_size: of the policy.

  Returns:
    The completion.

  Raises:
    AnswerError: it cannot be what was sampled.
  """
  if not isinstance(answer, dict):
    raise AnswerError("is no object")
  tokens, finish = answer.get("tokens"), answer.get("finish")
  limit = question.sampling.max_new_tokens
  if not isinstance(tokens, list) or len(tokens) > limit:
    raise AnswerError(f"tokens must be a list of at most {limit} ids")
  if not all(_is_id(t) and t < vocab_size for t in tokens):
    raise AnswerError(f"tokens must be ids below {vocab_size}")
  if finish not in _FINISHES:
    raise AnswerError(f"finish is impossible: {str(finish)[:80]!r}")
  oldest, last = _versions(answer, question.version, newest)
  return Completion(
      tokens=np.asarray(tokens, np.int32),
      logprobs=_floats(answer, "logprobs", len(tokens)),
      raw_logprobs=_floats(answer, "raw_logprobs", len(tokens)),
      finish=finish,
      version_min=oldest,
      version_max=last,
  )


def _sampling(fields: Mapping[str, Any]) -> Sampling:
  """How it is drawn."""
  known = {field.name for field in dataclasses.fields(Sampling)}
  stops = fields.get("stop_ids")
  numbers = {name: fields[name] for name in fields.keys() - {"stop_ids"}}
  if fields.keys() != known:
    raise wrong("sampling", sorted(fields), f"the fields {sorted(known)}")
  if not (isinstance(stops, list) and all(map(_is_id, stops))):
    raise wrong("sampling.stop_ids", stops, "a list of token ids")
  for name, value in numbers.items():
    if type(value) not in (int, float):
      raise wrong(f"sampling.{name}", value, "a number")
  for name in ("max_new_tokens", "top_k"):
    if type(numbers[name]) is not int:
      raise wrong(f"sampling.{name}", numbers[name], "a whole number")
  try:
    return Sampling(stop_ids=tuple(stops), **numbers)
  except ValueError as error:
    raise RequestError(400, f"sampling: {error}", param="sampling") from error


def _whole(fields: Mapping[str, Any], name: str, high: int) -> int:
  """A field that must be there, a whole number."""
  number = reading.whole(fields, name, 0, high)
  if number is None:
    raise wrong(name, None, f"whole numbers from 0 to {high}")
  return number


def _versions(
    answer: Mapping[str, Any], asked: int, newest: int
) -> tuple[int, int]:
  """Oldest and newest version of the weights that sampled a token."""
  found = answer.get("versions")
  if not isinstance(found, list) or [type(n) for n in found] != [int, int]:
    raise AnswerError("versions must be the oldest and the newest")
  if not asked <= found[0] <= found[1] <= newest:
    raise AnswerError(
        f"versions are {found[0]} to {found[1]}, must be {asked} to {newest}"
    )
  return found[0], found[1]


def _floats(answer: Mapping[str, Any], name: str, count: int) -> np.ndarray:
  """A number for each token."""
  found = answer.get(name)
  if not isinstance(found, list) or len(found) != count:
    raise AnswerError(f"{name} must be {count} numbers, one a token")
  if not all(type(n) in (int, float) and abs(n) <= _LARGEST for n in found):
    raise AnswerError(f"{name} must be finite numbers, as float32")
  return np.asarray(found, np.float32)


def _is_id(value: Any) -> bool:
  """Whether a value can be a token id."""
  return type(value) is int and 0 <= value <= _MOST
