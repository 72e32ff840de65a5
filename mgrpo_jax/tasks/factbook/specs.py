"""What can be asked: look-ups chained from fact to fact, and comparisons."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from mgrpo_jax.tasks.factbook import wording
from mgrpo_jax.tasks.factbook.facts import Fact
from mgrpo_jax.tasks.factbook.places import Place

BORDERS = ("longest-border", "shortest-border", "only-neighbor")
PARTNERS = ("export-partner", "import-partner")
# Smallest ratio of two compared quantities: closer ones are a matter of years
# and estimates.
_MARGIN = 1.1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
  """Look-ups in a row: a place, links to other places, an attribute.

  Attributes:
    start: id of the place it starts from.
    key: the fact by which the start has to be found, None where it is named.
    links: facts that lead from place to place.
    final: the attribute asked for at the end, None where the place is.
  """

  start: str
  key: Fact | None
  links: tuple[Fact, ...]
  final: Fact | None

  @property
  def facts(self) -> tuple[Fact, ...]:
    """The facts to look up, in order."""
    ends = ((self.key,), self.links, (self.final,))
    return tuple(f for part in ends for f in part if f is not None)

  @property
  def end(self) -> str:
    """Id of the last place."""
    return self.visited[-1]

  @property
  def visited(self) -> tuple[str, ...]:
    """Ids of its places, in order."""
    return (self.start, *(link.target for link in self.links))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
  """Which of two places has more; the left one may have to be found.

  Attributes:
    left: chain that ends with the attribute of the left place.
    right: the same attribute of another place, which is named.
  """

  left: Chain
  right: Fact


Spec = Chain | Comparison


@dataclasses.dataclass(frozen=True)
class Knowledge:
  """What the questions of one split may rest on.

  Attributes:
    places: the split's places by id.
    facts: their facts by place, then attribute.
    keys: identifying facts by place.
  """

  places: Mapping[str, Place]
  facts: Mapping[str, Mapping[str, Fact]]
  keys: Mapping[str, Sequence[Fact]]


def restrict(
    places: Mapping[str, Place],
    facts: Sequence[Fact],
    keys: Sequence[Fact],
    members: frozenset[str],
) -> Knowledge:
  """Keeps what rests on the given places alone.

  Args:
    places: all places.
    facts: all facts.
    keys: the identifying ones.
    members: ids of the split's places.

  Returns:
    The split's knowledge; links that lead out of the split are gone.
  """
  index: dict[str, dict[str, Fact]] = {m: {} for m in sorted(members)}
  for fact in facts:
    if fact.place in members and (not fact.target or fact.target in members):
      index[fact.place][fact.attribute] = fact
  turned: dict[str, list[Fact]] = {m: [] for m in sorted(members)}
  for fact in keys:
    if fact.place in members:
      turned[fact.place].append(fact)
  return Knowledge({m: places[m] for m in sorted(members)}, index, turned)


def _attribute(k: Knowledge) -> Iterator[Chain]:
  """Yields single attributes of named places."""
  for place, facts in k.facts.items():
    for fact in facts.values():
      if not fact.target:
        yield Chain(start=place, key=None, links=(), final=fact)


def _place(k: Knowledge) -> Iterator[Chain]:
  """Yields places to be found by one of their values."""
  for place, keys in k.keys.items():
    for key in keys:
      yield Chain(start=place, key=key, links=(), final=None)


def _link(k: Knowledge) -> Iterator[Chain]:
  """Yields places to be found beside, or in trade with, a named one."""
  for place, facts in k.facts.items():
    for fact in facts.values():
      if fact.target:
        yield Chain(start=place, key=None, links=(fact,), final=None)


def _place_attribute(k: Knowledge) -> Iterator[Chain]:
  """Yields attributes of places to be found by another value."""
  for spec in _place(k):
    yield from _finished(k, spec)


def _place_link(k: Knowledge) -> Iterator[Chain]:
  """Yields neighbours and partners of places to be found by a value."""
  for spec in _place(k):
    yield from _linked(k, spec, BORDERS + PARTNERS)


def _border_attribute(k: Knowledge) -> Iterator[Chain]:
  """Yields attributes of neighbours of named places."""
  for spec in _named(k):
    for linked in _linked(k, spec, BORDERS):
      yield from _finished(k, linked)


def _partner_attribute(k: Knowledge) -> Iterator[Chain]:
  """Yields attributes of trade partners of named places."""
  for spec in _named(k):
    for linked in _linked(k, spec, PARTNERS):
      yield from _finished(k, linked)


def _place_link_attribute(k: Knowledge) -> Iterator[Chain]:
  """Yields attributes of neighbours and partners of places to be found."""
  for spec in _place_link(k):
    yield from _finished(k, spec)


def _border_border_attribute(k: Knowledge) -> Iterator[Chain]:
  """Yields attributes of neighbours of neighbours."""
  for spec in _named(k):
    for first in _linked(k, spec, BORDERS):
      for second in _linked(k, first, BORDERS):
        yield from _finished(k, second)


def _compare(k: Knowledge) -> Iterator[Comparison]:
  """Yields comparisons of two named places."""
  for spec in _named(k):
    yield from _compared(k, spec)


def _place_compare(k: Knowledge) -> Iterator[Comparison]:
  """Yields comparisons of a place to be found with a named one."""
  for spec in _place(k):
    yield from _compared(k, spec)


def _named(k: Knowledge) -> Iterator[Chain]:
  """Yields the named places themselves, nothing looked up yet."""
  for place in k.places:
    yield Chain(start=place, key=None, links=(), final=None)


def _finished(k: Knowledge, chain: Chain) -> Iterator[Chain]:
  """Yields a chain with every attribute its passages do not show already."""
  shown = [fact.passage for fact in chain.facts]
  for fact in k.facts[chain.end].values():
    if not fact.target and fact.passage not in shown:
      yield Chain(
          start=chain.start, key=chain.key, links=chain.links, final=fact
      )


def _linked(
    k: Knowledge, chain: Chain, attributes: Sequence[str]
) -> Iterator[Chain]:
  """Yields a chain with every further link to a place not yet visited."""
  for attribute in attributes:
    link = k.facts[chain.end].get(attribute)
    if link is not None and link.target not in chain.visited:
      yield Chain(
          start=chain.start,
          key=chain.key,
          links=(*chain.links, link),
          final=None,
      )


def _compared(k: Knowledge, chain: Chain) -> Iterator[Comparison]:
  """Yields comparisons of a place with three others, well apart."""
  for left in _finished(k, chain):
    fact = left.final
    if fact is None or fact.attribute not in wording.COMPARISONS:
      continue
    others = [p for p in k.places if fact.attribute in k.facts[p]]
    # A fixed sample: all pairs would be thousands of specs per place.
    near = random.Random(f"{chain}{fact.attribute}").sample(
        others, min(3, len(others))
    )
    for other in near:
      right = k.facts[other][fact.attribute]
      if other != left.start and _apart(fact, right):
        yield Comparison(left=left, right=right)


def _apart(one: Fact, other: Fact) -> bool:
  """Whether two quantities differ clearly."""
  small, large = sorted((one.number or 0.0, other.number or 0.0))
  return large > 0 and large >= small * _MARGIN


FAMILIES: Mapping[str, Callable[[Knowledge], Iterator[Spec]]] = {
    "attribute": _attribute,
    "place": _place,
    "link": _link,
    "border>attribute": _border_attribute,
    "partner>attribute": _partner_attribute,
    "place>link": _place_link,
    "compare": _compare,
    "place>compare": _place_compare,
    "place>link>attribute": _place_link_attribute,
    "border>border>attribute": _border_border_attribute,
    "place>attribute": _place_attribute,
}
