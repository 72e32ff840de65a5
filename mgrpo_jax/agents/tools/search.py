"""BM25 search over titled passages."""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import bm25s
import numpy as np

from mgrpo_jax.agents.tools.tool import (
    Memory,
    Observation,
    Passage,
    Tool,
    text_schema,
)

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG itself
_WORD = re.compile(r"\w+")


class SearchIndex:
  """A BM25 index, safe to share between threads and agent calls.

  No stemming and no stop words; words are lower-cased. Passages of equal
  score keep the order in which they were given.
  """

  def __init__(
      self,
      passages: Sequence[Passage],
      *,
      title_weight: int,
      cache_size: int,
  ):
    """Indexes the passages.

    Args:
      passages: what can be found.
      title_weight: how many times a title counts as text, at least 1.
      cache_size: number of queries remembered, least recently used out.

    Raises:
      ValueError: there are no passages, or the title weight is below 1.
    """
    if not passages:
      raise ValueError("passages: must not be empty")
    if title_weight < 1:
      raise ValueError(f"title_weight: is {title_weight}, must be >= 1")
    self.passages = tuple(passages)
    words = [
        _words(p.title) * title_weight + _words(p.text) for p in self.passages
    ]
    vocabulary = sorted({word for document in words for word in document})
    self._ids = {word: i for i, word in enumerate(vocabulary)}
    self._bm25 = bm25s.BM25(backend="numpy", csc_backend="numpy")
    ids = [[self._ids[word] for word in document] for document in words]
    self._bm25.index(
        (ids, self._ids), create_empty_token=False, show_progress=False
    )
    self._cached = functools.lru_cache(maxsize=cache_size)(self._top)

  def find(self, query: str, *, limit: int) -> tuple[Passage, ...]:
    """The best passages for a query.

    Args:
      query: any text.
      limit: how many to return at most.

    Returns:
      Passages that share a word with the query, best first.
    """
    known = tuple(w for w in _words(query) if w in self._ids)
    return tuple(self.passages[i] for i in self._cached(known, limit))

  def _top(self, words: tuple[str, ...], limit: int) -> tuple[int, ...]:
    """Positions of the best passages; ties by position."""
    if not words:
      return ()
    scores = self._bm25.get_scores_from_ids([self._ids[w] for w in words])
    limit = min(limit, len(scores))
    least = np.partition(scores, -limit)[-limit]
    candidates = np.flatnonzero((scores >= least) & (scores > 0))
    order = np.argsort(-scores[candidates], kind="stable")
    return tuple(int(i) for i in candidates[order[:limit]])


def search(
    index: SearchIndex, *, num_results: int, deadline: float, max_chars: int
) -> Tool:
  """The tool `search`: a line `1 Peru: Capital` for every passage found.

  Args:
    index: what is searched.
    num_results: lines at most.
    deadline: seconds.
    max_chars: characters of the whole list.

  Returns:
    The tool. It notes the list in the call's memory, for `visit`.

  Raises:
    ValueError: `num_results` is below 1.
  """
  if num_results < 1:
    raise ValueError(f"num_results: is {num_results}, must be >= 1")

  async def run(arguments: Mapping[str, Any], memory: Memory) -> Observation:
    found = index.find(arguments["query"], limit=num_results)
    memory.results = tuple(passage.id for passage in found)
    if not found:
      return Observation(text="no results")
    lines = [f"{i} {passage.title}" for i, passage in enumerate(found, 1)]
    return Observation(text="\n".join(lines))

  return Tool(
      name="search",
      description="Find passages; returns a numbered list of titles.",
      schema=text_schema("query", "A few words to search for."),
      run=run,
      deadline=deadline,
      max_chars=max_chars,
  )


def _words(text: str) -> list[str]:
  """Lower-cased words."""
  return _WORD.findall(text.lower())
