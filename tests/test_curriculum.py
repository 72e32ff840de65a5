import pytest

from mgrpo_jax.tasks import curriculum


def stage(name="easy", **changes):
  fields = {
      "name": name,
      "objective": "reinforce",
      "steps": 3,
      "families": (),
      "trained": frozenset({"main"}),
      "learning_rate": 1e-3,
      "final_fraction": 1.0,
  }
  return curriculum.Stage(**{**fields, **changes})


def test_steps_belong_to_stages_in_order():
  stages = (stage("a"), stage("b", steps=0), stage("c", steps=2))
  found = [curriculum.stage_at(stages, step) for step in range(5)]
  assert [(s.name, n) for s, n in found] == [
      ("a", 0),
      ("a", 1),
      ("a", 2),
      ("c", 0),
      ("c", 1),
  ]
  assert curriculum.num_steps(stages) == 5
  for step in (-1, 5):
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
      curriculum.stage_at(stages, step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "dream"}, "objective"),
        ({"steps": -1}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_impossible_values_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    stage(**change)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("ab", [(0, 4)]),
        ("ac", [(0, 3), (4, 6)]),
        ("c", [(4, 6)]),
        ("abc", [(0, 6)]),
        ("", []),
        ("e", []),  # it has no steps
        ("aec", [(0, 3), (4, 6)]),
    ],
)
def test_steps_of_stages_that_follow_each_other_are_one_span(wanted, expected):
  stages = (
      stage("a"),
      stage("b", steps=1),
      stage("e", steps=0),
      stage("c", steps=2),
  )
  found = curriculum.spans(stages, lambda one: one.name in wanted)
  assert found == tuple(range(*one) for one in expected)
