"""Proper names from the pages of training places.

A small model must learn to copy names, which takes many more of them than
there are places. These are swapped into imitation demonstrations and feed the
tokenizer; nothing of a held-out place may be among them.
"""

import re
from collections.abc import Collection

from mgrpo_jax.tasks.factbook.corpus import Corpus
from mgrpo_jax.tasks.factbook.text import fold

_FIELDS = (
    "government#administrative-divisions",
    "people#major-urban-areas",
    "transportation#ports",
    "geography#highest-point",
    "geography#lowest-point",
    "geography#major-lakes-area-sq-km",
    "geography#major-rivers-by-length-in-km",
    "geography#major-watersheds-area-sq-km",
    "geography#major-aquifers",
    "government#national-heritage",
    "government#capital",
    "government#former-name",
    "people#ethnic-groups",
    "people#languages",
)
_NAME = re.compile(
    r"(?<![\w'-])[A-Z][^\W\d_]+(?:['-][^\W\d_]+)*"
    r"(?:[ ](?:(?:de|del|da|do|la|el|al|of|the)[ ])?"
    r"[A-Z][^\W\d_]+(?:['-][^\W\d_]+)*){0,2}"
)
_MAX_CHARS = 24


def extract(
    corpus: Corpus, members: Collection[str], forbidden: Collection[str]
) -> tuple[str, ...]:
  """Collects proper names from the pages of the given places.

  Args:
    corpus: the documents.
    members: ids of the places whose pages are read.
    forbidden: names that must not come out, compared without case or accents.

  Returns:
    Distinct names in the order of the documents, without accents.
  """
  banned = {fold(name).lower() for name in forbidden}
  found: dict[str, None] = {}
  for place in corpus.places:
    if place not in members:
      continue
    for field in _FIELDS:
      passage = corpus.passages.get(f"{place}/{field}")
      for match in _NAME.findall(passage.text) if passage else ():
        name = _plain(match)
        if 3 <= len(name) <= _MAX_CHARS and name.lower() not in banned:
          found[name] = None
  return tuple(found)


def _plain(name: str) -> str:
  """Folds accents and writes all capitals as one would write a name."""
  plain = fold(name)
  return plain.title() if plain.isupper() else plain
