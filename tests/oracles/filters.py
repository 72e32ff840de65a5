"""top-k, top-p and min-p on one row, by sorting; from the papers' words."""

import numpy as np


def kept(probability, *, top_k, top_p, min_p):
  """Which tokens may be drawn; ties live and die together.

  Args:
    probability: [V] float64, sums to 1.
    top_k: 0 for all.
    top_p: 1 for all.
    min_p: 0 for all.

  Returns:
    [V] bool.
  """
  alive = probability >= min_p * probability.max()
  if top_k:
    last = np.sort(probability)[::-1][min(top_k, len(probability)) - 1]
    alive &= probability >= last
  if top_p < 1:
    left = np.where(alive, probability, 0) / probability[alive].sum()
    order = np.sort(left)[::-1]
    size = np.searchsorted(np.cumsum(order), top_p) + 1
    alive &= left >= order[size - 1]
  return alive
