import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import rewards as oracle
from rules import RULES, grade
from trajectories import evidence, group, task, trajectory, turn

from mgrpo_jax import answers, grades, rewards
from mgrpo_jax.types import Status

PAPER = {
    "main": rewards.RewardWeights(
        format=0.1, correct=0.9, expert=0.0, overlong=0.0
    ),
    "researcher": rewards.RewardWeights(
        format=0.1, correct=0.4, expert=0.5, overlong=0.0
    ),
}
CAPITAL = evidence("peru/government#capital", "capital of Peru", "Lima")
AREA = evidence("peru/geography#area", "area of Peru", "1,285,216 sq km")
TASK = task(CAPITAL, AREA, answers=("Lima",))


def visit(page, result=""):
  return turn("tool", name="visit", page=page, result=result)


def root(rollout=0, **fields):
  return trajectory(rollout=rollout, **{"result_text": "Lima", **fields})


def call(rollout=0, number=0, parent=0, **fields):
  defaults = dict(
      role="researcher",
      call=number,
      parent=parent,
      rollout=rollout,
      request="capital of Peru",
      result_text="Lima",
      turns=(visit(CAPITAL.page),),
  )
  return trajectory(**{**defaults, **fields})


def score(trajectories, num_rollouts=1, rules=RULES, weights=PAPER):
  return rewards.score(
      group(TASK, trajectories, num_rollouts), weights=weights, rules=rules
  )


@given(
    st.tuples(*[st.floats(0, 2, width=32)] * 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.25, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_totals_equal_the_equations(
    shares, main_valid, call_valid, correct, grade
):
  a1, a2, b1, b2, b3 = shares
  weights = {
      "main": rewards.RewardWeights(
          format=a1, correct=a2, expert=0.0, overlong=0.0
      ),
      "researcher": rewards.RewardWeights(
          format=b1, correct=b2, expert=b3, overlong=0.0
      ),
  }
  bad = (turn("malformed"),)
  scores = score(
      [
          root(
              result_text="Lima" if correct else "Quito",
              turns=() if main_valid else bad,
          ),
          call(turns=() if call_valid else bad),
      ],
      rules=dataclasses.replace(RULES, expert=lambda *_: grade),
      weights=weights,
  )
  expected = [
      oracle.main_reward(
          a1=a1, a2=a2, format_valid=main_valid, correct=correct
      ),
      oracle.sub_reward(
          b1=b1,
          b2=b2,
          b3=b3,
          format_valid=call_valid,
          main_correct=correct,
          expert=grade,
      ),
  ]
  np.testing.assert_allclose(scores.total, expected, rtol=1e-6)
  np.testing.assert_array_equal(scores.format, [main_valid, call_valid])
  np.testing.assert_array_equal(scores.correct, [correct, correct])
  np.testing.assert_array_equal(scores.weight, 1.0)


def test_every_call_of_a_rollout_shares_its_own_roots_correctness():
  scores = score(
      [root(0), call(0), call(0, 1), root(1, result_text="Quito"), call(1)], 2
  )
  np.testing.assert_array_equal(scores.correct, [1, 1, 1, 0, 0])
  np.testing.assert_allclose(scores.total, [1, 1, 1, 0.1, 0.6], rtol=1e-6)


def test_components_are_recorded_beside_the_total():
  record = score([root(), call()]).records()[1]
  assert record == {
      "format": 1.0,
      "correct": 1.0,
      "expert": 1.0,
      "overlong": 0.0,
      "total": pytest.approx(1.0),
  }


@pytest.mark.parametrize(
    ("tokens", "deep"), [(50, 0), (80, 0), (90, 0.5), (100, 1), (120, 1)]
)
def test_the_end_of_the_context_costs(tokens, deep):
  rules = dataclasses.replace(
      RULES,
      overlong=functools.partial(
          grades.overlong, longest={"main": 100, "researcher": 300}, buffer=20
      ),
  )
  weights = {
      name: dataclasses.replace(one, overlong=0.5)
      for name, one in PAPER.items()
  }
  long = {"tokens": np.zeros(tokens, np.int32)}
  calls = [root(**long), call(**long), root(1, **long, result_text="")]
  scores = score(calls, 2, rules=rules, weights=weights)
  np.testing.assert_allclose(scores.overlong, [deep, 0, deep])
  np.testing.assert_allclose(
      scores.total, [1 - deep / 2, 1, -deep / 2], rtol=1e-6
  )
  # Where it is to cost nothing, it is not recorded either.
  np.testing.assert_array_equal(score(calls, 2, rules=rules).overlong, 0)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_failure_is_no_wrong_answer(position):
  broken = [root(0), call(0), call(0, 1), root(1), call(1)]
  broken[position] = dataclasses.replace(
      broken[position], status=Status.FAILED, result_text=""
  )
  scores = score(broken, 2)
  # Nothing of the rollout counts, all of the other one does.
  np.testing.assert_array_equal(scores.weight, [0, 0, 0, 1, 1])
  assert all(np.isfinite(v).all() for v in dataclasses.astuple(scores))
  assert scores.records()[:3] == [{}, {}, {}]


def test_a_judge_that_failed_is_no_zero():
  no_grade = dataclasses.replace(RULES, expert=lambda *_: None)
  np.testing.assert_array_equal(
      score([root(), call()], rules=no_grade).weight, [1, 0]
  )
  no_verdict = dataclasses.replace(RULES, correct=lambda *_: None)
  scores = score([root(), call(), root(1)], 2, rules=no_verdict)
  np.testing.assert_array_equal(scores.weight, [0, 0, 0])


@pytest.mark.parametrize("grade", [np.nan, np.inf, -np.inf])
def test_a_grade_that_is_no_number_is_refused(grade):
  rules = dataclasses.replace(RULES, expert=lambda task, trajectory: grade)
  with pytest.raises(ValueError, match="expert of a call of 'researcher'"):
    score([root(), call()], rules=rules)


@pytest.mark.parametrize(
    "fields, answered, well_formed",
    [
        ({}, True, True),
        ({"turns": (turn("malformed"), turn("answer"))}, True, False),
        ({"status": Status.TRUNCATED, "result_text": ""}, False, False),
        ({"status": Status.MALFORMED}, False, False),
        ({"result_text": " \n"}, False, False),
    ],
)
def test_formats(fields, answered, well_formed):
  assert grades.answered(root(**fields)) is answered
  assert grades.well_formed(root(**fields)) is well_formed


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, 1.0),
        ({"turns": ()}, 0.5),
        ({"turns": (visit("chile/government#capital"),)}, 0.5),
        ({"result_text": "Quito"}, 0.5),
        ({"result_text": "Quito", "turns": ()}, 0.0),
        # The right answer to another look-up than the one asked for.
        ({"result_text": "1,285,216 sq km", "turns": ()}, 0.0),
        ({"request": "area of Peru", "turns": ()}, 0.0),
        # A whole page counts where it shows the answer.
        ({"turns": (visit("peru/government", "Capital\nname: Lima"),)}, 1.0),
        ({"turns": (visit("peru/government", "Capital\nname: "),)}, 0.5),
        ({"turns": (visit("peru/govern", "name: Lima"),)}, 0.5),
        # An answer that never arrived.
        ({"status": Status.TRUNCATED}, 0.5),
    ],
)
def test_expert_grades_the_call_by_its_evidence(fields, expected):
  assert grade(TASK, call(**fields)) == expected


def test_reports_may_be_sentences():
  mentions = functools.partial(answers.mentions, max_words=40)
  sentence = call(result_text="The capital of Peru is Lima.")
  assert grade(TASK, sentence) == 0.5
  assert grade(TASK, sentence, matches=mentions) == 1.0


def test_what_opening_the_passage_is_worth_can_be_chosen():
  opened = call(result_text="Quito")
  assert grade(TASK, opened, opened_share=0.2) == 0.2
  reported = call(turns=())
  assert grade(TASK, reported, opened_share=0.2) == 0.8


def test_a_request_is_matched_to_the_nearest_look_up():
  assert grades.nearest_evidence(TASK, "the CAPITAL of Peru?") == (CAPITAL,)
  assert grades.nearest_evidence(TASK, "what area has Peru") == (AREA,)
  # A request that says nothing is graded by what was found at best.
  assert grades.nearest_evidence(TASK, "blah") == (CAPITAL, AREA)
  assert grade(TASK, call(request="blah")) == 1.0
  assert grade(task(), call()) == 0.0


@given(st.text(max_size=300), st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_graded(request, report):
  graded = grade(TASK, call(request=request, result_text=report))
  assert 0 <= graded <= 1


def test_callers_correctness_in_a_deeper_tree():
  tree = group(
      TASK,
      [
          root(result_text="Quito"),
          call(result_text="Lima"),
          call(number=1, parent=1, result_text="Cusco"),
          root(1, result_text="Lima"),
          call(1, parent=3, result_text="Cusco"),
      ],
      2,
  )
  rules = dataclasses.replace(RULES, correct_of=rewards.of_parent)
  scores = rewards.score(tree, weights=PAPER, rules=rules)
  np.testing.assert_array_equal(scores.correct, [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    "correct_of, asked",
    [
        (rewards.of_root, ["Cusco", "Quito"]),
        (rewards.of_parent, ["Cusco", "Lima", "Quito"]),
    ],
)
def test_only_calls_whose_correctness_counts_are_judged(correct_of, asked):
  judged = []

  def correct(text, accepted):
    judged.append(text)
    return None if text == "unsure" else answers.matches(text, accepted)

  tree = [
      root(result_text="Quito"),
      call(result_text="Lima"),
      call(number=1, parent=1, result_text="unsure"),  # nobody counts it
      root(1, result_text="Cusco"),
  ]
  rules = dataclasses.replace(RULES, correct=correct, correct_of=correct_of)
  scores = score(tree, 2, rules=rules)
  assert sorted(judged) == asked
  np.testing.assert_array_equal(scores.weight, 1)


def test_calls_are_sorted_by_task_rollout_and_order():
  first = group(
      TASK, [root(0), call(0), call(0, 1, result_text="Quito"), root(1)], 2
  )
  second = group(
      TASK,
      [root(0), call(0, status=Status.FAILED), root(1), call(1, parent=2)],
      2,
  )
  groups = (first, second)
  scores = [rewards.score(g, weights=PAPER, rules=RULES) for g in groups]
  found = rewards.by_role(
      groups, scores, max_calls={"researcher": 3, "main": 1}
  )
  table, main = found["researcher"], found["main"]
  np.testing.assert_array_equal(table.num_calls, [[2, 0], [0, 1]])
  assert table.positions == (((1, 2), ()), ((), (3,)))
  assert table.calls[0][0][1] is first.trajectories[2]
  np.testing.assert_allclose(
      table.rewards, [[[1, 0.75, 0], [0] * 3], [[0] * 3, [1, 0, 0]]], rtol=1e-6
  )
  np.testing.assert_array_equal(main.num_calls, [[1, 1], [0, 1]])
  with pytest.raises(ValueError, match="max_calls must be at least 2"):
    rewards.by_role(groups, scores, max_calls={"researcher": 1})


def test_attempts_keep_the_number_of_their_sub_task():
  calls = [root()] + [
      call(0, number, attempt=number % 2, request=f"part {number // 2}")
      for number in range(6)
  ]

  def expert(one, trajectory):  # the judge failed on a first attempt
    return None if trajectory.call == 2 else 1.0

  rules = dataclasses.replace(RULES, expert=expert)
  tree = group(TASK, calls, 1)
  scores = rewards.score(tree, weights=PAPER, rules=rules)
  sorted_out = rewards.by_role([tree], [scores], max_calls={"researcher": 6})
  found = sorted_out["researcher"]
  assert found.num_calls.tolist() == [[5]]
  assert found.subtasks.tolist() == [[[0, 0, 1, 2, 2, -1]]]


def test_bad_input_is_named():
  with pytest.raises(ValueError, match=r"\['researcher'\]"):
    score([root(), call()], weights={"main": PAPER["main"]})
  with pytest.raises(ValueError, match="expert must be >= 0, got nan"):
    rewards.RewardWeights(
        format=0.1, correct=0.1, expert=float("nan"), overlong=0.0
    )
  groups = [group(TASK, [root()], k) for k in (1, 2)]
  scores = [rewards.score(g, weights=PAPER, rules=RULES) for g in groups]
  with pytest.raises(ValueError, match=r"same number of rollouts, got \[1, 2"):
    rewards.by_role(groups, scores, max_calls={"main": 1})
