import asyncio

import hypothesis
import hypothesis.strategies as st
import numpy as np

from mgrpo_jax.agents import renaming
from mgrpo_jax.agents.tools import Memory
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.team import small_tools

POOL = ("Vitebsk", "Majuro Atoll", "Moxico Leste", "Ain Defla", "Semien")


def drawn(seed):
  return renaming.draw(corpus.task(), POOL, np.random.default_rng(seed))


def test_every_name_of_the_hops_is_replaced_everywhere():
  told = drawn(0)
  assert set(told.names) == {"Peru", "Lima", "Chad"}
  other = told.task(corpus.task())
  said = " ".join(
      [other.question, *other.answers]
      + [t for hop in other.evidence for t in (hop.question, *hop.answers)]
  )
  for old, new in told.names.items():
    assert old not in said
    assert new in said
  assert [hop.page for hop in other.evidence] == [
      hop.page for hop in corpus.task().evidence
  ]


@hypothesis.given(st.integers(0, 1000))
def test_names_are_put_back(seed):
  told = drawn(seed)
  text = corpus.task().question
  assert told(text) != text
  assert told.inverse(told(text)) == text
  assert len(set(told.names.values())) == len(told.names)


def test_parts_of_words_are_left_alone():
  told = renaming.Renaming(names={"Chad": "Semien", "Niger": "Peru"})
  assert told("Chadian, Chad; Nigeria, Niger.") == (
      "Chadian, Semien; Nigeria, Peru."
  )


def test_a_renamed_tool_is_asked_and_answers_under_other_names():
  told = renaming.Renaming(names={"Peru": "Vitebsk", "Lima": "Ain Defla"})
  tools = {n: told.tool(t) for n, t in small_tools().items()}
  memory = Memory()
  found = asyncio.run(tools["search"].run({"query": "Vitebsk capital"}, memory))
  assert found.text.splitlines()[0] == "1 Vitebsk: Capital"
  opened = asyncio.run(tools["visit"].run({"page": "1"}, memory))
  assert opened.text.startswith("Vitebsk: Capital\nAin Defla")
  assert opened.page == "peru/facts#capital"
