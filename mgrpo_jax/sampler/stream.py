"""A stream of tokens: as a caller hands it in, checked, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np


def checked(
    tokens: Sequence[int], *, context: int, vocab_size: int
) -> np.ndarray:
  """Turns a stream into an array, or says what is wrong with it.

  Args:
    tokens: the whole stream.
    context: tokens that a stream can have.
    vocab_size: of the policy.

  Returns:
    [n] int32, a copy: the caller's may grow.

  Raises:
    ValueError: it is empty, too long, or has ids that the policy lacks.
  """
  stream = np.array(tokens, np.int64)
  if stream.ndim != 1 or not 1 <= len(stream) <= context:
    raise ValueError(
        f"tokens must be a sequence of 1 to {context} ids (context), got shape"
        f" {stream.shape}"
    )
  if stream.min() < 0 or stream.max() >= vocab_size:
    raise ValueError(
        f"tokens must be ids in 0..{vocab_size - 1}, got"
        f" {stream.min()}..{stream.max()}"
    )
  return stream.astype(np.int32)


def finish(
    length: int, *, stopped: bool, context: int
) -> Literal["stop", "length", "context"]:
  """Says why a completion ended.

  Args:
    length: tokens of the whole stream, the completion's included.
    stopped: whether a stop token or the caller ended it.
    context: tokens that a stream can have.

  Returns:
    As `types.Completion` has it.
  """
  if stopped:
    return "stop"
  return "context" if length == context else "length"
