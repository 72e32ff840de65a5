"""Typed facts read from passages, and which of them identify a place."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from mgrpo_jax.tasks.factbook import extract
from mgrpo_jax.tasks.factbook.corpus import Corpus, names
from mgrpo_jax.tasks.factbook.extract import Reader

HEAD = 160  # characters of a passage within which its fact must stand


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
  """One attribute of one place.

  Attributes:
    place: place id.
    attribute: name of the attribute, a key of `ATTRIBUTES` or
      `PLACE_ATTRIBUTES`, or one of `specs.BORDERS`.
    value: canonical answer, verbatim within the first `HEAD` characters of the
      passage unless the attribute is counted.
    aliases: other accepted answers.
    number: the value as a number, where it is a quantity.
    passage: id of the passage that holds it.
    target: id of the place the value names, where it names one, else empty.
  """

  place: str
  attribute: str
  value: str
  aliases: tuple[str, ...]
  number: float | None
  passage: str
  target: str

  @property
  def answers(self) -> tuple[str, ...]:
    """The canonical value, then the aliases."""
    return (self.value, *self.aliases)


# Attribute -> (page section and field that hold it, its reader).
ATTRIBUTES: dict[str, tuple[str, Reader]] = {
    "capital": ("government#capital", extract.capital),
    "internet-code": (
        "communications#internet-country-code",
        extract.internet_code,
    ),
    "currency": ("economy#currency", extract.currency),
    "currency-code": ("economy#currency", extract.currency_code),
    "language": ("people#languages", extract.official_language),
    "highest-point": ("geography#highest-point", extract.point_name),
    "highest-elevation": ("geography#highest-point", extract.point_elevation),
    "lowest-point": ("geography#lowest-point", extract.point_name),
    "mean-elevation": ("geography#mean-elevation", extract.metres),
    "area": ("geography#area", extract.square_kilometres),
    "coastline": ("geography#coastline", extract.kilometres),
    "border-count": ("geography#border-countries", extract.border_count),
    "population": ("people#population", extract.count),
    "median-age": ("people#median-age", extract.years),
    "life-expectancy": ("people#life-expectancy-at-birth", extract.years),
    "literacy": ("people#literacy", extract.percentage),
    "internet-users": ("communications#internet-users", extract.percentage),
    "independence": ("government#independence", extract.independence_year),
    "nationality": ("people#nationality", extract.nationality),
    "anthem": ("government#national-anthem", extract.anthem),
    "aircraft-prefix": (
        "transportation#civil-aircraft-registration-prefix",
        extract.aircraft_prefix,
    ),
    "former-name": ("government#former-name", extract.single_name),
    "legislature": ("government#legislature-name", extract.single_name),
    "seats": ("government#legislature-seats", extract.count),
    "holiday": ("government#national-holiday", extract.national_day),
    "largest-city": ("people#major-urban-areas", extract.largest_city),
    "export": ("economy#exports-commodities", extract.first_item),
    "import": ("economy#imports-commodities", extract.first_item),
    "colors": ("government#national-colors", extract.colors),
    "symbol": ("government#national-symbols", extract.only_item),
    "time-zone": ("government#time-difference", extract.time_zone),
    "airports": ("transportation#airports", extract.count),
    "railways": ("transportation#railways", extract.kilometres),
    "heritage-sites": ("government#national-heritage", extract.count),
}
# Attributes whose value has to be counted: it is not in the text.
COUNTED = frozenset({"border-count"})
# Attributes that name a place, where exactly one does.
PLACE_ATTRIBUTES: dict[str, tuple[str, Reader]] = {
    "export-partner": ("economy#exports-partners", extract.first_partner),
    "import-partner": ("economy#imports-partners", extract.first_partner),
}
_BORDER_FIELD = "geography#border-countries"
# Attributes by which a place can be asked for.
IDENTIFYING = (
    "capital",
    "internet-code",
    "currency",
    "currency-code",
    "nationality",
    "highest-point",
    "anthem",
    "aircraft-prefix",
    "former-name",
    "largest-city",
)


def read(corpus: Corpus) -> tuple[Fact, ...]:
  """Reads every fact that is stated once and clearly.

  Args:
    corpus: the documents.

  Returns:
    Facts ordered by place, then attribute.
  """
  lookup = names(corpus.places)
  facts: list[Fact] = []
  for place in corpus.places.values():
    if place.aggregate:
      continue
    for attribute, (field, reader) in ATTRIBUTES.items():
      facts += _plain(corpus, place.id, attribute, field, reader)
    for attribute, (field, reader) in PLACE_ATTRIBUTES.items():
      found = _plain(corpus, place.id, attribute, field, reader)
      facts += _aimed(corpus, lookup, found)
    facts += _borders(corpus, lookup, place.id)
  return tuple(facts)


def identifying(corpus: Corpus, facts: Iterable[Fact]) -> tuple[Fact, ...]:
  """Selects the facts from which a place can be found.

  A value must belong to one place alone: no other place's passage on the same
  field, facts or not, may show it in its head. Values that give the place's
  name away are left out.

  Args:
    corpus: the documents.
    facts: all facts.

  Returns:
    The facts that may be turned round, in the order given.
  """
  heads = {
      field: _heads(corpus, field)
      for field in {ATTRIBUTES[a][0] for a in IDENTIFYING}
  }
  kept = []
  for fact in facts:
    if fact.attribute not in IDENTIFYING:
      continue
    field = ATTRIBUTES[fact.attribute][0]
    owners = [p for p, head in heads[field] if contains(head, fact.value)]
    if owners == [fact.place] and not _tells(corpus, fact):
      kept.append(fact)
  return tuple(kept)


def contains(text: str, value: str) -> bool:
  """Whether a value stands in a text as whole words, case aside."""
  if value.lower() not in text.lower():
    return False
  pattern = rf"(?<!\w){re.escape(value)}(?!\w)"
  return re.search(pattern, text, re.IGNORECASE) is not None


def _plain(
    corpus: Corpus, place: str, attribute: str, field: str, reader: Reader
) -> list[Fact]:
  """Applies a reader to its field of a place."""
  passage = corpus.passages.get(f"{place}/{field}")
  value = reader(passage.text) if passage else None
  if passage is None or value is None:
    return []
  shown = attribute in COUNTED or value.text in passage.text[:HEAD]
  if not shown or value.text == corpus.places[place].name:
    return []
  return [
      Fact(
          place=place,
          attribute=attribute,
          value=value.text,
          aliases=value.aliases,
          number=value.number,
          passage=passage.id,
          target="",
      )
  ]


def _aimed(
    corpus: Corpus, lookup: Mapping[str, str], found: Iterable[Fact]
) -> list[Fact]:
  """Resolves values that name a place; only title names can be followed."""
  facts = []
  for fact in found:
    target = lookup.get(fact.value, "")
    if target and corpus.places[target].name == fact.value:
      aliases = corpus.places[target].aliases
      facts.append(dataclasses.replace(fact, target=target, aliases=aliases))
  return facts


def _borders(
    corpus: Corpus, lookup: Mapping[str, str], place: str
) -> list[Fact]:
  """Reads the neighbours with the longest, shortest and only border."""
  passage = corpus.passages.get(f"{place}/{_BORDER_FIELD}")
  if passage is None or not extract.border_count(passage.text):
    return []
  found = extract.borders(passage.text)
  lengths = [km for _, km in found]
  picks: dict[str, Callable[[list[float]], float]] = (
      {"only-neighbor": max}
      if len(found) == 1
      else {"longest-border": max, "shortest-border": min}
  )
  facts = []
  for attribute, pick in picks.items():
    km = pick(lengths)
    name = found[lengths.index(km)][0]
    if lengths.count(km) == 1 and name in passage.text[:HEAD]:
      facts.append(
          Fact(
              place=place,
              attribute=attribute,
              value=name,
              aliases=(),
              number=None,
              passage=passage.id,
              target="",
          )
      )
  return _aimed(corpus, lookup, facts)


def _heads(corpus: Corpus, field: str) -> list[tuple[str, str]]:
  """Lists (place, head of its passage) of a field over all places."""
  heads = []
  for place in corpus.places:
    passage = corpus.passages.get(f"{place}/{field}")
    if passage:
      heads.append((place, passage.text[:HEAD]))
  return heads


def _tells(corpus: Corpus, fact: Fact) -> bool:
  """Whether a value gives the place's name away."""
  place = corpus.places[fact.place]
  value = fact.value.lower()
  for name in (place.name, *place.aliases):
    plain = name.lower()
    short, long = sorted((plain, value), key=len)
    if short == long:
      return True
    if fact.attribute != "nationality" and len(short) > 3 and short in long:
      return True
  return False
