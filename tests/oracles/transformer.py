"""A Llama transformer in plain NumPy, one token, one head at a time.

Written from the papers (RMSNorm 1910.07467, RoPE 2104.09864, GQA 2305.13245,
SwiGLU 2002.05202). Weights come as a dictionary of arrays:
  embedding [V, E], final_norm [E], unembedding [E, V] or None, and `layers`,
  dictionaries of attention_norm [E], query [E, H, D], key [E, Hkv, D],
  value [E, Hkv, D], output [H, D, E], mlp_norm [E], gate [E, F], up [E, F],
  down [F, E]; query head h uses key head h // (H / Hkv).
Everything is float64. Nothing here knows of packing: a row is cut into its
segments, and each runs alone.
"""

import numpy as np


def rms_norm(x, scale, eps):
  return scale * x / np.sqrt(np.mean(x**2) + eps)


def rotated(vector, position, base):
  dim = len(vector)
  out = np.empty(dim)
  for i in range(dim // 2):
    angle = position * base ** (-2 * i / dim)
    a, b = vector[i], vector[i + dim // 2]
    out[i] = a * np.cos(angle) - b * np.sin(angle)
    out[i + dim // 2] = a * np.sin(angle) + b * np.cos(angle)
  return out


def softmax(scores):
  weights = np.exp(scores - np.max(scores))
  return weights / weights.sum()


def attention(queries, keys, values):
  """[T, H, D], [T, Hkv, D], [T, Hkv, D] -> [T, H, D], causal."""
  length, heads, dim = queries.shape
  share = heads // keys.shape[1]
  out = np.zeros((length, heads, dim))
  for t in range(length):
    for h in range(heads):
      past = keys[: t + 1, h // share]
      weights = softmax(past @ queries[t, h] / np.sqrt(dim))
      out[t, h] = weights @ values[: t + 1, h // share]
  return out


def layer(weights, stream, positions, base, eps):
  """One layer on one segment, [T, E] -> [T, E]."""
  normed = [rms_norm(x, weights["attention_norm"], eps) for x in stream]

  def heads(kernel, rotate):
    projected = [np.einsum("e,ehd->hd", x, kernel) for x in normed]
    if rotate:
      projected = [
          np.stack([rotated(head, p, base) for head in token])
          for token, p in zip(projected, positions, strict=True)
      ]
    return np.stack(projected)

  attended = attention(
      heads(weights["query"], True),
      heads(weights["key"], True),
      heads(weights["value"], False),
  )
  after = []
  for x, token in zip(stream, attended, strict=True):
    x = x + np.einsum("hd,hde->e", token, weights["output"])
    y = rms_norm(x, weights["mlp_norm"], eps)
    gate = y @ weights["gate"]
    silu = gate / (1 + np.exp(-gate))
    after.append(x + (silu * (y @ weights["up"])) @ weights["down"])
  return np.stack(after)


def segment_logits(weights, tokens, positions, base, eps):
  """Logits [T, V] of one segment that runs alone."""
  stream = np.stack([weights["embedding"][token] for token in tokens])
  for one in weights["layers"]:
    stream = layer(one, stream, positions, base, eps)
  head = weights["unembedding"]
  head = weights["embedding"].T if head is None else head
  return np.stack(
      [rms_norm(x, weights["final_norm"], eps) @ head for x in stream]
  )


def packed_logits(weights, tokens, positions, segment_ids, base, eps):
  """Logits [N, T, V]; NaN on padding, where nothing is promised."""
  vocab = weights["embedding"].shape[0]
  out = np.full((*tokens.shape, vocab), np.nan)
  for n, ids in enumerate(segment_ids):
    for segment in set(ids.tolist()) - {0}:
      (where,) = np.nonzero(ids == segment)
      out[n, where] = segment_logits(
          weights, tokens[n, where], positions[n, where], base, eps
      )
  return out


def token_logprobs(logits, tokens, segment_ids, temperature):
  """Log-probability and entropy of each token given its segment's past."""
  logprobs = np.zeros(tokens.shape)
  entropies = np.zeros(tokens.shape)
  for n in range(tokens.shape[0]):
    for t in range(1, tokens.shape[1]):
      if segment_ids[n, t] == 0 or segment_ids[n, t] != segment_ids[n, t - 1]:
        continue
      p = softmax(logits[n, t - 1] / temperature)
      logprobs[n, t] = np.log(p[tokens[n, t]])
      entropies[n, t] = -np.sum(p * np.log(p))
  return logprobs, entropies
