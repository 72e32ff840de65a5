"""How facts are asked about: the words of questions, sub-questions, queries.

`{x}` stands for a place in words ('Peru', 'the country whose capital is Lima'),
`{v}` for a value, `{n}` for `country` or `territory`.
"""

import dataclasses
from collections.abc import Mapping

# Around the clause that tells a place apart.
PLACE_FRAMES = (
    "Which {n} is the one {clause}?",
    "Name the {n} {clause}.",
    "What is the name of the {n} {clause}?",
    "Find the {n} {clause}. What is it called?",
)
# Around a description of a place that has to be found through another one.
LINKED_FRAMES = (
    "Which place is {x}?",
    "Name {x}.",
    "What is the name of {x}?",
    "Find {x}. What is it called?",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Clause:
  """How a place is told apart by one of its values.

  Attributes:
    clauses: what follows 'the country', long and short forms, over `{v}`.
    query: what an expert would search for, over `{v}`.
  """

  clauses: tuple[str, str, str, str]
  query: str

  @property
  def subquestions(self) -> tuple[str, ...]:
    """Short templates over `{n}` and `{v}`."""
    short = self.clauses[:2]
    return tuple(
        f"{opening}{{n}} {clause}"
        for opening in ("", "the ")
        for clause in short
    )


IDENTIFYING: Mapping[str, Clause] = {
    "capital": Clause(
        (
            "whose capital is {v}",
            "with the capital {v}",
            "that has {v} as its capital",
            "whose capital city is called {v}",
        ),
        "capital {v}",
    ),
    "internet-code": Clause(
        (
            "whose internet code is {v}",
            "with the internet code {v}",
            "that uses the internet country code {v}",
            "whose internet country code is {v}",
        ),
        "internet country code {v}",
    ),
    "currency": Clause(
        (
            "whose currency is {v}",
            "with the currency {v}",
            "that pays with {v}",
            "where the currency is called {v}",
        ),
        "currency {v}",
    ),
    "currency-code": Clause(
        (
            "whose currency code is {v}",
            "with the currency code {v}",
            "whose currency has the code {v}",
            "whose money has the three-letter code {v}",
        ),
        "currency {v}",
    ),
    "nationality": Clause(
        (
            "whose nationality is {v}",
            "with the nationality {v}",
            "whose people and things are called {v}",
            "whose adjective of nationality is {v}",
        ),
        "nationality {v}",
    ),
    "highest-point": Clause(
        (
            "whose highest point is {v}",
            "with the highest point {v}",
            "that has {v} as its highest point",
            "where no place is higher than {v}",
        ),
        "highest point {v}",
    ),
    "anthem": Clause(
        (
            'whose anthem is "{v}"',
            'with the anthem "{v}"',
            'whose national anthem is called "{v}"',
            'that has "{v}" as its national anthem',
        ),
        "national anthem {v}",
    ),
    "aircraft-prefix": Clause(
        (
            "whose aircraft prefix is {v}",
            "with the aircraft prefix {v}",
            "whose civil aircraft are registered with the prefix {v}",
            "that registers its aircraft under {v}",
        ),
        "civil aircraft registration prefix {v}",
    ),
    "former-name": Clause(
        (
            "whose former name is {v}",
            "with the former name {v}",
            "that was formerly called {v}",
            "known earlier as {v}",
        ),
        "former name {v}",
    ),
    "largest-city": Clause(
        (
            "whose largest city is {v}",
            "with the largest city {v}",
            "that has {v} as its largest urban area",
            "where no urban area has more people than {v}",
        ),
        "major urban areas {v}",
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
  """How one place leads to another.

  Attributes:
    phrases: what the other place is to `{x}`; the first two are short.
    query: what an expert would search for beside the place's name.
  """

  phrases: tuple[str, str, str, str]
  query: str

  @property
  def subquestions(self) -> tuple[str, ...]:
    """Short templates over `{x}`."""
    short = tuple(phrase.removeprefix("the ") for phrase in self.phrases[:2])
    return (*short, *self.phrases[:2])


LINKS: Mapping[str, Link] = {
    "longest-border": Link(
        (
            "the country with the longest border with {x}",
            "the neighbor with the longest border with {x}",
            "the country that shares the longest land border with {x}",
            "the neighbor that has the most kilometres of border with {x}",
        ),
        "border countries",
    ),
    "shortest-border": Link(
        (
            "the country with the shortest border with {x}",
            "the neighbor with the shortest border with {x}",
            "the country that shares the shortest land border with {x}",
            "the neighbor that has the fewest kilometres of border with {x}",
        ),
        "border countries",
    ),
    "only-neighbor": Link(
        (
            "the only neighbor of {x}",
            "the only country bordering {x}",
            "the one country that shares a land border with {x}",
            "the single country that borders {x} by land",
        ),
        "border countries",
    ),
    "export-partner": Link(
        (
            "the top export partner of {x}",
            "the main export partner of {x}",
            "the place that takes the largest share of the exports of {x}",
            "the partner that buys the most exports from {x}",
        ),
        "exports partners",
    ),
    "import-partner": Link(
        (
            "the top import partner of {x}",
            "the main import partner of {x}",
            "the place that supplies the largest share of the imports of {x}",
            "the partner that sells the most imports to {x}",
        ),
        "imports partners",
    ),
}

# Two places compared; `{a}` and `{b}` are places in words. Larger value wins.
COMPARISONS: Mapping[str, tuple[str, ...]] = {
    "population": (
        "Which has more people, {a} or {b}?",
        "Where do more people live, in {a} or in {b}?",
        "Of {a} and {b}, which has the larger population?",
        "Is the population larger in {a} or in {b}?",
    ),
    "area": (
        "Which is larger by area, {a} or {b}?",
        "Which covers more land and water, {a} or {b}?",
        "Of {a} and {b}, which has the larger total area?",
        "Is the total area larger for {a} or for {b}?",
    ),
    "highest-elevation": (
        "Which has the higher highest point, {a} or {b}?",
        "Where does the land rise higher, in {a} or in {b}?",
        "Of {a} and {b}, which has the higher peak elevation?",
        "Is the highest point higher in {a} or in {b}?",
    ),
    "coastline": (
        "Which has the longer coastline, {a} or {b}?",
        "Where is the coast longer, in {a} or in {b}?",
        "Of {a} and {b}, which has more coastline?",
        "Is the coastline longer in {a} or in {b}?",
    ),
    "median-age": (
        "Which has the higher median age, {a} or {b}?",
        "Where are people older at the median, in {a} or in {b}?",
        "Of {a} and {b}, which has the older population by median age?",
        "Is the median age higher in {a} or in {b}?",
    ),
    "life-expectancy": (
        "Which has the higher life expectancy, {a} or {b}?",
        "Where can people expect to live longer, in {a} or in {b}?",
        "Of {a} and {b}, which has the greater life expectancy at birth?",
        "Is life expectancy higher in {a} or in {b}?",
    ),
    "airports": (
        "Which has more airports, {a} or {b}?",
        "Where are there more airports, in {a} or in {b}?",
        "Of {a} and {b}, which has the larger number of airports?",
        "Are there more airports in {a} or in {b}?",
    ),
    "border-count": (
        "Which borders more countries, {a} or {b}?",
        "Which has more neighbors by land, {a} or {b}?",
        "Of {a} and {b}, which shares borders with more countries?",
        "Is the number of bordering countries larger for {a} or for {b}?",
    ),
    "railways": (
        "Which has the longer railways, {a} or {b}?",
        "Where are the railways longer in total, in {a} or in {b}?",
        "Of {a} and {b}, which has more kilometres of railways?",
        "Are the railways longer in {a} or in {b}?",
    ),
}
