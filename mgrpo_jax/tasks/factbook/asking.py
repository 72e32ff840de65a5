"""How the attributes of a place are asked for.

`{x}` stands for a place in words ('Peru', 'the country whose capital is Lima').
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


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
  """How one attribute of a place is asked for.

  Attributes:
    noun: the attribute as short words without article.
    query: what an expert would search for beside the place's name.
    extra: whole questions about `{x}` beside the common frames.
    other: a second way to say the noun.
  """

  noun: str
  query: str
  extra: tuple[str, ...]
  other: str

  @property
  def questions(self) -> tuple[str, ...]:
    """Question templates over `{x}`."""
    frames = tuple(f.format(np=f"the {self.noun}") for f in _FRAMES)
    return frames + self.extra

  @property
  def subquestions(self) -> tuple[str, ...]:
    """Short templates over `{x}`, what one agent asks of another."""
    return (
        f"{self.noun} of {{x}}",
        f"{self.other} of {{x}}",
        f"the {self.noun} of {{x}}",
        f"what is the {self.noun} of {{x}}",
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
        "national heritage",
        (
            "How many World Heritage Sites does {x} have?",
            "How many World Heritage Sites are in {x}?",
        ),
        "World Heritage Sites",
    ),
}
