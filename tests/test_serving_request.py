"""Requests as clients send them: all that is wrong is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo_jax.serving import conversation, request
from mgrpo_jax.serving.errors import RequestError

HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD = {"name": "f", "arguments": "{"}
LIST = {"name": "f", "parameters": {"type": "array"}}
PARTS = [{"type": "text", "text": letter} for letter in "ab"]
IMAGE = [{"type": "image_url"}]
CALL = {
    "id": "c",
    "type": "function",
    "function": {"name": "f", "arguments": "{}"},
}


def parse(**fields):
  body = json.dumps(HELLO | fields).encode()
  return request.parse(body, max_choices=4)


def said(**message):
  return {"messages": [message]}


def test_a_short_request_has_the_least():
  asked = parse()
  assert asked.model == "m"
  assert [(m.role, m.content) for m in asked.messages] == [("user", "Hello")]
  assert (asked.n, asked.max_tokens, asked.temperature) == (1, None, None)
  assert (asked.seed, asked.stop, asked.functions) == (None, (), ())
  assert (asked.top_k, asked.top_p, asked.min_p) == (0, 1.0, 0.0)
  assert not (asked.stream or asked.logprobs or asked.return_token_ids)


def test_a_long_request_has_everything():
  asked = parse(
      n=3,
      max_completion_tokens=7,
      temperature=0,
      seed=2**64 - 1,
      stop="x",
      stream=True,
      stream_options={"include_usage": True},
      logprobs=True,
      return_token_ids=True,
      top_k=-1,
      top_p=0.9,
      min_p=0.05,
      presence_penalty=0,
      user="me",
      response_format={"type": "text"},
      logit_bias=None,
      tools=[
          {
              "type": "function",
              "function": {
                  "name": "look-up",
                  "strict": True,
                  "parameters": {
                      "type": "object",
                      "properties": {"q": {"type": "string"}},
                      "required": ["q"],
                  },
              },
          }
      ],
      tool_choice="auto",
  )
  assert (asked.n, asked.max_tokens, asked.temperature) == (3, 7, 0.0)
  assert (asked.seed, asked.stop) == (2**64 - 1, ("x",))
  assert (asked.top_k, asked.top_p, asked.min_p) == (0, 0.9, 0.05)
  assert asked.stream and asked.include_usage and asked.logprobs
  (function,) = asked.functions
  assert function.name == "look-up"
  assert function.schema["required"] == ["q"]


def test_a_conversation_keeps_calls_and_parts():
  asked = parse(
      messages=[
          {
              "role": "user",
              "content": [{"type": "text", "text": t} for t in "ab"],
          },
          {"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "c", "content": "r"},
      ]
  )
  user, assistant, tool = asked.messages
  assert user.content == "ab"
  assert assistant.tool_calls[0].arguments == {}
  assert (tool.tool_call_id, tool.content) == ("c", "r")


def test_tools_that_may_not_be_chosen_are_not_shown():
  assert parse(tools=[TOOL], tool_choice="none").functions == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages"),
        (said(role="robot", content=""), "messages[0].role"),
        (said(content="x"), "messages[0].role"),
        (said(role="user"), "messages[0].content"),
        (said(role="user", content=IMAGE), "messages[0].content"),
        (said(role="user", content=7), "messages[0].content"),
        (
            said(role="user", content="", tool_calls=[CALL]),
            "messages[0].tool_calls",
        ),
        (said(role="tool", content=""), "messages[0].tool_call_id"),
        (said(role="user", content="", mood="good"), "messages[0]"),
        (
            said(role="assistant", tool_calls=[CALL | {"function": BAD}]),
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 0.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": True}, "min_p"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": LIST}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"beam_width": 3}, "beam_width"),
    ],
)
def test_wrong_fields_are_named(fields, param):
  with pytest.raises(RequestError) as caught:
    parse(**fields)
  assert (caught.value.status, caught.value.param) == (400, param)
  assert param in caught.value.message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b'{"n": NaN}', b"\xff\xfe{", b"[" * 100_000],
)
def test_what_is_no_json_object_is_refused(body):
  with pytest.raises(RequestError) as caught:
    request.parse(body, max_choices=1)
  assert caught.value.status == 400


KEYS = (
    "arguments content function id name parameters properties required role"
    " text tool_calls type"
).split()
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
MESSAGE = {
    "role": st.sampled_from(conversation.ROLES),
    "content": JSON,
    "tool_calls": st.lists(JSON, max_size=2),
    "tool_call_id": JSON,
}


@given(st.sampled_from([*request._READ, *request._NEUTRAL]), JSON)
def test_no_value_is_an_internal_error(name, value):
  try:
    parse(**{name: value})
  except RequestError as error:
    assert error.status == 400


@given(st.lists(st.fixed_dictionaries({}, optional=MESSAGE), max_size=3))
def test_no_message_is_an_internal_error(messages):
  try:
    parse(messages=messages)
  except RequestError as error:
    assert error.status == 400
