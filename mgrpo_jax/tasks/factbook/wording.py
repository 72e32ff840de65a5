"""How facts are asked about: the words of questions, sub-questions, queries.

`{x}` stands for a place in words ('Peru', 'the country whose capital is Lima'),
`{v}` for a value, `{n}` for `country` or `territory`.
"""

import dataclasses
from collections.abc import Mapping

# Around a noun phrase such as 'the capital'.
_FRAMES = (
    "What is {np} of {{x}}?",
    "Name {np} of {{x}}.",
    "Tell me {np} of {{x}}.",
    "Find {np} of {{x}}.",
)
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
class Asked:
  """How one attribute of a place is asked for.

  Attributes:
    noun: the attribute as short words without article.
    query: what an expert would search for beside the place's name.
    extra: whole questions about `{x}` beside the common frames.
    other: a second way to say the noun.
    article: what stands before the noun in a sentence.
  """

  noun: str
  query: str
  extra: tuple[str, ...]
  other: str
  article: str = "the "

  @property
  def questions(self) -> tuple[str, ...]:
    """Question templates over `{x}`."""
    frames = tuple(f.format(np=self.article + self.noun) for f in _FRAMES)
    return frames + self.extra

  @property
  def subquestions(self) -> tuple[str, ...]:
    """Short templates over `{x}`, what one agent asks of another."""
    return (
        f"{self.noun} of {{x}}",
        f"{self.other} of {{x}}",
        f"{self.article}{self.noun} of {{x}}",
        f"what is {self.article}{self.noun} of {{x}}",
    )


ATTRIBUTES: Mapping[str, Asked] = {
    "capital": Asked(
        "capital",
        "capital",
        (
            "Which city is the capital of {x}?",
            "What city serves as the capital of {x}?",
        ),
        "capital city",
    ),
    "internet-code": Asked(
        "internet country code",
        "internet country code",
        (
            "Which internet country code does {x} use?",
            "Web addresses in {x} end with which country code?",
        ),
        "internet code",
    ),
    "currency": Asked(
        "currency",
        "currency",
        (
            "Which currency is used in {x}?",
            "What money do people pay with in {x}?",
        ),
        "money",
    ),
    "currency-code": Asked(
        "currency code",
        "currency",
        (
            "Which three-letter code does the currency of {x} have?",
            "What is the code of the currency used in {x}?",
        ),
        "three-letter currency code",
    ),
    "language": Asked(
        "official language",
        "languages",
        (
            "Which language is official in {x}?",
            "What language does {x} have as its official one?",
        ),
        "official tongue",
    ),
    "highest-point": Asked(
        "highest point",
        "highest point",
        (
            "Which point in {x} is the highest?",
            "What is the highest place in {x} called?",
        ),
        "highest place",
    ),
    "highest-elevation": Asked(
        "elevation of the highest point",
        "highest point",
        (
            "How high is the highest point of {x}?",
            "How many metres above the sea is the highest point of {x}?",
        ),
        "height of the highest point",
    ),
    "lowest-point": Asked(
        "lowest point",
        "lowest point",
        (
            "Which point in {x} is the lowest?",
            "What is the lowest place in {x} called?",
        ),
        "lowest place",
    ),
    "mean-elevation": Asked(
        "mean elevation",
        "mean elevation",
        (
            "How high does {x} lie on average?",
            "What is the average elevation in {x}?",
        ),
        "average elevation",
    ),
    "area": Asked(
        "total area",
        "area",
        (
            "How large is {x}?",
            "How many square kilometres does {x} cover?",
        ),
        "area",
    ),
    "coastline": Asked(
        "length of the coastline",
        "coastline",
        ("How long is the coastline of {x}?", "How much coast does {x} have?"),
        "coastline",
    ),
    "border-count": Asked(
        "number of bordering countries",
        "border countries",
        (
            "How many countries border {x}?",
            "How many neighbors by land does {x} have?",
            "With how many countries does {x} share a land border?",
        ),
        "count of border countries",
    ),
    "population": Asked(
        "population",
        "population",
        ("How many people live in {x}?", "How many inhabitants does {x} have?"),
        "number of people",
    ),
    "median-age": Asked(
        "median age",
        "median age",
        (
            "What is the median age of the people in {x}?",
            "How old is the median inhabitant of {x}?",
        ),
        "median age of the people",
    ),
    "life-expectancy": Asked(
        "life expectancy",
        "life expectancy at birth",
        (
            "What is the life expectancy at birth in {x}?",
            "How long can a child born in {x} expect to live?",
        ),
        "life expectancy at birth",
    ),
    "literacy": Asked(
        "literacy rate",
        "literacy",
        (
            "What share of the people in {x} can read and write?",
            "How many percent of the people in {x} are literate?",
        ),
        "literacy",
    ),
    "internet-users": Asked(
        "share of internet users",
        "internet users",
        (
            "What share of the people in {x} use the internet?",
            "How many percent of the people in {x} are internet users?",
        ),
        "percentage of internet users",
    ),
    "independence": Asked(
        "year of independence",
        "independence",
        (
            "In which year did {x} become independent?",
            "When did {x} become independent?",
        ),
        "independence year",
    ),
    "nationality": Asked(
        "adjective of nationality",
        "nationality",
        (
            "What adjective describes someone or something from {x}?",
            "What are things from {x} called, as an adjective?",
        ),
        "nationality",
    ),
    "anthem": Asked(
        "national anthem",
        "national anthem",
        (
            "What is the national anthem of {x} called?",
            "Which song is the national anthem of {x}?",
        ),
        "anthem",
    ),
    "aircraft-prefix": Asked(
        "aircraft registration prefix",
        "civil aircraft registration prefix",
        (
            "With which prefix are civil aircraft of {x} registered?",
            "Aircraft registrations of {x} start with which prefix?",
        ),
        "aircraft prefix",
    ),
    "former-name": Asked(
        "former name",
        "former name",
        ("What was {x} formerly called?", "Which name did {x} have before?"),
        "earlier name",
    ),
    "legislature": Asked(
        "name of the legislature",
        "legislature name",
        (
            "What is the legislature of {x} called?",
            "Which body makes the laws of {x}?",
        ),
        "legislature",
    ),
    "seats": Asked(
        "number of seats in the legislature",
        "legislature seats",
        (
            "How many seats does the legislature of {x} have?",
            "How many members sit in the legislature of {x}?",
        ),
        "legislature seats",
    ),
    "holiday": Asked(
        "date of the national holiday",
        "national holiday",
        (
            "On which day is the national holiday of {x}?",
            "When does {x} celebrate its national holiday?",
        ),
        "national holiday",
    ),
    "largest-city": Asked(
        "largest urban area",
        "major urban areas",
        (
            "Which urban area of {x} has the most people?",
            "Which city is the largest in {x}?",
        ),
        "largest city",
    ),
    "export": Asked(
        "top export commodity",
        "exports commodities",
        (
            "Which commodity does {x} export most?",
            "Which commodity comes first among the exports of {x}?",
        ),
        "main export",
    ),
    "import": Asked(
        "top import commodity",
        "imports commodities",
        (
            "Which commodity does {x} import most?",
            "Which commodity comes first among the imports of {x}?",
        ),
        "main import",
    ),
    "colors": Asked(
        "national colors",
        "national colors",
        (
            "Which colors are the national colors of {x}?",
            "Which colors stand for {x}?",
        ),
        "colors",
    ),
    "symbol": Asked(
        "national symbol",
        "national symbols",
        (
            "Which animal, plant or object is the national symbol of {x}?",
            "What stands for {x} as its national symbol?",
        ),
        "symbol",
    ),
    "time-zone": Asked(
        "time difference from UTC",
        "time difference",
        (
            "Which time zone is the capital of {x} in?",
            "How far from UTC are the clocks of {x}?",
        ),
        "time zone",
    ),
    "airports": Asked(
        "number of airports",
        "airports",
        ("How many airports does {x} have?", "How many airports are in {x}?"),
        "airports",
    ),
    "railways": Asked(
        "length of the railways",
        "railways",
        (
            "How many kilometres of railways does {x} have?",
            "How long are the railways of {x} in total?",
        ),
        "railways",
    ),
    "heritage-sites": Asked(
        "number of World Heritage Sites",
        "national heritage sites",
        (
            "How many World Heritage Sites does {x} have?",
            "How many World Heritage Sites are in {x}?",
        ),
        "World Heritage Sites",
    ),
}


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
