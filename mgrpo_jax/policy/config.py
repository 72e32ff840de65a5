"""The sizes of a transformer."""

from __future__ import annotations

import dataclasses

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Sizes of a Llama-family transformer; hashable, so static under jit.

  Attributes:
    vocab_size: V, number of token ids.
    embed_dim: E, width of the residual stream.
    num_layers: L.
    num_heads: H, query heads.
    num_kv_heads: key and value heads; divides num_heads.
    head_dim: D, width of a head; even, because rotations act on pairs.
    mlp_dim: F, width of the gated feed-forward.
    rope_base: base of the rotary frequencies (`rope_theta`).
    norm_eps: added to the mean square in RMSNorm.
    tied_embeddings: whether the unembedding is the embedding transposed.
    dtype: of activations, `float32` or `bfloat16`; parameters are float32.

  Raises:
    ValueError: if a field is out of range, naming the field.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  rope_base: float
  norm_eps: float
  tied_embeddings: bool
  dtype: str

  def __post_init__(self) -> None:
    """Checks every field."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == "int" and not (type(value) is int and value >= 1):
        raise ValueError(f"{field.name} must be an integer >= 1, got {value!r}")
      if field.type == "float" and not 0 < value < float("inf"):
        raise ValueError(f"{field.name} must be positive, got {value!r}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          f"num_kv_heads must divide num_heads={self.num_heads}, got"
          f" {self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even, got {self.head_dim}")
    if self.dtype not in DTYPES:
      raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")

  @property
  def group_size(self) -> int:
    """G, the number of query heads that share a key and value head."""
    return self.num_heads // self.num_kv_heads
