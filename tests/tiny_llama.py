"""Small Llamas and packed rows that several test files run."""

import functools

import jax
import numpy as np

from mgrpo_jax.policy import params
from mgrpo_jax.testing.sizes import tiny_config


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
    return arrays

  return {
      "embedding": wide(tree.embedding),
      "final_norm": wide(tree.final_norm),
      "unembedding": wide(tree.unembedding),
      "layers": [one(layer) for layer in tree.layers],
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
