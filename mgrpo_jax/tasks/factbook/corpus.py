"""Pages (place x section) and passages (fields of a page) of the Factbook."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from mgrpo_jax.tasks.factbook import extract, places
from mgrpo_jax.tasks.factbook.places import Place
from mgrpo_jax.tasks.factbook.text import clean, quiet, slug

_SECTIONS = {
    "Introduction": "introduction",
    "Geography": "geography",
    "People and Society": "people",
    "Environment": "environment",
    "Government": "government",
    "Economy": "economy",
    "Energy": "energy",
    "Communications": "communications",
    "Transportation": "transportation",
    "Military and Security": "military",
    "Space": "space",
    "Terrorism": "terrorism",
    "Transnational Issues": "transnational",
}
# Titles that differ from the Factbook's field names.
_TITLES = {
    "National anthem(s)": "National anthem",
    "National color(s)": "National colors",
    "National symbol(s)": "National symbols",
    "Major urban areas - population": "Major urban areas",
    "Civil aircraft registration country code prefix": (
        "Civil aircraft registration prefix"
    ),
}
# Subfields that become passages of their own, under these titles.
_SPLIT = {
    "Land boundaries": {"border countries": "Border countries"},
    "Elevation": {
        "highest point": "Highest point",
        "lowest point": "Lowest point",
        "mean elevation": "Mean elevation",
    },
    "Capital": {"time difference": "Time difference"},
    "Country name": {"former": "Former name"},
    "Exchange rates": {"Currency": "Currency"},
    "Legislative branch": {
        "legislature name": "Legislature name",
        "number of seats": "Legislature seats",
    },
}
# Subfields that open a passage without a label, most wanted first.
_LEADS = (
    "adjective",
    "name",
    "total",
    "total population",
    "total World Heritage Sites",
    "percent of population",
    "conventional short form",
    "title",
)
# Fields that write capital cities in capitals.
_SHOUTING = frozenset({"Major urban areas - population"})
_YEAR = re.compile(r"\b(?:19|20)\d\d$")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
  """One field of a page: what search returns and `visit` opens.

  Attributes:
    id: `place/section#field`, for example `peru/government#capital`.
    page: id of the page it stands on.
    title: `Peru: Capital`.
    text: plain text that starts with the fact itself, not with a label.
  """

  id: str
  page: str
  title: str
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Page:
  """One section of a place's entry.

  Attributes:
    id: `place/section`.
    place: id of the place.
    title: `Peru: Government`.
    passages: ids of its passages, in the Factbook's order.
    links: ids of the place's other pages, then of the same section of the
      places it borders.
  """

  id: str
  place: str
  title: str
  passages: tuple[str, ...]
  links: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """All documents, in a fixed order.

  Attributes:
    places: by place id.
    pages: by page id.
    passages: by passage id.
  """

  places: Mapping[str, Place]
  pages: Mapping[str, Page]
  passages: Mapping[str, Passage]

  def page_text(self, page_id: str) -> str:
    """Renders a whole page: title, titled passages, links."""
    page = self.pages[page_id]
    parts = [page.title]
    for key in page.passages:
      passage = self.passages[key]
      heading = passage.title.split(": ", 1)[1]
      parts.append(f"{heading}: {passage.text}")
    parts.append("Links: " + ", ".join(page.links))
    return "\n".join(parts)


def build() -> Corpus:
  """Builds the corpus from the installed package.

  Passages without information and repetitions of a place's earlier passage
  are left out.

  Returns:
    The corpus.

  Raises:
    ValueError: where the package is missing, or two places share an id.
  """
  raw = places.read_package()
  by_key = {key: places.describe(key, entry) for key, entry in raw.items()}
  by_id = {place.id: place for place in by_key.values()}
  if len(by_id) != len(by_key):
    raise ValueError("two Factbook entries share a place id")
  passages = {}
  for key, entry in raw.items():
    seen: set[tuple[str, str]] = set()
    for passage in _passages(by_key[key], entry):
      if (passage.title, passage.text) not in seen:
        seen.add((passage.title, passage.text))
        passages[passage.id] = passage
  return Corpus(
      places=MappingProxyType(by_id),
      pages=MappingProxyType(_pages(by_id, passages)),
      passages=MappingProxyType(passages),
  )


def names(by_id: Mapping[str, Place]) -> dict[str, str]:
  """Maps every unambiguous name or alias of a place to the place's id."""
  owners: dict[str, set[str]] = {}
  for place in by_id.values():
    for name in (place.name, *place.aliases):
      owners.setdefault(name, set()).add(place.id)
  return {name: min(ids) for name, ids in owners.items() if len(ids) == 1}


def _passages(place: Place, entry: Mapping[str, Any]) -> Iterator[Passage]:
  """Yields the passages of one entry, section by section."""
  taken: set[str] = set()
  for section, fields in entry.items():
    page = f"{place.id}/{_SECTIONS[section]}"
    for field, value in fields.items():
      for title, text in _field(field, value):
        key = f"{page}#{slug(title)}"
        if key not in taken and text not in ("", "NA", "N/A"):
          taken.add(key)
          yield Passage(
              id=key, page=page, title=f"{place.name}: {title}", text=text
          )


def _field(field: str, value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields (title, text) of a field and of the subfields split from it."""
  split = _SPLIT.get(field, {})
  lines = []
  for key in sorted(value, key=_lead_rank):
    text = _leaf(value[key])
    if field in _SHOUTING:
      text = quiet(text)
    label = key.strip()
    if label in split:
      yield split[label], text
    elif text:
      lines.append(_line(field, label, text))
  yield _TITLES.get(field, field), "\n".join(lines)


def _lead_rank(key: str) -> tuple[bool, int]:
  """Sorts the leading subfields first and keeps the others in order."""
  label = key.strip()
  leads = label in _LEADS
  return not leads, _LEADS.index(label) if leads else 0


def _leaf(value: Mapping[str, Any] | str) -> str:
  """Returns the text of a subfield with its note on a line of its own."""
  if isinstance(value, str):
    return clean(value)
  parts = [
      v if isinstance(v, str) else v.get("text", "") for v in value.values()
  ]
  return clean("<br>".join(parts))


def _line(field: str, label: str, text: str) -> str:
  """Labels a subfield's text unless the label says nothing new."""
  last = label.rsplit(": ", 1)[-1]
  silent = label in (*_LEADS, "text", "note", field)
  if silent or text.startswith(f"{last}:") or _YEAR.search(label):
    return text
  return f"{label.removeprefix(field).strip() or label}: {text}"


def _pages(
    by_id: Mapping[str, Place], passages: Mapping[str, Passage]
) -> dict[str, Page]:
  """Groups passages into pages and links the pages."""
  members: dict[str, list[str]] = {}
  for passage in passages.values():
    members.setdefault(passage.page, []).append(passage.id)
  lookup = names(by_id)
  sections: dict[str, list[str]] = {}
  for page in members:
    sections.setdefault(page.split("/")[0], []).append(page)
  pages = {}
  for key, ids in members.items():
    place, section = key.split("/")
    border = passages.get(f"{place}/geography#border-countries")
    found = extract.borders(border.text) if border else ()
    neighbours = [lookup[name] for name, _ in found if name in lookup]
    links = [page for page in sections[place] if page != key]
    links += [f"{n}/{section}" for n in neighbours]
    title = next(t for t, s in _SECTIONS.items() if s == section)
    pages[key] = Page(
        id=key,
        place=place,
        title=f"{by_id[place].name}: {title}",
        passages=tuple(ids),
        links=tuple(link for link in links if link in members),
    )
  return pages
