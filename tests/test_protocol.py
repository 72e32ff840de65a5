"""Text to actions and back, for both protocols."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mgrpo_jax.agents.compact import COMPACT, compact_tags
from mgrpo_jax.agents.hermes import GUIDANCE, HERMES
from mgrpo_jax.agents.llama import LLAMA
from mgrpo_jax.agents.protocol import (
    Action,
    Function,
    Malformed,
    Mark,
    Utterance,
    answer,
    check_arguments,
    delegation,
    scrub,
    spelled,
)
from mgrpo_jax.testing.team import chat_of, small_team, small_tools

PROTOCOLS = (COMPACT, HERMES, LLAMA)
FUNCTIONS = {tool.name: tool.function for tool in small_tools().values()}
FUNCTIONS["researcher"] = delegation("researcher")
PARAMETER = {
    "search": "query",
    "visit": "page",
    "calculate": "expression",
    "researcher": "request",
}
TEXTS = st.text(min_size=1).filter(lambda t: scrub(t).strip() == t)


def said(text):
  return HERMES.parse(Utterance(tag="", text=text), FUNCTIONS)


def tagged(tag, text, **fields):
  utterance = Utterance(tag=tag, text=text, **fields)
  return COMPACT.parse(utterance, FUNCTIONS)


def heard(protocol, action):
  """What an action means once it was written and read."""
  chat = chat_of(protocol, small_team())
  utterance = chat.read(chat.write(protocol.render(action)))
  return protocol.parse(utterance, FUNCTIONS)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
@settings(deadline=None)
@given(name=st.sampled_from(sorted(FUNCTIONS)), text=TEXTS)
def test_functions_are_read_as_they_were_written(protocol, name, text):
  assume("tool_call>" not in text)  # hermes cannot carry its own tags
  action = Action(
      kind=FUNCTIONS[name].kind, name=name, arguments={PARAMETER[name]: text}
  )
  assert heard(protocol, action) == action


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
@pytest.mark.parametrize("text", ["Lima", "42", "a\n\nb", "<search>", "3.5 {x"])
def test_answers_are_read_as_they_were_written(protocol, text):
  action = answer(text)
  assert heard(protocol, action) == action
  assert protocol.argument(action) == text


def test_hermes_reads_what_models_write():
  call = '{"name": "search", "arguments": {"query": "Peru"}}'
  expected = Action(kind="tool", name="search", arguments={"query": "Peru"})
  assert said(f"<tool_call>\n{call}\n</tool_call>") == expected
  assert said(f"I look it up.\n<tool_call>{call}</tool_call>\n") == expected
  assert said(f"<tool_call>[{call}]</tool_call>") == expected
  assert said("<answer> Lima </answer>") == answer("Lima")
  visit = '{"name": "visit", "arguments": {"page": 2}}'
  opened = said(f"<tool_call>{visit}</tool_call>")
  assert isinstance(opened, Action) and opened.arguments == {"page": 2}


GOOD = '{"name": "search", "arguments": {"query": "x"}}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<answer></answer>", "empty"),
        ("<tool_call>", "exactly one"),
        ("</tool_call>", "exactly one"),
        (f"<tool_call>{GOOD}", "exactly one"),
        (f"{GOOD}</tool_call>", "exactly one"),
        (f"</tool_call>{GOOD}<tool_call>", "exactly one"),
        (f"<tool_call>{GOOD}</tool_call>" * 2, "exactly one"),
        (f"<tool_call><tool_call>{GOOD}</tool_call>", "exactly one"),
        (f"<tool_call>{GOOD}</tool_call></tool_call>", "exactly one"),
        (f"<tool_call>{GOOD}</tool_call> so", "ends with"),
        (GOOD, "goes inside"),
        (f"[{GOOD}]", "goes inside"),
        ("<tool_call></tool_call>", "JSON object"),
        ("<tool_call>{</tool_call>", "JSON object"),
        ("<tool_call>[]</tool_call>", "JSON object"),
        (f"<tool_call>[{GOOD},{GOOD}]</tool_call>", "JSON object"),
        ("<tool_call>7</tool_call>", "JSON object"),
        ('<tool_call>{"name": "search"}</tool_call>', "JSON object"),
        (
            '<tool_call>{"name": "fly", "arguments": {}}</tool_call>',
            "unknown function; there are: search, visit",
        ),
        (
            '<tool_call>{"name": ["x"], "arguments": {}}</tool_call>',
            "unknown function",
        ),
        (
            '<tool_call>{"name": "search", "arguments": "x"}</tool_call>',
            "arguments must be",
        ),
        (
            '<tool_call>{"name": "search", "arguments": {}}</tool_call>',
            "query is missing",
        ),
        (
            '<tool_call>{"name":"search","arguments":{"query":1}}</tool_call>',
            "query must be string",
        ),
        (
            '<tool_call>{"name":"visit","arguments":{"page":true}}</tool_call>',
            "page must be string or integer",
        ),
        (
            '<tool_call>{"name":"visit","arguments":{"page":NaN}}</tool_call>',
            "JSON object",
        ),
        (
            '<tool_call>{"name":"search","arguments":{"query":"x","k":1}}'
            "</tool_call>",
            "unknown argument k",
        ),
        ("<tool_call>" + "[" * 9000 + "</tool_call>", "JSON object"),
        ("<tool_call>" + '{"a":' * 3000 + "</tool_call>", "JSON object"),
        ("<tool_call>" + "9" * 6000 + "</tool_call>", "JSON object"),
    ],
)
def test_hermes_says_what_is_wrong(text, reason):
  result = said(text)
  assert isinstance(result, Malformed)
  assert reason in result.reason


@pytest.mark.parametrize(
    ("tag", "text", "fields", "reason"),
    [
        ("", "Peru", {}, "no tag"),
        ("", "", {}, "no tag"),
        ("<fly>", "Peru", {}, "no fly here"),
        ("<task>", "Peru", {}, "no task here"),
        ("<search>", " ", {}, "empty"),
        ("<answer>", "", {}, "empty"),
        ("<answer>", "Peru", {"ended": False}, "cut off"),
        ("<answer>", "Peru", {"stray": ("<result>",)}, "stray <result>"),
    ],
)
def test_compact_says_what_is_wrong(tag, text, fields, reason):
  result = tagged(tag, text, **fields)
  assert isinstance(result, Malformed)
  assert reason in result.reason


def test_roles_cannot_use_what_they_were_not_given():
  only = {"search": FUNCTIONS["search"]}
  call = '<tool_call>{"name":"visit","arguments":{"page":"1"}}</tool_call>'
  assert isinstance(HERMES.parse(Utterance(tag="", text=call), only), Malformed)
  tag = Utterance(tag="<visit>", text="1")
  assert isinstance(COMPACT.parse(tag, only), Malformed)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(
    tag=st.sampled_from(["", "<search>", "<answer>", "<x>", "<", "<<>>"]),
    text=st.text(st.characters()) | JSON.map(json.dumps),
    wrap=st.sampled_from(["{}", "<tool_call>{}</tool_call>", "<answer>{}"]),
    ended=st.booleans(),
)
def test_no_text_breaks_a_parser(tag, text, wrap, ended):
  for protocol in PROTOCOLS:
    utterance = Utterance(tag=tag, text=wrap.replace("{}", text), ended=ended)
    result = protocol.parse(utterance, FUNCTIONS)
    assert isinstance(result, Action | Malformed)
    if isinstance(result, Action):
      protocol.argument(result).encode()  # valid Unicode
      assert ended


@settings(deadline=None)
@given(
    name=st.sampled_from([*FUNCTIONS, "fly"]),
    arguments=st.dictionaries(
        st.sampled_from([*PARAMETER.values(), "x"]), JSON, max_size=2
    ),
)
def test_arguments_that_pass_are_of_the_schemas_types(name, arguments):
  call = json.dumps({"name": name, "arguments": arguments})
  result = said(f"<tool_call>{call}</tool_call>")
  if isinstance(result, Action):
    assert set(result.arguments) == {PARAMETER[name]}
    kinds = (str, int) if name == "visit" else (str,)
    assert type(result.arguments[PARAMETER[name]]) in kinds


def test_lone_surrogates_do_not_get_through():
  text = (
      '<tool_call>{"name":"search","arguments":{"query":"\\ud800"}}</tool_call>'
  )
  result = said(text)
  assert isinstance(result, Action) and result.arguments == {"query": "?"}
  assert scrub("a\udfffb") == "a?b"


def test_hermes_shows_the_functions_as_json():
  functions = list(FUNCTIONS.values())
  system = spelled(HERMES.system("You are a guide.", functions))
  assert system.startswith(f"You are a guide.\n\n{GUIDANCE}\n\n# Tools\n")
  block = system.split("<tools>\n")[1].split("\n</tools>")[0]
  signatures = [json.loads(line)["function"] for line in block.splitlines()]
  assert [s["name"] for s in signatures] == list(FUNCTIONS)
  assert signatures[0]["parameters"] == FUNCTIONS["search"].schema
  assert HERMES.system("Just answer.", []) == "Just answer."
  alone = spelled(HERMES.system("", functions))
  assert alone.startswith(f"{GUIDANCE}\n\n# Tools")


def test_hermes_wraps_results_as_models_expect():
  pieces = (Mark("<tool_response>"), "\nx\n", Mark("</tool_response>"))
  assert HERMES.wrap("x") == pieces
  assert COMPACT.wrap("x") == "x"


def test_compact_refuses_functions_of_two_arguments():
  schema = {
      "type": "object",
      "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
      "required": ["a", "b"],
  }
  two = Function(kind="tool", name="two", description="", schema=schema)
  with pytest.raises(ValueError, match="'two' needs arguments"):
    COMPACT.system("", [two])
  action = Action(kind="tool", name="two", arguments={"a": "x", "b": "y"})
  with pytest.raises(ValueError, match="exactly one"):
    COMPACT.render(action)


def test_compact_tags_of_a_team():
  assert compact_tags(small_team()) == (
      "<task>",
      "<result>",
      "<end>",
      "<answer>",
      "<search>",
      "<visit>",
      "<calculate>",
      "<researcher>",
  )


def test_numbers_are_not_booleans():
  schema = {
      "type": "object",
      "properties": {"n": {"type": "number"}, "b": {"type": "boolean"}},
      "required": [],
  }
  assert check_arguments(schema, {"n": 1.5, "b": True}) == ""
  assert "n must be number" in check_arguments(schema, {"n": True})
  assert "b must be boolean" in check_arguments(schema, {"b": 1})


def test_arguments_may_be_lists_objects_and_null():
  types = {"l": "array", "o": "object", "z": ["null", "string"]}
  properties = {name: {"type": kind} for name, kind in types.items()}
  schema = {"type": "object", "properties": properties, "required": []}
  good = {"l": [1, {}], "o": {"x": []}, "z": None}
  assert check_arguments(schema, good) == ""
  for wrong in ({"l": {}}, {"o": []}, {"z": []}, {"o": None}):
    assert "must be" in check_arguments(schema, wrong)
