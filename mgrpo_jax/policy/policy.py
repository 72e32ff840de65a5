"""A policy as one value: sizes, weights, tokenizer, chat format."""

from __future__ import annotations

import dataclasses

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """One set of weights with what it takes to talk to it.

  Attributes:
    config: sizes.
    params: weights.
    tokenizer: None where the source of the weights holds none.
    chat: name of the chat format (`compact`, `chatml`), or None likewise.
  """

  config: TransformerConfig
  params: Params
  tokenizer: Tokenizer | None
  chat: str | None
