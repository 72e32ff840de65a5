"""What a job keeps of a call, and what it must not go on without."""

import types

import pytest

from mgrpo_jax.atomic import MismatchError
from mgrpo_jax.decoupled import wire
from mgrpo_jax.decoupled.part import Part
from mgrpo_jax.types import Account, Status

TOLD = wire.stub(
    {
        "task_id": "t",
        "rollout": 1,
        "role": "researcher",
        "call": 0,
        "parent": 0,
        "attempt": 0,
        "status": Status.FAILED,
        "version_min": 0,
        "version_max": 0,
        "seconds": 0.0,
    },
    Account(
        sampled=3, turns=1, format=True, correct=None, expert=None, overlong=0.0
    ),
)
NOTHING = types.SimpleNamespace(
    desk=types.SimpleNamespace(own=lambda identity: None)
)


def test_a_call_that_a_machine_failed_on_stands_as_it_is_told():
  assert Part._kept(NOTHING, 7, TOLD, failed=True) is TOLD


def test_any_other_call_must_have_been_kept():
  with pytest.raises(
      MismatchError, match="'researcher' in rollout 1 of task t"
  ):
    Part._kept(NOTHING, 7, TOLD, failed=False)
