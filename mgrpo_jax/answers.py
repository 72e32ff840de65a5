"""Whether a text is an accepted answer: rules, no model.

Differences of case, accents, articles, punctuation, thousands separators and
spelling of units do not matter; different words and different numbers do.
Texts come from models and may be anything: time is linear in their length,
and a text longer than `MAX_CHARS` is no answer.
"""

from __future__ import annotations

import collections
import fractions
import re
import unicodedata
from collections.abc import Iterable, Sequence

MAX_CHARS = 2000

# What canonical decomposition does not take apart.
_LETTERS = str.maketrans(
    {
        "æ": "ae",
        "œ": "oe",
        "ø": "o",
        "ł": "l",
        "đ": "d",
        "ð": "d",
        "þ": "th",
        "ı": "i",
        "−": "-",
        "–": "-",
        "’": "'",
        "%": " percent ",
        "&": " and ",
    }
)
_GROUPED = re.compile(
    r"(?<![0-9.,])([0-9]{1,3}(?:([, \u00a0\u2009\u202f'])[0-9]{3})"
    r"(?:\2[0-9]{3})*)(?![0-9])"
)
_INITIAL = re.compile(r"(?<![^\W_])([^\W\d_])\.(?=[^\W\d_](?![^\W_]))")
_WORD = re.compile(r"(?<![\w.])-?[0-9]+(?:\.[0-9]+)?|[^\W_]+")
_ARTICLES = frozenset(("a", "an", "the"))
_HEDGES = frozenset(("about", "approximately", "around", "roughly"))
_SCALES = {
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_UNITS = {
    ("km",): "km",
    ("kilometer",): "km",
    ("kilometers",): "km",
    ("kilometre",): "km",
    ("kilometres",): "km",
    ("m",): "m",
    ("meter",): "m",
    ("meters",): "m",
    ("metre",): "m",
    ("metres",): "m",
    ("sq", "km"): "km2",
    ("km2",): "km2",
    ("square", "kilometer"): "km2",
    ("square", "kilometers"): "km2",
    ("square", "kilometre"): "km2",
    ("square", "kilometres"): "km2",
    ("percent",): "percent",
    ("per", "cent"): "percent",
    ("year",): "years",
    ("years",): "years",
    ("people",): "people",
    ("inhabitants",): "people",
}
Quantity = tuple[fractions.Fraction, str]


def words(text: str) -> tuple[str, ...]:
  """Splits a text into the words that matter.

  Args:
    text: anything; what follows `MAX_CHARS` characters is ignored.

  Returns:
    Words in lower case without accents, articles and punctuation; numbers in
    plain decimal digits (`1,234.50` is `1234.5`). An article stays where it
    is the last word, as in `Vitamin A`.
  """
  plain = unicodedata.normalize("NFKD", text[:MAX_CHARS]).casefold()
  plain = unicodedata.normalize("NFKD", plain)
  plain = "".join(c for c in plain if not unicodedata.combining(c))
  plain = plain.translate(_LETTERS)
  plain = _GROUPED.sub(lambda match: re.sub("[^0-9]", "", match[1]), plain)
  plain = _INITIAL.sub(r"\1", plain)  # U.S. is US
  found = [_plain_number(word) for word in _WORD.findall(plain)]
  last = len(found) - 1
  return tuple(
      word
      for place, word in enumerate(found)
      if word not in _ARTICLES or place == last
  )


def matches(text: str, answers: Iterable[str]) -> bool:
  """Says whether a text is one of the answers, and nothing else.

  Args:
    text: what an agent answered.
    answers: what is accepted.

  Returns:
    Whether words are equal, or both are the same number with the same unit
    or with one unit unsaid.
  """
  if len(text) > MAX_CHARS:
    return False
  said = words(text)
  return bool(said) and any(_same(said, words(answer)) for answer in answers)


def mentions(text: str, answers: Iterable[str], *, max_words: int) -> bool:
  """Says whether a short text contains one of the answers, word for word.

  Args:
    text: what an agent reported, in a sentence or two.
    answers: what is accepted.
    max_words: a text of more mentions nothing: listing candidates is no answer.

  Returns:
    Whether an answer's words stand together in the text.
  """
  if len(text) > MAX_CHARS or len(words(text)) > max_words:
    return False
  return shows(text, answers)


def shows(text: str, answers: Iterable[str]) -> bool:
  """Says whether a text of any kind contains one of the answers.

  Args:
    text: such as a page; what follows `MAX_CHARS` characters is ignored.
    answers: what is looked for.

  Returns:
    Whether an answer's words stand together in the text.
  """
  shown = words(text)
  return any(contains(shown, words(answer)) for answer in answers)


def overlap(left: str, right: str) -> float:
  """Computes the F1 of two texts' words: how much they share, in 0..1.

  Args:
    left: a text.
    right: another.

  Returns:
    The harmonic mean of precision and recall, counting repeated words.
  """
  a, b = words(left), words(right)
  shared = collections.Counter(a) & collections.Counter(b)
  return 2 * shared.total() / max(len(a) + len(b), 1)


def contains(said: Sequence[str], answer: Sequence[str]) -> bool:
  """Says whether an answer's words stand together in a text's.

  Args:
    said: words of the text.
    answer: words of the answer; no words are contained nowhere.

  Returns:
    Whether they do.
  """
  # A separator that no word holds makes this a search for a substring.
  inside = "\n" + "\n".join(answer) + "\n"
  return bool(answer) and inside in "\n" + "\n".join(said) + "\n"


def quantity(said: Sequence[str]) -> Quantity | None:
  """Reads words as one number with a unit.

  Args:
    said: words of a text.

  Returns:
    The number in full (`1.3 million` is 1300000) and its unit, empty where
    none is said; None where the words are anything else.
  """
  rest = list(said[1:] if said and said[0] in _HEDGES else said)
  if not rest or not re.fullmatch(r"-?[0-9]{1,40}(\.[0-9]{1,40})?", rest[0]):
    return None
  number = fractions.Fraction(rest.pop(0))
  if rest and rest[0] in _SCALES:
    number *= _SCALES[rest.pop(0)]
  unit = _UNITS.get(tuple(rest)) if rest else ""
  return None if unit is None else (number, unit)


def _same(said: Sequence[str], answer: Sequence[str]) -> bool:
  """Compares words, then quantities."""
  if said == answer:
    return True
  left, right = quantity(said), quantity(answer)
  if left is None or right is None:
    return False
  units = {left[1], right[1]}
  return left[0] == right[0] and (len(units) == 1 or "" in units)


def _plain_number(word: str) -> str:
  """Drops zeros that do not change a number."""
  if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", word):
    return word
  whole, dot, part = word.partition(".")
  sign = "-" if whole.startswith("-") else ""
  whole = whole.lstrip("-").lstrip("0") or "0"
  part = part.rstrip("0") if dot else ""
  plain = f"{whole}.{part}" if part else whole
  return plain if plain == "0" else sign + plain
