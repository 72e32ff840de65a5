"""A policy: a configuration, a pytree of parameters, pure functions."""

from mgrpo_jax.policy import (
    config,
    decode,
    logprobs,
    params,
    sampling,
    tokenizer,
    transformer,
)
from mgrpo_jax.policy.config import Policy, TransformerConfig
from mgrpo_jax.policy.load import load

__all__ = [
    "Policy",
    "TransformerConfig",
    "config",
    "decode",
    "load",
    "logprobs",
    "params",
    "sampling",
    "tokenizer",
    "transformer",
]
