"""A call and its report as JSON: whole, checked, without tokens."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import trajectory

from mgrpo_jax.decoupled import codec, wire
from mgrpo_jax.decoupled.wire import Call
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.types import Account, Status, Turn

CALL = Call(
    done=3,
    purpose="training",
    seed=2**64 - 1,
    task="peru-capital",
    rollout=7,
    role="researcher",
    attempt=0,
    earlier={"main": 1, "researcher": 2},
    request="capital of Perú 日本",
)
ACCOUNT = Account(
    sampled=30, turns=3, format=True, correct=1.0, expert=0.1, overlong=0.25
)


def report(**changes):
  """A call of the researcher and one below it."""
  first = trajectory(
      role="researcher",
      call=2,
      rollout=7,
      result_text="Lima é",
      account=ACCOUNT,
  )
  below = trajectory(role="reader", parent=0, rollout=7, account=ACCOUNT)
  return (dataclasses.replace(first, **changes), below)


def test_a_call_comes_back_from_json():
  assert wire.read_call(wire.dump(wire.write_call(CALL))) == CALL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "../secrets"),
        ("task", "a/b"),
        ("task", ""),
        ("done", -1),
        ("done", 1.5),
        ("seed", 2**64),
        ("seed", True),
        ("rollout", None),
        ("purpose", "serving"),
        ("earlier", {"main": -1}),
        ("earlier", [1]),
        ("role", 5),
        ("request", "x" * (wire.LONGEST_TEXT + 1)),
        ("tokens", [1, 2]),
    ],
)
def test_what_is_no_call_is_refused_by_name(field, value):
  body = json.dumps(wire.write_call(CALL) | {field: value}).encode()
  with pytest.raises(RequestError, match=field) as caught:
    wire.read_call(body)
  assert caught.value.status == 400


@given(st.binary(max_size=60))
def test_nothing_else_than_a_request_error_comes_of_any_bytes(body):
  with pytest.raises(RequestError):
    wire.read_call(body)


def test_a_report_carries_text_and_numbers_and_no_token():
  told = json.loads(wire.dump(wire.write_report(report())))
  first, below = wire.read_report(told, CALL)
  assert (first.result_text, first.request) == ("Lima é", CALL.request)
  assert (first.account, below.account) == (ACCOUNT, ACCOUNT)
  assert (first.sampled, first.num_turns) == (30, 3)
  assert first.tokens.size == first.loss_mask.size == 0
  assert (below.role, below.parent, below.result_text) == ("reader", 0, "")
  assert first.status == Status.COMPLETED


def test_a_row_begins_as_other_programs_read_it():
  """The columns of docs/bucket.md, in their order."""
  first, _ = report(parent=0, attempt=1, version_min=3, version_max=5)
  row = ["researcher", 2, 0, 1, int(Status.COMPLETED), 3, 5]
  assert wire.head(first) == row
  fields, rest = wire.read_head([*row, 0.5, 6], first.task_id, 7)
  assert rest == [0.5, 6]
  assert fields == {name: getattr(first, name) for name in fields}
  names = {"role", "call", "parent", "attempt", "status", "version_min"}
  assert fields.keys() == names | {"version_max", "task_id", "rollout"}


def test_a_call_without_account_cannot_be_reported():
  with pytest.raises(ValueError, match="has no account"):
    wire.write_report(report(account=None))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: told.pop("text"),
        lambda told: told["calls"].clear(),
        lambda told: told["calls"][0].pop(),
        lambda told: told["calls"][0].__setitem__(0, "main"),
        lambda told: told["calls"][0].__setitem__(1, 0),
        lambda told: told["calls"][1].__setitem__(2, 1),
        lambda told: told["calls"][0].__setitem__(4, 9),
        lambda told: told["calls"][0].__setitem__(11, 2.0),
        lambda told: told["calls"][0].__setitem__(13, None),
        lambda told: told["calls"][0].__setitem__(8, [1, 2, 3]),
        lambda told: told["calls"][0].__setitem__(8, -2),
        lambda told: told["calls"][0].__setitem__(6, -9),
        lambda told: told["calls"][0].__setitem__(2, 0),
        lambda told: told["calls"][0].__setitem__(7, 10**400),
        lambda told: told["calls"][0].__setitem__(7, math.nan),
        lambda told: told["calls"][0].__setitem__(7, -1.0),
        lambda told: told.update(text="\ud800"),
    ],
)
def test_what_is_no_report_of_the_call_is_refused(spoil):
  told = json.loads(wire.dump(wire.write_report(report())))
  spoil(told)
  with pytest.raises(ValueError):
    wire.read_report(told, CALL)


def test_trajectories_come_back_from_disk_bit_for_bit():
  rng = np.random.default_rng(0)
  one = trajectory(
      sampler_logprobs=rng.normal(size=3).astype(np.float32),
      turns=(
          Turn(kind="tool", name="search", argument="é", result="", page=""),
      ),
      account=ACCOUNT,
  )
  back = codec.decode(json.loads(wire.dump(codec.encode(one))))
  for field in dataclasses.fields(one):
    before, after = getattr(one, field.name), getattr(back, field.name)
    if isinstance(before, np.ndarray):
      assert (before.dtype, before.tobytes()) == (after.dtype, after.tobytes())
    else:
      assert before == after
