"""Text that models and pages wrote, made safe to show.

Escaping keeps markup from being markup. What is left can still deceive a
reader: characters that reorder the line, that nobody sees, or that no file can
hold. They are spelled out, `‹U+202E›`.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any

# Controls but tab and line feed, marks that set the writing direction,
# invisible spaces, line and paragraph separators, halves of surrogate pairs.
UNSEEN = (
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u00ad\\u061c\\u200b\\u200e\\u200f"
    "\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ud800-\\udfff]"
)
_UNSEEN = re.compile(UNSEEN)


def spell(text: str) -> str:
  """Spells out what would not be seen.

  Args:
    text: any string, unpaired surrogates included.

  Returns:
    A string that UTF-8 can hold and that shows all it holds.
  """
  return _UNSEEN.sub(lambda match: f"‹U+{ord(match[0]):04X}›", text)


def escape(value: object) -> str:
  """Makes a value into text for HTML, element or quoted attribute.

  Args:
    value: anything; its `str` is shown.

  Returns:
    Escaped and spelled-out text.
  """
  return html.escape(spell(str(value)), quote=True)


def embed_json(value: Any) -> str:
  """Writes a value as JSON that can stand inside a script element.

  Args:
    value: anything JSON can hold.

  Returns:
    ASCII without `<`, `>` or `&`, so that nothing in it can end the element
    or start a comment.

  Raises:
    ValueError: NaN or an infinity, which are not JSON.
  """
  text = json.dumps(value, allow_nan=False, separators=(",", ":"))
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text
