"""Whom the leader waits for where a role is given to another policy."""

import asyncio
import dataclasses
import types

import pytest
from delegating import cast_setup

from mgrpo_jax.decoupled.leader import Leader


@pytest.mark.parametrize(
    ("order", "done", "expected"),
    [
        (("imitate", "reinforce", "late"), 3, [("researcher", 2)]),
        # Demonstrations come last, but do not teach what was told before.
        (("reinforce", "imitate", "late"), 3, [("researcher", 1)]),
        (("imitate", "late"), 1, []),  # it has its own
        (("late", "reinforce"), 2, []),  # it has yet to come
    ],
)
def test_who_leaves_is_waited_for_once_until_it_has_what_it_was_told(
    order, done, expected
):
  setup = cast_setup(seed=0)
  stages = {one.name: one for one in setup.stages}
  found = []

  async def trained(policy, step):
    found.append((policy, step))

  leader = types.SimpleNamespace(
      setup=dataclasses.replace(setup, stages=[stages[n] for n in order]),
      _gone=frozenset(),
      _trained=trained,
  )
  for _ in range(2):
    asyncio.run(Leader._let_go(leader, "researcher", done))
  assert found == expected
