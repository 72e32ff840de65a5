"""A policy as one value: sizes, weights, tokenizer, chat format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.tokenizer import Tokenizer

SMOLLM2_SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
QWEN2_5_SYSTEM = (
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
)
QWEN2_SYSTEM = "You are a helpful assistant."
# The last is part of the one before it.
SYSTEMS = (SMOLLM2_SYSTEM, QWEN2_5_SYSTEM, QWEN2_SYSTEM)
# Names of chat formats, and the control tokens by which a model that does not
# say which it speaks is known; what is listed first is tried first.
CHATS: Mapping[str, tuple[str, ...]] = {
    "qwen3": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "qwen2_5": ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3_1": ("<|start_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
}
# Those that nothing in a tokenizer gives away.
SILENT_CHATS = ("compact", "qwen3_direct")


def derive_chat(tokenizer: Tokenizer) -> str | None:
  """Guesses the chat format from the control tokens.

  Qwen 3's `Instruct` models of July 2025 never think, though they have the
  tokens: there, `chatml` has to be said.

  Args:
    tokenizer: of the policy.

  Returns:
    A name; None where no format is known by these tokens.
  """
  special = tokenizer.special_ids
  for name, tokens in CHATS.items():
    if all(token in special for token in tokens):
      return name
  return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """One set of weights with what it takes to talk to it.

  Attributes:
    config: sizes.
    params: weights.
    tokenizer: None where the source of the weights holds none.
    chat: name of the chat format, of `CHATS` or `SILENT_CHATS`, or None
      likewise.
    system: system message where a call has none, of ChatML formats; empty for
      none.
  """

  config: TransformerConfig
  params: Params
  tokenizer: Tokenizer | None
  chat: str | None
  system: str

  def with_critic(self) -> Policy:
    """The same with a critic's head, which begins at 0 and is not saved."""
    head = np.zeros(self.config.embed_dim, np.float32)
    return dataclasses.replace(
        self,
        config=dataclasses.replace(self.config, value_head=True),
        params=dataclasses.replace(self.params, value_head=head),
    )

  def without_critic(self) -> Policy:
    """The same without a critic's head, as it is saved."""
    return dataclasses.replace(
        self,
        config=dataclasses.replace(self.config, value_head=False),
        params=dataclasses.replace(self.params, value_head=None),
    )


def default_system(template: object) -> str:
  """Finds the system message that a chat template gives of itself.

  Templates are programs and are not run; those of SmolLM2, Qwen 2 and 2.5 are
  known.

  Args:
    template: of a GGUF file or `tokenizer_config.json`; None for none.

  Returns:
    The message; empty where the template has none that is known.
  """
  return next((known for known in SYSTEMS if known in str(template)), "")
