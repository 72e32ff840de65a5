"""Search, visit, calculate, and the limits that every tool runs within."""

import asyncio
import dataclasses
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import bm25

from mgrpo_jax.agents.errors import InfrastructureError, ToolError
from mgrpo_jax.agents.tools import (
    Memory,
    Observation,
    SearchIndex,
    Tool,
    calculate,
    run_tool,
    search,
    visit,
)
from mgrpo_jax.agents.tools.calculate import evaluate
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing.team import small_tools

PASSAGES = corpus.passages()
INDEX = SearchIndex(PASSAGES, title_weight=3, cache_size=8)
TOOLS = small_tools(max_chars=60)


def use(name, text, memory=None, tools=TOOLS):
  parameter = next(iter(tools[name].schema["properties"]))
  return asyncio.run(
      run_tool(tools[name], {parameter: text}, memory or Memory())
  )


def tool(run, deadline=0.05, max_chars=100):
  return Tool(
      name="t",
      description="",
      schema={"type": "object", "properties": {}, "required": []},
      run=run,
      deadline=deadline,
      max_chars=max_chars,
  )


# --- search ---

WORDS = ["peru", "capital", "lima", "of", "given", "for", "rupee", "zebra"]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4))
@settings(deadline=None)
def test_ranking_is_bm25s(words):
  documents = [f"{p.title} " * 3 + p.text for p in PASSAGES]
  scores = bm25.scores(" ".join(words), documents, k1=1.5, b=0.75)
  ranked = sorted(
      (i for i in range(len(scores)) if scores[i] > 0),
      key=lambda i: (-round(scores[i], 4), i),
  )
  found = INDEX.find(" ".join(words), limit=len(PASSAGES))
  got = [PASSAGES.index(passage) for passage in found]
  assert sorted(got) == sorted(ranked)
  # Equal up to float32: neighbours may swap only where scores are that close.
  assert [scores[i] for i in got] == pytest.approx(
      [scores[i] for i in ranked], rel=1e-4
  )


def test_ties_keep_the_given_order():
  found = INDEX.find("languages", limit=3)
  assert [p.title for p in found] == [
      "Peru: Languages",
      "Chad: Languages",
      "Nepal: Languages",
  ]
  swapped = SearchIndex(PASSAGES[::-1], title_weight=3, cache_size=8)
  assert [p.title for p in swapped.find("languages", limit=2)] == [
      "Fiji: Languages",
      "Nepal: Languages",
  ]


def test_many_ties_keep_the_given_order():
  documents = tuple(
      corpus.Passage(id=str(i), title="x", text="lima " * (1 + i % 2) + "y")
      for i in range(200)
  )
  index = SearchIndex(documents, title_weight=1, cache_size=1)
  found = [int(p.id) for p in index.find("lima", limit=200)]
  assert found == [*range(1, 200, 2), *range(0, 200, 2)]
  assert [int(p.id) for p in index.find("lima", limit=3)] == [1, 3, 5]


def test_case_and_punctuation_do_not_matter():
  assert INDEX.find("peru CAPITAL?!", limit=4) == INDEX.find(
      "Peru, capital", limit=4
  )


@pytest.mark.parametrize("query", ["", " ", "?", "zebra", "\x00", "日本"])
def test_nothing_found(query):
  memory = Memory(results=("old",))
  assert use("search", query, memory) == Observation(text="no results")
  assert memory.results == ()


def test_results_are_numbered_and_remembered():
  memory = Memory()
  observation = use("search", "capital of peru", memory)
  lines = observation.text.splitlines()
  assert lines[0] == "1 Peru: Capital"
  assert [line.split(" ")[0] for line in lines] == ["1", "2", "3"]
  assert memory.results[0] == "peru/facts#capital"
  assert len(memory.results) == 3


def test_titles_weigh_more():
  documents = (
      corpus.Passage(id="a", title="x: x", text="lima lima lima and so on"),
      corpus.Passage(id="b", title="Lima: x", text="a city and so on"),
  )
  light = SearchIndex(documents, title_weight=1, cache_size=1)
  heavy = SearchIndex(documents, title_weight=9, cache_size=1)
  assert light.find("lima", limit=1)[0].id == "a"
  assert heavy.find("lima", limit=1)[0].id == "b"


def test_threads_share_an_index():
  queries = [p.title for p in PASSAGES] * 5
  expected = [INDEX.find(q, limit=2) for q in queries]
  results: dict[int, list] = {}

  def work(number):
    results[number] = [INDEX.find(q, limit=2) for q in queries]

  threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert all(results[i] == expected for i in range(4))


def test_wrong_indices_are_refused():
  with pytest.raises(ValueError, match="passages"):
    SearchIndex((), title_weight=1, cache_size=1)
  with pytest.raises(ValueError, match="title_weight: is 0"):
    SearchIndex(PASSAGES, title_weight=0, cache_size=1)
  with pytest.raises(ValueError, match="num_results: is 0"):
    search(INDEX, num_results=0, deadline=1.0, max_chars=10)


# --- visit ---


def test_visit_opens_what_the_search_listed():
  memory = Memory()
  use("search", "currency of Chad", memory)
  observation = use("visit", "1", memory)
  assert observation.page == "chad/facts#currency"
  assert observation.text == "Chad: Currency\nCFA franc; as given for Chad"
  assert use("visit", " 2 ", memory).page == memory.results[1]
  assert use("visit", 2, memory).page == memory.results[1]


def test_visit_opens_passages_and_pages_by_id():
  passage = use("visit", "nepal/facts#capital")
  assert passage.text.startswith("Nepal: Capital\nKathmandu")
  wide = small_tools(max_chars=500)
  page = use("visit", "nepal/facts", tools=wide)
  assert page.page == "nepal/facts"
  assert page.text.count("Nepal: ") == 3
  assert len(use("visit", "nepal/facts").text) == 60


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("0", "no result 0, 1 to 3"),
        ("4", "no result 4, 1 to 3"),
        ("9" * 5000, "no result 999999, 1 to 3"),
        ("-1", "no such page"),
        ("²", "no such page"),
        ("atlantis", "no such page"),
        ("", "no such page"),
    ],
)
def test_visit_helps_where_it_cannot(wanted, message):
  memory = Memory()
  use("search", "peru", memory)
  observation = use("visit", wanted, memory)
  assert observation.text.startswith(f"error: {message}")
  assert observation.outcome == "error" and observation.page == ""


def test_visit_before_any_search():
  assert "search first" in use("visit", "1").text


# --- calculate ---


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("1 + 2 * 3", "7"),
        ("(1,285,216 - 7) / 3", "428403"),
        ("2^10", "1024"),
        ("2**0.5", "1.414213562"),
        ("7 // 2 - -1", "4"),
        ("7 % 4", "3"),
        ("10 ÷ 4 × 2 − 1", "4"),
        ("0.1 + 0.2", "0.3"),
        ("2**-1", "0.5"),
        ("(-8) ** 3", "-512"),
        ("0 ** 0", "1"),
        ("12345678901234567890 + 1", "12345678901234567891"),
        ("1 / 3", "0.3333333333"),
    ],
)
def test_calculate(expression, text):
  assert use("calculate", expression) == Observation(text=text)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "not an arithmetic"),
        ("1 +", "not an arithmetic"),
        ("__import__('os')", "not an arithmetic"),
        ("x", "not an arithmetic"),
        ("'a' * 9", "not an arithmetic"),
        ("True + 1", "not an arithmetic"),
        ("1j", "not an arithmetic"),
        ("0x10or 1", "not an arithmetic"),
        ("1(2)", "not an arithmetic"),
        ("[1] * 3", "not an arithmetic"),
        ("1 < 2", "not an arithmetic"),
        ("~1", "not an arithmetic"),
        ("1 << 9", "not an arithmetic"),
        ("\x00", "not an arithmetic"),
        ("1 @ 2", "not an arithmetic"),
        ("(" * 199, "not an arithmetic"),
        ("1 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("9**9**9", "too large"),
        ("10**31", "too large"),
        ("1e308 * 10", "too large"),
        ("1e999", "too large"),
        ("9" * 150, "too large"),
        ("2 ** -1e308", "too large"),
        ("(-8) ** 0.5", "root of a negative"),
        ("1" * 201, "longer than 200"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_calculate_refuses(expression, message):
  start = time.perf_counter()
  observation = use("calculate", expression, tools=small_tools())
  assert observation.text.startswith("error: ")
  assert message in observation.text
  assert time.perf_counter() - start < 2  # 9**9**9 would take for ever


NUMBERS = st.integers(0, 10**6).map(str) | st.floats(0, 1e6).map(repr)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda e: st.tuples(
        st.just("("),
        e,
        st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]),
        e,
        st.just(")"),
    ).map("".join),
    max_leaves=12,
)


@settings(deadline=None)
@given(EXPRESSIONS | st.text("0123456789.,+-*/%()^ eE", max_size=30))
def test_calculate_yields_a_bounded_number_or_an_error(expression):
  try:
    value = evaluate(expression)
  except ToolError:
    return
  assert isinstance(value, int | float) and abs(value) <= 1e30
  for node in "+-*/%^":
    if node in expression:
      return
  assert value == pytest.approx(float(expression.strip("() ").replace(",", "")))


# --- limits ---


def test_numbers_are_never_cut():
  with pytest.raises(ValueError, match="max_chars: is 31"):
    calculate(deadline=1.0, max_chars=31)
  longest = use("calculate", "-(10 ** 30)").text
  assert longest == "-1" + "0" * 30 and len(longest) == 32


def run_for(seconds):
  async def run(arguments, memory):
    del arguments, memory
    await asyncio.sleep(seconds)
    return Observation(text="x" * 1000, page="p")

  return run


def test_results_are_cut_to_size():
  observation = asyncio.run(run_tool(tool(run_for(0)), {}, Memory()))
  assert observation == Observation(text="x" * 100, page="p")


def test_a_deadline_is_an_observation():
  observation = asyncio.run(run_tool(tool(run_for(60)), {}, Memory()))
  assert observation.outcome == "timeout"
  assert observation.text == "error: t took longer than 0.05 s"


def test_a_tool_that_ignores_cancellation_holds_nobody_up():
  events = []

  async def stubborn(arguments, memory):
    del arguments, memory
    for _ in range(20):
      try:
        await asyncio.sleep(0.05)
      except asyncio.CancelledError:
        events.append("cancelled")
    events.append("ended")
    raise OSError("nobody waits for this")

  async def main():
    observation = await run_tool(tool(stubborn), {}, Memory())
    events.append("returned")
    left = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait(left)
    return observation

  assert asyncio.run(main()).outcome == "timeout"
  assert events == ["returned", "cancelled", "ended"]


def raising(error):
  async def run(arguments, memory):
    raise error

  return run


def test_refusals_are_observations_and_breakage_is_not():
  refused = asyncio.run(
      run_tool(tool(raising(ToolError("not so"))), {}, Memory())
  )
  assert refused == Observation(text="error: not so", outcome="error")
  for error in (
      InfrastructureError("disk"),
      KeyError("bug"),
      TimeoutError("the tool's own"),
  ):
    with pytest.raises(InfrastructureError):
      asyncio.run(run_tool(tool(raising(error)), {}, Memory()))


def test_a_cancelled_caller_cancels_its_tool():
  seen = []

  async def run(arguments, memory):
    try:
      await asyncio.sleep(60)
    except asyncio.CancelledError:
      seen.append("cancelled")
      raise

  async def main():
    slow = dataclasses.replace(tool(run), deadline=60.0)
    task = asyncio.ensure_future(run_tool(slow, {}, Memory()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    await asyncio.sleep(0)

  asyncio.run(main())
  assert seen == ["cancelled"]


def test_invalid_unicode_is_cleaned():
  async def run(arguments, memory):
    del arguments, memory
    return Observation(text="a\ud800")

  assert asyncio.run(run_tool(tool(run), {}, Memory())).text == "a?"


@pytest.mark.parametrize("limits", [{"deadline": 0}, {"max_chars": 0}])
def test_wrong_limits_are_refused(limits):
  (name,) = limits
  with pytest.raises(ValueError, match=f"'visit': {name} is 0"):
    visit(PASSAGES, **({"deadline": 1.0, "max_chars": 9} | limits))
