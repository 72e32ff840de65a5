"""Transformers in plain NumPy, one token, one head, one expert at a time.

Written from the papers: RMSNorm 1910.07467, RoPE 2104.09864, its linear
scaling 2306.15595 and Llama 3's (Meta's reference code), GQA 2305.13245, SwiGLU
2002.05202, GELU 1606.08415, query-key norm 2302.05442, sliding windows
2004.05150, mixtures of experts 1701.06538, Qwen 3 2505.09388, Gemma 3
2503.19786.

Weights come as a dictionary of arrays:
  embedding [V, E], final_norm [E], unembedding [E, V] or None, and `layers`,
  dictionaries of attention_norm [E], query [E, H, D], key [E, Hkv, D],
  value [E, Hkv, D], output [H, D, E], mlp_norm [E], gate [E, F], up [E, F],
  down [F, E]; query head h uses key head h // (H / Hkv). A layer may also have
  query_bias [H, D], key_bias and value_bias [Hkv, D], query_norm and key_norm
  [D], attention_post_norm and mlp_post_norm [E]; and with a router [E, X],
  gate, up and down have a leading axis of X.
A model is a dictionary of eps, base, local_base, scaling, attention_scale,
embedding_scale, activation, windows, per_token, normalised.
Everything is float64. Nothing here knows of packing: a row is cut into its
segments, and each runs alone.
"""

import numpy as np


def rms_norm(x, scale, eps):
  return scale * x / np.sqrt(np.mean(x**2) + eps)


def frequencies(dim, base, scaling):
  """Radians a token; scaling is None or a dictionary with a factor."""
  plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
  if scaling is None:
    return plain
  if scaling["kind"] == "linear":
    return [one / scaling["factor"] for one in plain]
  scaled = []
  for one in plain:
    wavelength = 2 * np.pi / one
    low_wavelength = scaling["context"] / scaling["low"]
    high_wavelength = scaling["context"] / scaling["high"]
    if wavelength < high_wavelength:
      scaled.append(one)
    elif wavelength > low_wavelength:
      scaled.append(one / scaling["factor"])
    else:
      smooth = (scaling["context"] / wavelength - scaling["low"]) / (
          scaling["high"] - scaling["low"]
      )
      scaled.append((1 - smooth) * one / scaling["factor"] + smooth * one)
  return scaled


def rotated(vector, position, radians):
  half = len(vector) // 2
  out = np.empty(len(vector))
  for i in range(half):
    angle = position * radians[i]
    a, b = vector[i], vector[i + half]
    out[i] = a * np.cos(angle) - b * np.sin(angle)
    out[i + half] = a * np.sin(angle) + b * np.cos(angle)
  return out


def softmax(scores):
  weights = np.exp(scores - np.max(scores))
  return weights / weights.sum()


def attention(queries, keys, values, scale=None, window=0):
  """[T, H, D], [T, Hkv, D], [T, Hkv, D] -> [T, H, D], causal."""
  length, heads, dim = queries.shape
  scale = 1 / np.sqrt(dim) if scale is None else scale
  share = heads // keys.shape[1]
  out = np.zeros((length, heads, dim))
  for t in range(length):
    first = max(0, t + 1 - window) if window else 0
    for h in range(heads):
      past = keys[first : t + 1, h // share]
      weights = softmax(past @ queries[t, h] * scale)
      out[t, h] = weights @ values[first : t + 1, h // share]
  return out


def silu(x):
  return x / (1 + np.exp(-x))


def gelu_tanh(x):
  inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def feed_forward(y, gate, up, down, activation):
  return (ACTIVATIONS[activation](y @ gate) * (y @ up)) @ down


def mixture(y, weights, model):
  """A token's likeliest experts, each counted by its probability."""
  probabilities = softmax(y @ weights["router"])
  ranking = np.argsort(-probabilities, kind="stable")
  chosen = ranking[: model["per_token"]]
  whole = probabilities[chosen].sum() if model["normalised"] else 1.0
  out = np.zeros_like(y)
  for expert in chosen:
    kernels = [weights[name][expert] for name in ("gate", "up", "down")]
    said = feed_forward(y, *kernels, model["activation"])
    out = out + probabilities[expert] / whole * said
  return out


def heads_of(normed, weights, name):
  projected = np.einsum("te,ehd->thd", normed, weights[name])
  return projected + weights.get(f"{name}_bias", 0.0)


def turned(heads, norm, positions, radians, eps):
  """Normed where there is a norm, then rotated, head by head."""
  out = np.empty_like(heads)
  for t, position in enumerate(positions):
    for h, head in enumerate(heads[t]):
      head = head if norm is None else rms_norm(head, norm, eps)
      out[t, h] = rotated(head, position, radians)
  return out


def layer(weights, stream, positions, number, model):
  """One layer on one segment, [T, E] -> [T, E]."""
  eps, window = model["eps"], model["windows"][number]
  dim = weights["query"].shape[-1]
  if window and model["local_base"] is not None:
    radians = frequencies(dim, model["local_base"], None)
  else:
    radians = frequencies(dim, model["base"], model["scaling"])
  normed = [rms_norm(x, weights["attention_norm"], eps) for x in stream]
  query, key, value = (
      heads_of(np.stack(normed), weights, name)
      for name in ("query", "key", "value")
  )
  attended = attention(
      turned(query, weights.get("query_norm"), positions, radians, eps),
      turned(key, weights.get("key_norm"), positions, radians, eps),
      value,
      model["attention_scale"],
      window,
  )
  after = []
  for x, token in zip(stream, attended, strict=True):
    added = np.einsum("hd,hde->e", token, weights["output"])
    if "attention_post_norm" in weights:
      added = rms_norm(added, weights["attention_post_norm"], eps)
    x = x + added
    y = rms_norm(x, weights["mlp_norm"], eps)
    if "router" in weights:
      added = mixture(y, weights, model)
    else:
      kernels = [weights[name] for name in ("gate", "up", "down")]
      added = feed_forward(y, *kernels, model["activation"])
    if "mlp_post_norm" in weights:
      added = rms_norm(added, weights["mlp_post_norm"], eps)
    after.append(x + added)
  return np.stack(after)


def segment_logits(weights, tokens, positions, model):
  """Logits [T, V] of one segment that runs alone."""
  rows = [weights["embedding"][token] for token in tokens]
  stream = model["embedding_scale"] * np.stack(rows)
  for number, one in enumerate(weights["layers"]):
    stream = layer(one, stream, positions, number, model)
  head = weights["unembedding"]
  head = weights["embedding"].T if head is None else head
  return np.stack(
      [rms_norm(x, weights["final_norm"], model["eps"]) @ head for x in stream]
  )


def packed_logits(weights, tokens, positions, segment_ids, model):
  """Logits [N, T, V]; NaN on padding, where nothing is promised."""
  vocab = weights["embedding"].shape[0]
  out = np.full((*tokens.shape, vocab), np.nan)
  for n, ids in enumerate(segment_ids):
    for segment in set(ids.tolist()) - {0}:
      (where,) = np.nonzero(ids == segment)
      out[n, where] = segment_logits(
          weights, tokens[n, where], positions[n, where], model
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
