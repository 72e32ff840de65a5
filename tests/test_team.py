"""Teams are checked when they are built."""

import dataclasses

import pytest

from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.testing.team import small_team


def role(name, **changes):
  fields = {
      "policy": "p",
      "prompt": "",
      "tools": (),
      "calls": (),
      "max_turns": 4,
      "max_new_tokens": 10,
      "max_context": 100,
      "max_calls": 2 if changes.get("calls") else 0,
      "trainable": True,
      "attempts": 1,
  }
  return Role(name=name, **(fields | changes))


def test_root_stands_first():
  team = Team(roles=(role("a"), role("main", calls=("a",))), root="main")
  assert [r.name for r in team.roles] == ["main", "a"]
  assert team.index("main") == 0 and team.index("a") == 1
  assert team["a"].name == "a"
  with pytest.raises(KeyError):
    team["nobody"]


def test_policies_are_named_once():
  team = Team(
      roles=(
          role("main", calls=("a", "b"), policy="x"),
          role("a", policy="y"),
          role("b", policy="x"),
      ),
      root="main",
  )
  assert team.policies == ("x", "y")


def test_a_deeper_tree_is_allowed():
  Team(
      roles=(
          role("main", calls=("a", "b")),
          role("a", calls=("c",)),
          role("b", calls=("c",)),
          role("c"),
      ),
      root="main",
  )


@pytest.mark.parametrize(
    ("roles", "root", "message"),
    [
        ((role("a"),), "b", "root: unknown role 'b'"),
        ((role("a"), role("a")), "a", "names must differ"),
        ((role("a", calls=("b",)),), "a", r"calls names unknown.*\['b'\]"),
        ((role("a"), role("b")), "a", r"\['b'\] cannot be reached"),
        (
            (role("a", calls=("b",)), role("b", calls=("a",))),
            "a",
            "cycle, a -> b -> a",
        ),
        ((role("a", calls=("a",)),), "a", "cycle, a -> a"),
        ((), "a", "root: unknown role"),
    ],
)
def test_wrong_teams_are_refused(roles, root, message):
  with pytest.raises(ValueError, match=message):
    Team(roles=roles, root=root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Main"}, "name: 'Main'"),
        ({"name": "answer"}, "name: 'answer'"),
        ({"name": "a b"}, "name: 'a b'"),
        ({"policy": ""}, "policy"),
        ({"tools": ("end",)}, "tools and calls: 'end'"),
        ({"tools": ("x", "x")}, r"repeat \['x'\]"),
        ({"tools": ("x",), "calls": ("x",)}, r"repeat \['x'\]"),
        ({"max_turns": 0}, "max_turns is 0"),
        ({"max_turns": True}, "max_turns is True"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_context": -1}, "max_context is -1"),
        ({"max_context": 10}, "max_new_tokens is 10, must be less"),
        ({"max_turns": 1.5}, "max_turns is 1.5"),
        ({"calls": ("x",), "max_calls": 0}, "max_calls is 0"),
        ({"max_calls": 1}, "max_calls is 1 but calls is empty"),
        ({"max_calls": -1}, "max_calls is -1"),
    ],
)
def test_wrong_roles_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    role(**({"name": "a"} | changes))


def test_roles_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    small_team().roles[0].name = "x"


def test_most_calls_multiplies_down_the_tree():
  team = Team(
      roles=(
          role("main", calls=("a", "b"), max_calls=3),
          role("a", calls=("c",), max_calls=2),
          role("b", calls=("c",), max_calls=4),
          role("c"),
      ),
      root="main",
  )
  calls = {r.name: team.most_calls(r.name) for r in team.roles}
  assert calls == {"main": 1, "a": 3, "b": 3, "c": 3 * 2 + 3 * 4}


def test_most_calls_of_a_policy_that_are_open_at_once():
  roles = dict(a=("b", "c"), b=("d",), c=(), d=())
  team = Team(
      root="a",
      roles=tuple(
          role(
              n, policy="odd" if n == "b" else "even", calls=c, max_calls=len(c)
          )
          for n, c in roles.items()
      ),
  )
  assert team.most_open("even") == 2  # a waits for d, or for c
  assert team.most_open("odd") == 1
  assert team.most_open("other") == 0


TREE = Team(
    roles=(
        role("main", calls=("a", "b"), max_calls=3, policy="m"),
        role("a", calls=("c",), max_calls=2, policy="x"),
        role("b", policy="y"),
        role("c", policy="x"),
    ),
    root="main",
)


def test_other_policies_play_roles_and_nothing_else_changes():
  found = TREE.cast({"a": "z", "main": "n"})
  assert [r.policy for r in found.roles] == ["n", "z", "y", "x"]
  assert found.cast({"a": "x", "main": "m"}) == TREE
  assert TREE.cast({}) == TREE
  with pytest.raises(ValueError, match=r"unknown roles \['d'\]; there are"):
    TREE.cast({"d": "z"})


def test_who_is_not_there_is_called_by_nobody():
  found = TREE.without(("a", "c"))
  assert [r.name for r in found.roles] == ["main", "b"]
  assert found["main"].calls == ("b",) and found["main"].max_calls == 3
  assert found["b"] == TREE["b"]
  alone = TREE.without(("a", "b", "c"))
  assert alone["main"].calls == () and alone["main"].max_calls == 0
  assert TREE.without(()) == TREE


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (("d",), r"unknown roles \['d'\]; there are \['main', 'a', 'b', 'c'\]"),
        (("main",), "'main': is the root"),
        (("a",), r"\['c'\] cannot be reached"),
    ],
)
def test_who_cannot_be_away_is_named(absent, message):
  with pytest.raises(ValueError, match=message):
    TREE.without(absent)
