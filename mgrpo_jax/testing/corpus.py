"""A corpus of a dozen passages, and a task over it."""

import dataclasses

from mgrpo_jax.types import Evidence, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
  """A document with the attributes that the tools need.

  Attributes:
    id: `page#field`.
    title: one line.
    text: the content.
  """

  id: str
  title: str
  text: str


_FACTS = {
    "peru": ("Peru", "Lima", "Sol", "Quechua"),
    "chad": ("Chad", "N'Djamena", "CFA franc", "Arabic"),
    "nepal": ("Nepal", "Kathmandu", "Rupee", "Nepali"),
    "fiji": ("Fiji", "Suva", "Fiji dollar", "Fijian"),
}
_FIELDS = ("Capital", "Currency", "Languages")


def passages() -> tuple[Passage, ...]:
  """Four places, three passages each, always in the same order."""
  return tuple(
      Passage(
          id=f"{key}/facts#{field.lower()}",
          title=f"{name}: {field}",
          text=f"{value}; as given for {name}",
      )
      for key, (name, *values) in _FACTS.items()
      for field, value in zip(_FIELDS, values, strict=True)
  )


def task() -> Task:
  """A question of two hops, with its evidence."""
  hops = (
      Evidence(
          page="peru/facts#capital",
          question="capital of Peru",
          query="Peru capital",
          answers=("Lima",),
      ),
      Evidence(
          page="chad/facts#currency",
          question="currency of Chad",
          query="Chad currency",
          answers=("CFA franc",),
      ),
  )
  return Task(
      id="peru-and-chad",
      question="capital of Peru, and currency of Chad?",
      answers=("Lima, CFA franc",),
      stage="hard",
      hops=2,
      evidence=hops,
      meta={"kind": "test"},
  )
