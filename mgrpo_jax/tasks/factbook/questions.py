"""Questions of one, two and three hops, drawn from the facts of a split."""

import dataclasses
import random
from collections.abc import Mapping

from mgrpo_jax.tasks.factbook import asking, wording
from mgrpo_jax.tasks.factbook.facts import Fact, contains
from mgrpo_jax.tasks.factbook.specs import (
    FAMILIES,
    Chain,
    Comparison,
    Knowledge,
    Spec,
)
from mgrpo_jax.types import Evidence, Task

_ROUNDS = 8  # how often a family's questions may be worded anew


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
    template = rng.choice(asking.ATTRIBUTES[final.attribute].questions)
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
      places=spec.visited,
  )


def _word_comparison(
    knowledge: Knowledge, spec: Comparison, family: str, rng: random.Random
) -> Task:
  """Puts a comparison into words."""
  final = spec.left.final
  if final is None or final.number is None or spec.right.number is None:
    raise ValueError(f"comparison without numbers: {spec}")
  right = Chain(start=spec.right.place, key=None, links=(), final=spec.right)
  sides = (spec.left, right)
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


def _asked(fact: Fact) -> asking.Asked | wording.Link:
  """Returns the words for a fact that is looked up by its place."""
  if fact.target:
    return wording.LINKS[fact.attribute]
  return asking.ATTRIBUTES[fact.attribute]


def _kind(chain: Chain) -> str:
  """Names the attributes of a chain: `2hop:capital-of>internet-code`."""
  parts = [f"{chain.key.attribute}-of"] if chain.key else []
  parts += [link.attribute for link in chain.links]
  parts += [chain.final.attribute] if chain.final else []
  return f'{len(chain.facts)}hop:{">".join(parts)}'


def _capitalized(text: str) -> str:
  """Raises the first letter."""
  return text[0].upper() + text[1:]


def _gives_away(task: Task) -> bool:
  """Whether the question contains an answer it should lead to."""
  if "compare" in task.meta["family"]:
    return False
  found = [a for e in task.evidence for a in e.answers[:1]] + [task.answers[0]]
  return any(contains(task.question, answer) for answer in found)
