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
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.policy import Policy

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
