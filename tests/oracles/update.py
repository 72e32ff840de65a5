"""One optimizer step of a bigram policy, its gradient by hand, in float64.

The policy is a table of logits W[previous, next]; trajectories are processed
one by one, without packing, padding or micro-batches.
"""

import numpy as np


def logprobs(table, tokens):
  """Computes log-probs of a trajectory's tokens; 0 for the first."""
  result = np.zeros(len(tokens))
  for t in range(1, len(tokens)):
    row = table[tokens[t - 1]]
    result[t] = (
        row[tokens[t]] - np.log(np.exp(row - row.max()).sum()) - (row.max())
    )
  return result


def backward(table, trajectories, slopes):
  """Turns dLoss/dlogprob of every token into dLoss/dW."""
  gradient = np.zeros(table.shape)
  for tokens, slope in zip(trajectories, slopes, strict=True):
    for t in range(1, len(tokens)):
      row = table[tokens[t - 1]]
      probabilities = np.exp(row - row.max())
      probabilities /= probabilities.sum()
      gradient[tokens[t - 1]] -= slope[t] * probabilities
      gradient[tokens[t - 1], tokens[t]] += slope[t]
  return gradient


def slopes(loss, values, step=1e-6):
  """Differentiates a function of a float64 array by central differences."""
  result = np.zeros(values.shape)
  for place in np.ndindex(values.shape):
    up, down = values.copy(), values.copy()
    up[place] += step
    down[place] -= step
    result[place] = (loss(up) - loss(down)) / (2 * step)
  return result


def first_adamw_step(
    table, gradient, *, rate, b1, b2, eps, weight_decay, clip_norm
):
  """Makes AdamW's first update, as its paper's algorithm 2 writes it."""
  norm = np.sqrt((gradient**2).sum())
  gradient = gradient * min(1.0, clip_norm / norm)
  m = (1 - b1) * gradient / (1 - b1)
  v = (1 - b2) * gradient**2 / (1 - b2)
  return table - rate * (m / (np.sqrt(v) + eps) + weight_decay * table)
