"""Small readers: passage text in, one typed value out, or nothing.

A reader returns None rather than guess: several candidates, remarks that change
the meaning, and forms it does not know all count as absent. What it returns as
`text` stands verbatim in the passage.
"""

import dataclasses
import re
from collections.abc import Callable

from mgrpo_jax.tasks.factbook.text import fold

_BORDER = re.compile(r"([A-Z][^;,\d]*?) ([\d,]*\d(?:\.\d+)?) km\b")
_CODE = re.compile(r"(?<![\w.])\.[a-z]{2}\b")
_CURRENCY = re.compile(r"(.+?)(?: \(([A-Z]{3})\))? per US dollar\b")
_OFFICIAL = re.compile(
    r"(?:^|[,;] (?:and )?|\d%,? )([A-Z][^\W\d_]+(?: [A-Z][^\W\d_]+)*)"
    r"(?: \d[\d.]*%)? \(official\b"
)
_POINT = re.compile(r"([^\d;,]+?) (-?[\d,]+) m\b")
_DAY = re.compile(
    r"\b(\d{1,2} (?:January|February|March|April|May|June|July|August"
    r"|September|October|November|December))\b"
)
_CITY = re.compile(r"(\d[\d.,]*)( million)? ([^\W\d_][^,\d(]*?)(?= \(|, |\n|$)")
_QUOTED = re.compile(r'"([^"]+)"(?: \(([^()]+)\))?')


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
  """What a reader found.

  Attributes:
    text: the canonical answer, verbatim from the passage.
    aliases: other accepted forms.
    number: the same as a number, where it is a quantity, else None.
  """

  text: str
  aliases: tuple[str, ...] = ()
  number: float | None = None


Reader = Callable[[str], Value | None]


def name_value(text: str, *aliases: str) -> Value:
  """Returns a name with its accent-free form among the aliases."""
  forms = dict.fromkeys((fold(text), *aliases))
  return Value(text, tuple(form for form in forms if form and form != text))


def quantity(text: str, unit: str = "") -> Value:
  """Returns a number as written, with plain digits among the aliases.

  Args:
    text: digits with thousands separators, as in the passage.
    unit: what follows it there, with the blank, or nothing.

  Returns:
    The value; the canonical form carries the unit.
  """
  digits = text.replace(",", "")
  forms = dict.fromkeys((text + unit, digits + unit, text, digits))
  return Value(text + unit, tuple(forms)[1:], float(digits))


def capital(text: str) -> Value | None:
  """Reads the capital; none where there are several or an unofficial one."""
  head = _first_line(text).split("; note")[0]
  match = re.fullmatch(r"([^();:,]+(?:, D\.C\.)?)(?: \(([^()]+)\))?", head)
  if not match or "administered" in head or "no official" in head:
    return None
  name, remark = match[1].split(" in ")[0], match[2] or ""
  if "capital" in remark or not name[0].isupper():
    return None
  others = re.split(r"[/,] ?", remark)
  plain = all(re.fullmatch(r"[A-Z][\w' -]{2,20}", o) for o in others)
  short = name.removesuffix(", D.C.")
  return name_value(name, short, *(others if plain else ()))


def borders(text: str) -> tuple[tuple[str, float], ...]:
  """Reads the bordering places and the lengths of the borders in km.

  A name's qualification in brackets is dropped; stretches of a border that
  are listed apart are added up.
  """
  lengths: dict[str, float] = {}
  for name, length in _BORDER.findall(_first_line(text)):
    plain = re.sub(r" \([^()]*\)", "", name).strip()
    km = float(length.replace(",", ""))
    lengths[plain] = lengths.get(plain, 0.0) + km
  return tuple(lengths.items())


def border_count(text: str) -> Value | None:
  """Counts the bordering places; the number is not in the text."""
  found = borders(text)
  plain = re.sub(r"\([^()]*\)|^note.*", "", _first_line(text))
  if not found or len(found) != len(re.split("[;,] (?=[A-Z])", plain)):
    return None
  words = (
      "one two three four five six seven eight nine ten eleven twelve"
      " thirteen fourteen fifteen"
  ).split()
  count = len(found)
  word = words[count - 1 : count]
  return Value(str(count), tuple(word), float(count))


def internet_code(text: str) -> Value | None:
  """Reads the internet country code, where there is exactly one."""
  codes = set(_CODE.findall(text))
  if len(codes) != 1:
    return None
  code = codes.pop()
  return Value(code, (code[1:],))


def currency(text: str) -> Value | None:
  """Reads the name of the currency."""
  match = _CURRENCY.match(_first_line(text))
  if not match or re.search(r" or |[/,()]", match[1]):
    return None
  return name_value(match[1])


def currency_code(text: str) -> Value | None:
  """Reads the three-letter code of the currency."""
  match = _CURRENCY.match(_first_line(text))
  return Value(match[2]) if match and match[2] and currency(text) else None


def official_language(text: str) -> Value | None:
  """Reads the official language, where exactly one is called official."""
  found = _OFFICIAL.findall(text)
  if len(found) != 1 or text.count("official") != 1:
    return None
  return name_value(found[0])


def point_name(text: str) -> Value | None:
  """Reads the name of a highest or lowest point."""
  head = _first_line(text)
  if re.search(r"unnamed|unknown|\bkm\b|;", head):
    return None
  name = re.split(r" (?=-?\d)| \(|, ", head)[0].strip()
  if not re.fullmatch(r"[A-Z][^\d/,]{2,40}", name):
    return None
  return name_value(name, name.split(" on ")[0])


def point_elevation(text: str) -> Value | None:
  """Reads the elevation of a highest or lowest point, in metres."""
  match = _POINT.match(_first_line(text))
  if not match or not point_name(text):
    return None
  return quantity(match[2], " m")


def metres(text: str) -> Value | None:
  """Reads an elevation that opens the passage."""
  return _leading_quantity(text, " m")


def square_kilometres(text: str) -> Value | None:
  """Reads an area that opens the passage."""
  return _leading_quantity(text, " sq km")


def kilometres(text: str) -> Value | None:
  """Reads a length that opens the passage."""
  return _leading_quantity(text, " km")


def years(text: str) -> Value | None:
  """Reads a duration that opens the passage."""
  return _leading_quantity(text, " years")


def count(text: str) -> Value | None:
  """Reads a number that opens the passage."""
  match = re.match(r"(\d[\d,]*)(?= \(| years of age|$)", _first_line(text))
  return quantity(match[1]) if match else None


def percentage(text: str) -> Value | None:
  """Reads a percentage that opens the passage."""
  match = re.match(r"(\d+(?:\.\d+)?)%", text)
  if not match:
    return None
  return Value(match[0], (match[1], f"{match[1]} percent"), float(match[1]))


def independence_year(text: str) -> Value | None:
  """Reads the year of independence, where only one date is given."""
  found = re.findall(r"\b\d{3,4}\b", text)
  match = re.match(r"(?:\d{1,2} [A-Z][a-z]+ )?(\d{4})(?: \(|$)", text)
  if not match or len(found) != 1:
    return None
  return Value(match[1])


def nationality(text: str) -> Value | None:
  """Reads the adjective of nationality, where there is one form."""
  head = _first_line(text)
  plain = re.fullmatch(r"[A-Z][^\W\d_]+(?:[ -][A-Z][^\W\d_]+)*", head)
  if not plain or head == "NA" or " or " in head:
    return None
  return name_value(head)


def anthem(text: str) -> Value | None:
  """Reads the title of the national anthem, where there is one."""
  found = _QUOTED.findall(_first_line(text))
  if len(found) != 1 or not text.startswith('"'):
    return None
  return name_value(found[0][0].strip(), found[0][1])


def aircraft_prefix(text: str) -> Value | None:
  """Reads the registration prefix of civil aircraft."""
  return Value(text) if re.fullmatch(r"[A-Z0-9]{2}(?:-[A-Z])?", text) else None


def single_name(text: str) -> Value | None:
  """Reads a passage that is one name, with or without a remark."""
  head = _first_line(text)
  match = re.fullmatch(r"([A-Z][^\d;:,\"()/]{2,50}?)(?: \([^()]*\))?", head)
  if not match or " - " in match[1] or " is " in match[1]:
    return None
  return name_value(match[1])


def national_day(text: str) -> Value | None:
  """Reads the day of the national holiday, where there is one."""
  days = _DAY.findall(text)
  if len(days) != 1:
    return None
  day, month = days[0].split()
  return Value(days[0], (f"{month} {day}",))


def largest_city(text: str) -> Value | None:
  """Reads the largest of the major urban areas."""
  cities = []
  for number, million, name in _CITY.findall(_first_line(text)):
    size = float(number.rstrip(".,").replace(",", ""))
    cities.append((size * (1e6 if million else 1), name.strip()))
  sizes = sorted((size for size, _ in cities), reverse=True)
  if not cities or sizes[1:2] == sizes[:1]:
    return None
  name = max(cities)[1]
  return name_value(name, name.title() if name.isupper() else "")


def first_item(text: str) -> Value | None:
  """Reads the first of several items separated by commas."""
  match = re.match(r"([^\W\d_][^,;()\d:]*?)(?: \(|,|;|$)", _first_line(text))
  if not match or len(match[1]) > 40 or match[1] in ("none", "NA"):
    return None
  return name_value(match[1])


def only_item(text: str) -> Value | None:
  """Reads an item that stands alone, with or without a remark in brackets."""
  plain = re.sub(r" ?\([^()]*\)", "", _first_line(text))
  return None if re.search(r"[,;]", plain) else first_item(text)


def first_partner(text: str) -> Value | None:
  """Reads the first trade partner of a list with percentages."""
  shares = re.findall(r"([A-Z][^\d%;]*?) (\d+)%", _first_line(text))
  if not shares or not text.startswith(shares[0][0]):
    return None
  if any(int(share) >= int(shares[0][1]) for _, share in shares[1:]):
    return None
  return name_value(shares[0][0])


def colors(text: str) -> Value | None:
  """Reads the two or three national colors, in any order."""
  head = _first_line(text)
  if not re.fullmatch(r"[a-z ]+(?:, [a-z ]+){1,2}", head):
    return None
  items = head.split(", ")
  reverse = items[::-1]
  joined = [", ".join(items[:-1]) + " and " + items[-1], ", ".join(reverse)]
  return Value(head, (*joined, " and ".join(reverse)))


def time_zone(text: str) -> Value | None:
  """Reads the offset from UTC, where there is one."""
  match = re.match(r"(UTC ?[+-]?\d+(?:[.:]\d+)?) \(", text)
  if not match or text.count("UTC") != 1:
    return None
  short = match[1].replace(" ", "")
  return Value(match[1], (short,) if short != match[1] else ())


def _first_line(text: str) -> str:
  """Returns what stands before the first line break."""
  return text.split("\n", 1)[0]


def _leading_quantity(text: str, unit: str) -> Value | None:
  """Reads a number with its unit at the start of a passage."""
  match = re.match(rf"(\d[\d,]*(?:\.\d+)?){unit}\b", text)
  if not match or (";" in _first_line(text) and "(" not in text):
    return None
  return quantity(match[1], unit)
