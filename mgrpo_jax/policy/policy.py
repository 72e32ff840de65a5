"""A policy as one value: sizes, weights, tokenizer, chat format."""

from __future__ import annotations

import dataclasses

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.tokenizer import Tokenizer

SMOLLM2_SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """One set of weights with what it takes to talk to it.

  Attributes:
    config: sizes.
    params: weights.
    tokenizer: None where the source of the weights holds none.
    chat: name of the chat format (`compact`, `chatml`), or None likewise.
    system: system message where a call has none; empty for none.
  """

  config: TransformerConfig
  params: Params
  tokenizer: Tokenizer | None
  chat: str | None
  system: str


def default_system(template: object) -> str:
  """Finds the system message that a chat template gives of itself.

  Templates are programs and are not run; only SmolLM2's message is known.

  Args:
    template: of a GGUF file or `tokenizer_config.json`; None for none.

  Returns:
    The message; empty where the template has none that is known.
  """
  return SMOLLM2_SYSTEM if SMOLLM2_SYSTEM in str(template) else ""
