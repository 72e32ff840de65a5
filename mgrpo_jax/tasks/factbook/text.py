"""Turns the Factbook's HTML fragments into plain text."""

import html
import re
import unicodedata

_BREAK = re.compile(r"<\s*/?\s*(?:br|p|li|ul|ol|div|tr)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_SPACES = re.compile(r"[^\S\n]+")
_BREAKS = re.compile(r"\s*\n\s*")
_PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2212": "-",
        "\u00ad": None,
        "\u200b": None,
        "\u200e": None,
        "\ufeff": None,
    }
)
_SHOUT = re.compile(
    r"\b[A-Z][A-Z'-]{2,}(?: [A-Z][A-Z'-]+)*|\b[A-Z]{2} [A-Z'-]{3,}"
)
_SMALL = frozenset({"OF", "DE", "AU", "LA"})
_SLUG = re.compile(r"[^a-z0-9]+")


def clean(fragment: str) -> str:
  """Returns the readable text of an HTML fragment.

  Line breaks and paragraphs become single newlines, other tags vanish,
  entities are resolved, typographic quotes and dashes become plain ones, and
  runs of white space one blank. Letters keep their accents.

  Args:
    fragment: text as the package stores it.

  Returns:
    Text in Unicode normal form C without leading or trailing blanks.
  """
  text = (
      _TAG.sub("", _BREAK.sub("\n", fragment)) if "<" in fragment else fragment
  )
  while "&" in text and (plain := html.unescape(text)) != text:
    text = plain
  text = unicodedata.normalize("NFC", text.translate(_PLAIN))
  text = _SPACES.sub(" ", text)
  return _BREAKS.sub("\n", text).strip()


def quiet(text: str) -> str:
  """Returns text with names in all capitals written as names usually are."""
  return _SHOUT.sub(_quiet_name, text)


def fold(text: str) -> str:
  """Returns text without accents, for aliases and ids."""
  decomposed = unicodedata.normalize("NFKD", text)
  return "".join(c for c in decomposed if not unicodedata.combining(c))


def slug(text: str) -> str:
  """Returns the text as lower-case ASCII words joined by hyphens."""
  plain = fold(text).lower().replace("'", "")
  return _SLUG.sub("-", plain).strip("-")


def _quiet_name(match: re.Match[str]) -> str:
  """Lowers all letters but the first of each word, small words wholly."""
  words = re.split(r"([ -])", match[0])
  return "".join(
      w.lower() if i and w in _SMALL else w.capitalize()
      for i, w in enumerate(words)
  )
