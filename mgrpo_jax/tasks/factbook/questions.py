"""Questions of one, two and three hops, drawn from the facts of a split."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from mgrpo_jax.tasks.factbook import wording
from mgrpo_jax.tasks.factbook.facts import Fact, contains
from mgrpo_jax.tasks.factbook.places import Place
from mgrpo_jax.types import Evidence, Task

BORDERS = ("longest-border", "shortest-border", "only-neighbor")
PARTNERS = ("export-partner", "import-partner")
# Smallest ratio of two compared quantities: closer ones are a matter of years
# and estimates.
_MARGIN = 1.1
_ROUNDS = 8  # how often a family's questions may be worded anew


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
  """Look-ups in a row: a place, links to other places, an attribute.

  Attributes:
    start: id of the place it starts from.
    key: the fact by which the start has to be found, None where it is named.
    links: facts that lead from place to place.
    final: the attribute asked for at the end, None where the place is.
  """

  start: str
  key: Fact | None
  links: tuple[Fact, ...]
  final: Fact | None

  @property
  def facts(self) -> tuple[Fact, ...]:
    """The facts to look up, in order."""
    ends = ((self.key,), self.links, (self.final,))
    return tuple(f for part in ends for f in part if f is not None)

  @property
  def end(self) -> str:
    """Id of the last place."""
    return self.links[-1].target if self.links else self.start


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
  """Which of two places has more; the left one may have to be found.

  Attributes:
    left: chain that ends with the attribute of the left place.
    right: the same attribute of another place, which is named.
  """

  left: Chain
  right: Fact


Spec = Chain | Comparison


@dataclasses.dataclass(frozen=True)
class Knowledge:
  """What the questions of one split may rest on.

  Attributes:
    places: the split's places by id.
    facts: their facts by place, then attribute.
    keys: identifying facts by place.
  """

  places: Mapping[str, Place]
  facts: Mapping[str, Mapping[str, Fact]]
  keys: Mapping[str, Sequence[Fact]]


def restrict(
    places: Mapping[str, Place],
    facts: Sequence[Fact],
    keys: Sequence[Fact],
    members: frozenset[str],
) -> Knowledge:
  """Keeps what rests on the given places alone.

  Args:
    places: all places.
    facts: all facts.
    keys: the identifying ones.
    members: ids of the split's places.

  Returns:
    The split's knowledge; links that lead out of the split are gone.
  """
  index: dict[str, dict[str, Fact]] = {m: {} for m in sorted(members)}
  for fact in facts:
    if fact.place in members and (not fact.target or fact.target in members):
      index[fact.place][fact.attribute] = fact
  turned: dict[str, list[Fact]] = {m: [] for m in sorted(members)}
  for fact in keys:
    if fact.place in members:
      turned[fact.place].append(fact)
  return Knowledge({m: places[m] for m in sorted(members)}, index, turned)


def draw(
    knowledge: Knowledge,
    *,
    split: str,
    seed: int,
    shares: Mapping[str, float],
    size: int,
) -> tuple[Task, ...]:
  """Draws the questions of a split.

  Args:
    knowledge: what they rest on.
    split: name, the first part of task ids.
    seed: decides specs, wordings and order.
    shares: part of each family in the whole, a key of `FAMILIES`; they add up
      to 1. A family that has too few questions leaves its part to the last.
    size: number of questions.

  Returns:
    `size` tasks with distinct questions.

  Raises:
    ValueError: where the knowledge does not yield that many.
  """
  rng = random.Random(f"{seed}/{split}")
  seen: set[str] = set()
  drafts: list[Task] = []
  families = list(shares)
  for family in families:
    quota = round(shares[family] * size)
    if family == families[-1]:
      quota = size - len(drafts)
    specs = list(FAMILIES[family](knowledge))
    drafts += _fill(knowledge, family, specs, quota, rng, seen)
  if len(drafts) != size:
    raise ValueError(
        f"split {split!r}: {size} questions wanted, {len(drafts)} can be made"
    )
  rng.shuffle(drafts)
  return tuple(
      dataclasses.replace(
          task, id=f"{split}-{i:05d}", meta={**task.meta, "split": split}
      )
      for i, task in enumerate(drafts)
  )


def _fill(
    knowledge: Knowledge,
    family: str,
    specs: list[Spec],
    quota: int,
    rng: random.Random,
    seen: set[str],
) -> list[Task]:
  """Words specs in random order until the quota is met or nothing is new."""
  tasks: list[Task] = []
  for _ in range(_ROUNDS):
    rng.shuffle(specs)
    for spec in specs:
      if len(tasks) >= quota:
        return tasks
      task = word(knowledge, spec, family, rng)
      if task.question not in seen and not _gives_away(task):
        seen.add(task.question)
        tasks.append(task)
  return tasks


def word(
    knowledge: Knowledge, spec: Spec, family: str, rng: random.Random
) -> Task:
  """Puts a spec into words.

  Args:
    knowledge: names of the places.
    spec: what is asked.
    family: written into the task's meta.
    rng: picks among the wordings.

  Returns:
    A task without id.
  """
  if isinstance(spec, Comparison):
    return _word_comparison(knowledge, spec, family, rng)
  final = spec.final
  if final is not None:
    template = rng.choice(wording.ATTRIBUTES[final.attribute].questions)
    question = template.format(x=_describe(knowledge, spec, rng))
    answers = final.answers
  else:
    question = _ask_place(knowledge, spec, rng)
    place = knowledge.places[spec.end]
    answers = (place.name, *place.aliases)
  return _task(
      family=family,
      question=_capitalized(question),
      answers=answers,
      kind=_kind(spec),
      evidence=_evidence(knowledge, spec, rng),
      places=_visited(spec),
  )


def _word_comparison(
    knowledge: Knowledge, spec: Comparison, family: str, rng: random.Random
) -> Task:
  """Puts a comparison into words, the two places in random order."""
  final = spec.left.final
  if final is None or final.number is None or spec.right.number is None:
    raise ValueError(f"comparison without numbers: {spec}")
  right = Chain(start=spec.right.place, key=None, links=(), final=spec.right)
  sides = [spec.left, right]
  if spec.left.key is None:
    rng.shuffle(sides)
  a, b = (_describe(knowledge, side, rng) for side in sides)
  template = rng.choice(wording.COMPARISONS[final.attribute])
  larger = final if final.number > spec.right.number else spec.right
  place = knowledge.places[larger.place]
  evidence = [e for side in sides for e in _evidence(knowledge, side, rng)]
  via = f"{spec.left.key.attribute}-of>" if spec.left.key else ""
  return _task(
      family=family,
      question=_capitalized(template.format(a=a, b=b)),
      answers=(place.name, *place.aliases),
      kind=f"{len(evidence)}hop:{via}compare-{final.attribute}",
      evidence=tuple(evidence),
      places=tuple(side.start for side in sides),
  )


def _task(
    *,
    family: str,
    question: str,
    answers: tuple[str, ...],
    kind: str,
    evidence: tuple[Evidence, ...],
    places: tuple[str, ...],
) -> Task:
  """Assembles a task; its id comes once all are drawn."""
  hops = len(evidence)
  return Task(
      id="",
      question=question,
      answers=answers,
      stage="easy" if hops == 1 else "hard",
      hops=hops,
      evidence=evidence,
      meta={"kind": kind, "family": family, "places": places},
  )


def _describe(knowledge: Knowledge, chain: Chain, rng: random.Random) -> str:
  """Describes the place a chain ends with, without its attribute."""
  text = knowledge.places[chain.start].phrase
  if chain.key is not None:
    noun, clause = _clause(knowledge, chain.key, rng)
    text = f"the {noun} {clause}"
  for link in chain.links:
    text = rng.choice(wording.LINKS[link.attribute].phrases).format(x=text)
  return text


def _ask_place(knowledge: Knowledge, chain: Chain, rng: random.Random) -> str:
  """Asks for the place a chain ends with."""
  if chain.links:
    text = _describe(knowledge, chain, rng)
    return rng.choice(wording.LINKED_FRAMES).format(x=text)
  if chain.key is None:
    raise ValueError(f"a chain that looks nothing up: {chain}")
  noun, clause = _clause(knowledge, chain.key, rng)
  return rng.choice(wording.PLACE_FRAMES).format(n=noun, clause=clause)


def _clause(
    knowledge: Knowledge, key: Fact, rng: random.Random
) -> tuple[str, str]:
  """Returns the noun and a clause for the place a fact identifies."""
  clause = rng.choice(wording.IDENTIFYING[key.attribute].clauses)
  return knowledge.places[key.place].noun, clause.format(v=key.value)


def _evidence(
    knowledge: Knowledge, chain: Chain, rng: random.Random
) -> tuple[Evidence, ...]:
  """Lists the look-ups of a chain with the words to delegate and search."""
  steps = []
  if chain.key is not None:
    key, place = chain.key, knowledge.places[chain.start]
    clause = wording.IDENTIFYING[key.attribute]
    template = rng.choice(clause.subquestions)
    steps.append(
        Evidence(
            page=key.passage,
            question=template.format(n=place.noun, v=key.value),
            query=clause.query.format(v=key.value),
            answers=(place.name, *place.aliases),
        )
    )
  rest = (*chain.links, chain.final) if chain.final else chain.links
  for fact in rest:
    asked = _asked(fact)
    name = knowledge.places[fact.place].name
    steps.append(
        Evidence(
            page=fact.passage,
            question=rng.choice(asked.subquestions).format(x=name),
            query=f"{name} {asked.query}",
            answers=fact.answers,
        )
    )
  return tuple(steps)


def _asked(fact: Fact) -> wording.Asked | wording.Link:
  """Returns the words for a fact that is looked up by its place."""
  if fact.target:
    return wording.LINKS[fact.attribute]
  return wording.ATTRIBUTES[fact.attribute]


def _kind(chain: Chain) -> str:
  """Names the attributes of a chain: `2hop:capital-of>internet-code`."""
  parts = [f"{chain.key.attribute}-of"] if chain.key else []
  parts += [link.attribute for link in chain.links]
  parts += [chain.final.attribute] if chain.final else []
  return f'{len(chain.facts)}hop:{">".join(parts)}'


def _visited(chain: Chain) -> tuple[str, ...]:
  """Lists the places of a chain in order."""
  return (chain.start, *(link.target for link in chain.links))


def _capitalized(text: str) -> str:
  """Raises the first letter."""
  return text[0].upper() + text[1:]


def _gives_away(task: Task) -> bool:
  """Whether the question contains an answer it should lead to."""
  if "compare" in task.meta["family"]:
    return False
  found = [a for e in task.evidence for a in e.answers[:1]] + [task.answers[0]]
  return any(
      re.search(rf"(?<!\w){re.escape(a)}(?!\w)", task.question, re.IGNORECASE)
      for a in found
  )


def _attribute(k: Knowledge) -> Iterator[Spec]:
  """Yields single attributes of named places."""
  for place, facts in k.facts.items():
    for fact in facts.values():
      if not fact.target:
        yield Chain(start=place, key=None, links=(), final=fact)


def _place(k: Knowledge) -> Iterator[Spec]:
  """Yields places to be found by one of their values."""
  for place, keys in k.keys.items():
    for key in keys:
      yield Chain(start=place, key=key, links=(), final=None)


def _link(k: Knowledge) -> Iterator[Spec]:
  """Yields places to be found beside, or in trade with, a named one."""
  for place, facts in k.facts.items():
    for fact in facts.values():
      if fact.target:
        yield Chain(start=place, key=None, links=(fact,), final=None)


def _place_attribute(k: Knowledge) -> Iterator[Spec]:
  """Yields attributes of places to be found by another value."""
  for spec in _place(k):
    yield from _finished(k, spec)


def _place_link(k: Knowledge) -> Iterator[Spec]:
  """Yields neighbours and partners of places to be found by a value."""
  for spec in _place(k):
    yield from _linked(k, spec, BORDERS + PARTNERS)


def _border_attribute(k: Knowledge) -> Iterator[Spec]:
  """Yields attributes of neighbours of named places."""
  for spec in _named(k):
    for linked in _linked(k, spec, BORDERS):
      yield from _finished(k, linked)


def _partner_attribute(k: Knowledge) -> Iterator[Spec]:
  """Yields attributes of trade partners of named places."""
  for spec in _named(k):
    for linked in _linked(k, spec, PARTNERS):
      yield from _finished(k, linked)


def _place_link_attribute(k: Knowledge) -> Iterator[Spec]:
  """Yields attributes of neighbours and partners of places to be found."""
  for spec in _place_link(k):
    yield from _finished(k, spec)


def _border_border_attribute(k: Knowledge) -> Iterator[Spec]:
  """Yields attributes of neighbours of neighbours."""
  for spec in _named(k):
    for first in _linked(k, spec, BORDERS):
      for second in _linked(k, first, BORDERS):
        yield from _finished(k, second)


def _compare(k: Knowledge) -> Iterator[Spec]:
  """Yields comparisons of two named places."""
  for spec in _named(k):
    yield from _compared(k, spec)


def _place_compare(k: Knowledge) -> Iterator[Spec]:
  """Yields comparisons of a place to be found with a named one."""
  for spec in _place(k):
    yield from _compared(k, spec)


def _named(k: Knowledge) -> Iterator[Chain]:
  """Yields the named places themselves, nothing looked up yet."""
  for place in k.places:
    yield Chain(start=place, key=None, links=(), final=None)


def _finished(k: Knowledge, chain: Spec) -> Iterator[Chain]:
  """Yields a chain with every attribute its passages do not show already."""
  if isinstance(chain, Comparison):
    raise TypeError("a comparison cannot be continued")
  shown = [fact.passage for fact in chain.facts]
  for fact in k.facts[chain.end].values():
    if not fact.target and fact.passage not in shown:
      yield Chain(
          start=chain.start, key=chain.key, links=chain.links, final=fact
      )


def _linked(
    k: Knowledge, chain: Spec, attributes: Sequence[str]
) -> Iterator[Chain]:
  """Yields a chain with every further link to a place not yet visited."""
  if isinstance(chain, Comparison):
    raise TypeError("a comparison cannot be continued")
  for attribute in attributes:
    link = k.facts[chain.end].get(attribute)
    if link is not None and link.target not in _visited(chain):
      yield Chain(
          start=chain.start,
          key=chain.key,
          links=(*chain.links, link),
          final=None,
      )


def _compared(k: Knowledge, chain: Spec) -> Iterator[Spec]:
  """Yields comparisons of a place with three others, well apart."""
  for left in _finished(k, chain):
    fact = left.final
    if fact is None or fact.attribute not in wording.COMPARISONS:
      continue
    others = [p for p in k.places if fact.attribute in k.facts[p]]
    # A fixed sample: all pairs would be thousands of specs per place.
    near = random.Random(f"{chain}{fact.attribute}").sample(
        others, min(3, len(others))
    )
    for other in near:
      right = k.facts[other][fact.attribute]
      if other != left.start and _apart(fact, right):
        yield Comparison(left=left, right=right)


def _apart(one: Fact, other: Fact) -> bool:
  """Whether two quantities differ clearly."""
  small, large = sorted((one.number or 0.0, other.number or 0.0))
  return large > 0 and large >= small * _MARGIN


FAMILIES: Mapping[str, Callable[[Knowledge], Iterator[Spec]]] = {
    "attribute": _attribute,
    "place": _place,
    "link": _link,
    "border>attribute": _border_attribute,
    "partner>attribute": _partner_attribute,
    "place>link": _place_link,
    "compare": _compare,
    "place>compare": _place_compare,
    "place>link>attribute": _place_link_attribute,
    "border>border>attribute": _border_border_attribute,
    "place>attribute": _place_attribute,
}
