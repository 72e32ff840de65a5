"""Which split each place belongs to; fixed, so that shipped weights stay fair.

Places are held out in clusters that share land borders, region by region, so
that questions about neighbours survive in every split and no split lacks a
continent. Places without a land neighbour in their region are held out in
the same proportion.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from mgrpo_jax.tasks.factbook import extract
from mgrpo_jax.tasks.factbook.corpus import Corpus, names

_SHARES = {"test": 0.24, "dev": 0.13}


def assign(corpus: Corpus) -> dict[str, str]:
  """Assigns every place to `train`, `dev` or `test`.

  Args:
    corpus: the documents.

  Returns:
    Split by place id, for all places that are not aggregates.
  """
  graph = _neighbors(corpus)
  regions: dict[str, list[str]] = {}
  for place in corpus.places.values():
    if not place.aggregate:
      regions.setdefault(place.region, []).append(place.id)
  result = {}
  for members in regions.values():
    within = {m: graph[m] & set(members) for m in members}
    for group in (
        [m for m in members if within[m]],
        [m for m in members if not within[m]],
    ):
      result.update(_hold_out(group, within))
  return {place: result[place] for place in corpus.places if place in result}


def _neighbors(corpus: Corpus) -> dict[str, set[str]]:
  """Returns the land borders between places, in both directions."""
  lookup = names(corpus.places)
  graph: dict[str, set[str]] = {place: set() for place in corpus.places}
  for place in corpus.places.values():
    passage = corpus.passages.get(f"{place.id}/geography#border-countries")
    if passage is None or place.aggregate:
      continue
    for name, _ in extract.borders(passage.text):
      if name in lookup:
        graph[place.id].add(lookup[name])
        graph[lookup[name]].add(place.id)
  return graph


def _hold_out(
    group: Sequence[str], graph: Mapping[str, set[str]]
) -> dict[str, str]:
  """Grows a test cluster, then a dev cluster; the rest trains."""
  free = sorted(group, key=_rank)
  result = {}
  for split, share in _SHARES.items():
    for place in _grow(free, graph, round(share * len(group))):
      free.remove(place)
      result[place] = split
  return result | dict.fromkeys(free, "train")


def _grow(
    free: Iterable[str], graph: Mapping[str, set[str]], size: int
) -> list[str]:
  """Picks `size` places, each next one as close to the others as can be."""
  left = list(free)
  cluster: list[str] = []
  while left and len(cluster) < size:
    # `max` keeps the first of equals, so ties go by the order given.
    best = max(left, key=lambda place: len(graph[place] & set(cluster)))
    left.remove(best)
    cluster.append(best)
  return cluster


def _rank(place: str) -> str:
  """Returns a fixed pseudo-random sort key."""
  return hashlib.sha256(f"factbook split/{place}".encode()).hexdigest()
