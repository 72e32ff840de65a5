"""The sizes of a transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from mgrpo_jax.policy import attention
from mgrpo_jax.policy.rotary import Scaling

DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("silu", "gelu_tanh")
KERNELS = ("trained", "turned", "tiled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
  """A mixture of experts in place of the feed-forward; hashable.

  Attributes:
    number: X, experts of a layer.
    per_token: experts that a token is sent to, at most X.
    mlp_dim: F, width of one expert's gated feed-forward.
    normalised: whether the chosen experts' probabilities are scaled to sum
      to 1.
    dense_layers: layers that keep the plain feed-forward, ascending.

  Raises:
    ValueError: if a field is out of range, naming it.
  """

  number: int
  per_token: int
  mlp_dim: int
  normalised: bool
  dense_layers: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    """Checks every field."""
    for name in ("number", "per_token", "mlp_dim"):
      value = getattr(self, name)
      if not (type(value) is int and value >= 1):
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if self.per_token > self.number:
      raise ValueError(
          f"per_token must be at most number={self.number}, got"
          f" {self.per_token}"
      )
    if list(self.dense_layers) != sorted(set(self.dense_layers)):
      raise ValueError(
          f"dense_layers must be ascending, got {self.dense_layers}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheAttention:
  """How new tokens attend to their streams, in place of block by block.

  Attributes:
    attend: with the signature of `online.attend_streams`.
    check: raises ValueError where an engine cannot use it, saying why; with the
      signature of `paged.check`.
    key_order: of a head's keys in the cache, see `cache.Block`.
    lanes: the width of a head in the cache is a multiple of it.
  """

  attend: Callable[..., Any]
  check: Callable[..., None]
  key_order: Literal["dc", "cd"]
  lanes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """How a transformer is run; changes time and memory, and how sums round.

  Attributes:
    attention: over packed rows; `attention.blockwise`, or a kernel with its
      signature.
    decode_attention: of new tokens to their streams; None: block by block,
      `online.attend_streams`, or a program of its own.
    remat: which intermediate results of a layer the backward pass keeps, a
      policy of `jax.checkpoint_policies`; None keeps all of them.
    scan_layers: whether equal layers run as one loop, which compiles in the
      time of one layer; loops cannot fuse across layers.
    logit_columns: tokens of each row whose logits exist at once, >= 1; the
      backward pass computes them again unless these are all of a row's.
    kernels: how samplers keep them, one of `KERNELS`: as `trained`, `turned`
      or in tiles, see `products`. The latter two are faster on CPUs where few
      tokens meet large kernels; `tiled` is for float32 alone, was the fastest
      where it was measured (AVX2), and needs a compiler of C++.

  Raises:
    ValueError: if logit_columns is out of range, or kernels no such name.
  """

  attention: Callable[..., Any] = attention.blockwise
  decode_attention: CacheAttention | None = None
  remat: Callable[..., Any] | None = None
  scan_layers: bool = False
  logit_columns: int = 64
  kernels: str = "trained"

  def __post_init__(self) -> None:
    """Checks number and name."""
    if self.logit_columns < 1:
      raise ValueError(f"logit_columns must be >= 1, got {self.logit_columns}")
    if self.kernels not in KERNELS:
      raise ValueError(
          f"kernels must be one of {KERNELS}, got {self.kernels!r}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """What a transformer computes; hashable, so static under jit.

  Fields without a default are the sizes of a plain Llama; those with one are
  what other families add to it.

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
    qkv_bias: whether queries, keys and values have biases (Qwen 2).
    qk_norm: whether queries and keys are normed before rotation (Qwen 3).
    post_norms: whether attention and feed-forward are normed once more before
      they are added to the residual stream (Gemma).
    activation: of the gate, `silu` or `gelu_tanh`.
    embedding_scale: embeddings are multiplied by it; sqrt(E) in Gemma.
    attention_scale: queries are multiplied by it; None for D^-1/2.
    windows: tokens that each layer sees, itself included, 0 for all of them;
      empty where every layer sees all.
    local_rope_base: base of the rotary frequencies in layers with a window,
      which are not scaled; None for those of the other layers.
    rope_scaling: of the rotary frequencies, None for none.
    experts: mixture of experts, None for a dense feed-forward.
    value_head: whether a critic's head stands beside the unembedding.
    execution: how it is run.

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
  qkv_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  activation: str = "silu"
  embedding_scale: float = 1.0
  attention_scale: float | None = None
  windows: tuple[int, ...] = ()
  local_rope_base: float | None = None
  rope_scaling: Scaling | None = None
  experts: Experts | None = None
  value_head: bool = False
  execution: Execution = Execution()

  def __post_init__(self) -> None:
    """Checks every field."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == "int" and not (type(value) is int and value >= 1):
        raise ValueError(f"{field.name} must be an integer >= 1, got {value!r}")
      if field.type.startswith("float") and not (
          (value is None and "None" in field.type) or 0 < value < float("inf")
      ):
        raise ValueError(f"{field.name} must be positive, got {value!r}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          f"num_kv_heads must divide num_heads={self.num_heads}, got"
          f" {self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even, got {self.head_dim}")
    for name, allowed in (("dtype", DTYPES), ("activation", ACTIVATIONS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
            f"{name} must be one of {allowed}, got {getattr(self, name)!r}"
        )
    if self.windows and (
        len(self.windows) != self.num_layers
        or not all(type(one) is int and one >= 0 for one in self.windows)
    ):
      raise ValueError(
          f"windows must be {self.num_layers} integers >= 0, one a layer, got"
          f" {self.windows}"
      )
    if self.experts is not None and not all(
        0 <= layer < self.num_layers for layer in self.experts.dense_layers
    ):
      raise ValueError(
          f"experts.dense_layers must be layers in 0..{self.num_layers - 1},"
          f" got {self.experts.dense_layers}"
      )

  @property
  def group_size(self) -> int:
    """G, the number of query heads that share a key and value head."""
    return self.num_heads // self.num_kv_heads

  @property
  def cache_dim(self) -> int:
    """Width of a head in the sampler's cache, which kernels take by lanes."""
    attention = self.execution.decode_attention
    lanes = 1 if attention is None else attention.lanes
    return -(-self.head_dim // lanes) * lanes

  @property
  def cache_dtype(self) -> str:
    """Dtype of the sampler's cache.

    Of activations, but for samplers on CPUs: those turn a whole block into
    float32 and back to write a token of less into it.
    """
    trained = self.execution.kernels == "trained"
    return self.dtype if trained else "float32"

  @property
  def key_order(self) -> Literal["dc", "cd"]:
    """Order of a head's keys in the sampler's cache, see `cache.Block`.

    A TPU's kernel fetches a token as a row, cd. Elsewhere keys are columns, dc,
    which products of few queries read as they stand; a gain measured on CPUs.
    """
    attention = self.execution.decode_attention
    return "dc" if attention is None else attention.key_order

  @property
  def query_scale(self) -> float:
    """What queries are multiplied by."""
    if self.attention_scale is None:
      return self.head_dim**-0.5
    return self.attention_scale

  def window(self, layer: int) -> int:
    """Says how many tokens a layer sees.

    Args:
      layer: its number.

    Returns:
      The window, itself included; 0 where it sees all.
    """
    return self.windows[layer] if self.windows else 0

  @property
  def shares_nothing(self) -> str:
    """Why segments of a row cannot see a prefix; empty where they can."""
    if any(self.windows):
      return "its layers have windows, which count tokens of a row"
    if self.execution.attention is not attention.blockwise:
      return "its attention is not blockwise"
    return ""

  @property
  def period(self) -> int:
    """Layers after which the kinds of layer repeat, L where they do not."""
    kinds = [
        (self.window(layer), self.is_sparse(layer))
        for layer in range(self.num_layers)
    ]
    return next(
        size
        for size in range(1, len(kinds) + 1)
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds))
    )

  def is_sparse(self, layer: int) -> bool:
    """Says whether a layer's feed-forward is a mixture of experts.

    Args:
      layer: its number.

    Returns:
      False where it is dense.
    """
    experts = self.experts
    return experts is not None and layer not in experts.dense_layers
