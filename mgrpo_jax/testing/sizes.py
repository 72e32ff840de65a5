"""A transformer small enough for tests."""

from typing import Any

from mgrpo_jax.policy.config import TransformerConfig


def tiny_config(**changes: Any) -> TransformerConfig:
  """Sizes of a transformer of a few thousand parameters.

  Args:
    **changes: fields that shall have another value.

  Returns:
    The sizes.

  Raises:
    TypeError: there is no such field.
    ValueError: a field is out of range, naming the field.
  """
  sizes: dict[str, Any] = {
      "vocab_size": 61,
      "embed_dim": 16,
      "num_layers": 2,
      "num_heads": 2,
      "num_kv_heads": 1,
      "head_dim": 8,
      "mlp_dim": 24,
      "rope_base": 10_000.0,
      "norm_eps": 1e-5,
      "tied_embeddings": True,
      "dtype": "float32",
  }
  return TransformerConfig(**(sizes | changes))
