"""Small models of every family, and packed rows, for several test files."""

import functools

import jax
import numpy as np

from mgrpo_jax.policy import params
from mgrpo_jax.policy.config import Experts
from mgrpo_jax.policy.rotary import LinearScaling, Llama3Scaling
from mgrpo_jax.testing.sizes import tiny_config

MOE = Experts(number=4, per_token=2, mlp_dim=10, normalised=True)
GEMMA = {
    "qk_norm": True,
    "post_norms": True,
    "activation": "gelu_tanh",
    "embedding_scale": 12**0.5,
    "attention_scale": 20**-0.5,
    "windows": (4, 0),
    "local_rope_base": 10.0,
    "rope_scaling": LinearScaling(factor=8.0),
}
# What each family adds to a Llama, for `config`.
FAMILIES = {
    "llama": {},
    "llama3": {
        "rope_scaling": Llama3Scaling(
            factor=8.0,
            low_frequency=1.0,
            high_frequency=4.0,
            original_context=64,
        )
    },
    "qwen2": {"qkv_bias": True, "tied_embeddings": False, "windows": (0, 5)},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True, "tied_embeddings": False, "experts": MOE},
    "gemma3": GEMMA,
}


def config(**changes):
  """Sizes that hardly repeat, and an epsilon that is felt."""
  odd = dict(
      vocab_size=23,
      embed_dim=12,
      num_heads=4,
      num_kv_heads=2,
      head_dim=6,
      mlp_dim=20,
      rope_base=100.0,
      norm_eps=1e-3,
  )
  return tiny_config(**(odd | changes))


@functools.cache
def weights(cfg, seed=0):
  """Random float32 weights, norms away from 1, made without compiling."""
  rng = np.random.default_rng(seed)

  def draw(spec):
    noise = rng.normal(size=spec.shape).astype(np.float32)
    return 1 + 0.3 * noise if len(spec.shape) == 1 else 0.4 * noise

  return jax.tree.map(draw, params.param_specs(cfg))


def oracle_weights(tree, cfg):
  """The same weights in the flat layout of oracles/transformer.py, float64."""
  heads = (cfg.num_heads, cfg.head_dim)

  def wide(value):
    return None if value is None else np.asarray(value, np.float64)

  def one(layer):
    present = {name: x for name, x in vars(layer).items() if x is not None}
    arrays = {name: wide(value) for name, value in present.items()}
    arrays["query"] = arrays["query"].reshape(cfg.embed_dim, *heads)
    arrays["output"] = arrays["output"].reshape(*heads, cfg.embed_dim)
    if cfg.qkv_bias:
      arrays["query_bias"] = arrays["query_bias"].reshape(heads)
    return arrays

  return {
      "embedding": wide(tree.embedding),
      "final_norm": wide(tree.final_norm),
      "unembedding": wide(tree.unembedding),
      "layers": [one(layer) for layer in tree.layers],
  }


def oracle_model(cfg):
  """What oracles/transformer.py calls a model."""
  scaling = None
  if isinstance(cfg.rope_scaling, LinearScaling):
    scaling = {"kind": "linear", "factor": cfg.rope_scaling.factor}
  elif isinstance(cfg.rope_scaling, Llama3Scaling):
    scaling = {
        "kind": "llama3",
        "factor": cfg.rope_scaling.factor,
        "low": cfg.rope_scaling.low_frequency,
        "high": cfg.rope_scaling.high_frequency,
        "context": cfg.rope_scaling.original_context,
    }
  return {
      "eps": cfg.norm_eps,
      "base": cfg.rope_base,
      "local_base": cfg.local_rope_base,
      "scaling": scaling,
      "attention_scale": cfg.attention_scale,
      "embedding_scale": cfg.embedding_scale,
      "activation": cfg.activation,
      "windows": cfg.windows or (0,) * cfg.num_layers,
      "per_token": cfg.experts and cfg.experts.per_token,
      "normalised": cfg.experts and cfg.experts.normalised,
  }


def packed_rows(rows, length, cfg, seed=0):
  """Lays segments of the given lengths into rows; the rest is padding."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(cfg.vocab_size, size=(len(rows), length), dtype="i4")
  segment_ids = np.zeros((len(rows), length), np.int32)
  positions = np.zeros((len(rows), length), np.int32)
  for n, lengths in enumerate(rows):
    assert sum(lengths) <= length
    start = 0
    for segment, size in enumerate(lengths, 1):
      segment_ids[n, start : start + size] = segment
      positions[n, start : start + size] = np.arange(size)
      start += size
  return tokens, positions, segment_ids
