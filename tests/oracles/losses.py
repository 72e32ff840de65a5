"""The objective written from the paper (Eq. 14–19), token by token."""

import math

import numpy as np


def _sampled(mask, n):
  return [t for t in range(mask.shape[1]) if mask[n, t] > 0]


def _broadcast(ratios, mask):
  return np.repeat(np.array(ratios)[:, None], mask.shape[1], axis=1)


def token_ratio(logprobs, old, mask):
  ratio = np.ones(mask.shape)
  for n in range(mask.shape[0]):
    for t in _sampled(mask, n):
      ratio[n, t] = math.exp(logprobs[n, t]) / math.exp(old[n, t])
  return ratio


def sequence_ratio(logprobs, old, mask):
  each = token_ratio(logprobs, old, mask)
  return _broadcast([math.prod(row) for row in each], mask)


def geometric_ratio(logprobs, old, mask):
  whole = sequence_ratio(logprobs, old, mask)[:, 0]
  lengths = [max(len(_sampled(mask, n)), 1) for n in range(len(mask))]
  return _broadcast(
      [r ** (1 / n) for r, n in zip(whole, lengths, strict=True)], mask
  )


def clipped_surrogate(ratio, advantages, *, clip_low, clip_high):
  result = np.empty(ratio.shape)
  for place in np.ndindex(ratio.shape):
    rho, gain = ratio[place], advantages[place]
    clipped = min(max(rho, 1 - clip_low), 1 + clip_high)
    result[place] = min(rho * gain, clipped * gain)
  return result


def kl_k1(logprobs, ref):
  return np.log(np.exp(logprobs) / np.exp(ref))


def kl_k2(logprobs, ref):
  return np.log(np.exp(ref) / np.exp(logprobs)) ** 2 / 2


def kl_k3(logprobs, ref):
  ratio = np.exp(ref) / np.exp(logprobs)
  return ratio - 1 - np.log(ratio)


def _token_sum(values, mask, n):
  return sum(values[n, t] for t in _sampled(mask, n))


def _trajectory_mean(per_trajectory, weight):
  total = sum(weight)
  if total == 0:
    return 0.0
  return sum(w * v for w, v in zip(weight, per_trajectory, strict=True)) / total


def token_mean(values, mask, weight):
  rows = range(len(weight))
  count = sum(weight[n] * len(_sampled(mask, n)) for n in rows)
  if count == 0:
    return 0.0
  return sum(weight[n] * _token_sum(values, mask, n) for n in rows) / count


def sequence_mean_token_mean(values, mask, weight):
  means = [
      _token_sum(values, mask, n) / max(len(_sampled(mask, n)), 1)
      for n in range(len(weight))
  ]
  return _trajectory_mean(means, weight)


def sequence_mean_token_sum(values, mask, weight):
  sums = [_token_sum(values, mask, n) for n in range(len(weight))]
  return _trajectory_mean(sums, weight)


def sequence_mean_token_sum_norm(values, mask, weight, *, max_tokens):
  return sequence_mean_token_sum(values, mask, weight) / max_tokens


def dual_clipped_surrogate(ratio, advantages, *, floor, **clip):
  result = clipped_surrogate(ratio, advantages, **clip)
  for place in np.ndindex(ratio.shape):
    if advantages[place] < 0:
      result[place] = max(result[place], floor * advantages[place])
  return result


def cispo_surrogate(ratio, advantages, *, clip_low, clip_high):
  result = np.empty(ratio.shape)
  for place in np.ndindex(ratio.shape):
    weight = min(max(ratio[place], 1 - clip_low), 1 + clip_high)
    result[place] = weight * advantages[place]
  return result


def generalised_advantages(rewards, values, mask, *, discount, trace):
  """As the sum of all later errors (arXiv 1506.02438, Eq. 16)."""
  result = np.zeros(mask.shape)
  for n in range(len(mask)):
    tokens = _sampled(mask, n)
    worth = [values[n, t] for t in tokens] + [0.0]
    earned = [0.0] * (len(tokens) - 1) + [rewards[n]]
    errors = [
        earned[i] + discount * worth[i + 1] - worth[i]
        for i in range(len(tokens))
    ]
    for i, t in enumerate(tokens):
      result[n, t] = sum(
          (discount * trace) ** j * error for j, error in enumerate(errors[i:])
      )
  return result


def clipped_value_loss(values, old, returns, *, clip):
  result = np.empty(values.shape)
  for place in np.ndindex(values.shape):
    near = min(max(values[place], old[place] - clip), old[place] + clip)
    result[place] = 0.5 * max(
        (values[place] - returns[place]) ** 2, (near - returns[place]) ** 2
    )
  return result
