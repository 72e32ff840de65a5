"""BM25 in the variant of Lucene, from its formula, in plain Python.

score(q, d) = Σ_t idf(t) · f(t, d) / (f(t, d) + k1 (1 − b + b |d| / avg|d|))
idf(t) = ln(1 + (N − n_t + 0.5) / (n_t + 0.5))
"""

import math
import re


def scores(query, documents, *, k1, b):
  texts = [re.findall(r"\w+", d.lower()) for d in documents]
  mean = sum(map(len, texts)) / len(texts)
  totals = [0.0] * len(texts)
  for term in re.findall(r"\w+", query.lower()):
    holders = sum(term in text for text in texts)
    idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
    for i, text in enumerate(texts):
      count = text.count(term)
      norm = k1 * (1 - b + b * len(text) / mean)
      totals[i] += idf * count / (count + norm) if count else 0.0
  return totals
