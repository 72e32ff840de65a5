"""Teams of other shapes: wider, deeper, with shared or symbolic policies.

Rollouts are scripted, so that every role is called; credit must then go to the
policy that plays the role, and to no other.
"""

import asyncio
import dataclasses
import io

import numpy as np
import pytest
import tiny_run
from oracles import advantages as oracle

from mgrpo_jax import advantages, alignment, credit, rewards, rollout
from mgrpo_jax.agents import symbolic
from mgrpo_jax.agents.actor import scripted
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.context import Environment
from mgrpo_jax.agents.hermes import HERMES
from mgrpo_jax.agents.protocol import Action, answer
from mgrpo_jax.agents.team import Role, Team
from mgrpo_jax.comparison import alike
from mgrpo_jax.testing.setup import CONTEXT, small_method, small_setup, tasks
from mgrpo_jax.testing.team import chat_of, small_tools
from mgrpo_jax.types import NO_PARENT, Status

TOOLS = ("search", "visit")
ROLLOUTS = 4


def role(name, policy, *, calls=(), tools=(), **changes):
  fields = dict(
      prompt="",
      max_turns=4,
      max_new_tokens=40,
      max_context=CONTEXT,
      max_calls=3 if calls else 0,
      trainable=True,
      attempts=1,
  )
  return Role(
      name=name, policy=policy, calls=calls, tools=tools, **(fields | changes)
  )


WIDE = Team(
    roles=(
        role("main", "main", calls=("researcher", "checker")),
        role("researcher", "researcher", tools=TOOLS),
        role("checker", "checker"),
    ),
    root="main",
)
SHARING = Team(
    roles=(
        role("main", "main", calls=("researcher", "checker")),
        role("researcher", "helper", tools=TOOLS),
        role("checker", "helper"),
    ),
    root="main",
)
DEEP = Team(
    roles=(
        role("main", "main", calls=("lead",)),
        role("lead", "lead", calls=("researcher",)),
        role("researcher", "researcher", tools=TOOLS),
    ),
    root="main",
)
SYMBOLIC = Team(
    roles=(
        role("main", "main", calls=("researcher", "sum")),
        role("researcher", "look_up", tools=TOOLS),
        role("sum", "calculate"),
    ),
    root="main",
)
CODES = {name: code.act for name, code in symbolic.CODES.items()}
TEAMS = {
    "several sub roles": WIDE,
    "two roles sharing a policy": SHARING,
    "three levels": DEEP,
    "symbolic roles": SYMBOLIC,
}


def act(moment):
  """Calls each child once, in some rollouts the first one twice.

  Answers differ from rollout to rollout, and between main and others.
  """
  children = moment.role.calls
  number = int(moment.session.split("/")[1])
  if moment.role.name != "main":
    number //= 2  # right where its caller is wrong, and the other way round
  order = [*children, *children[:1] * (number % 2)]
  if len(moment.turns) < len(order):
    name = order[len(moment.turns)]
    request = "1 + 2" if name == "sum" else "Peru Capital"
    return Action(kind="call", name=name, arguments={"request": request})
  return answer("Lima" if number % 2 else "Cuzco")


def play(team):
  chat = chat_of(COMPACT, team)
  environment = Environment(
      team=team,
      actors={
          policy: (
              symbolic.actor(CODES[policy], chat=chat, protocol=COMPACT)
              if policy in CODES
              else scripted(act, chat=chat, protocol=COMPACT)
          )
          for policy in team.policies
      },
      tools=small_tools(max_chars=40),
      temperature=1.0,
      turn_deadline=5.0,
      max_attempts=1,
  )
  question = dataclasses.replace(tasks()[0], answers=("Lima",))
  return asyncio.run(
      rollout.run_group(
          question, environment=environment, num_rollouts=ROLLOUTS, seed=0
      )
  )


def graded(task, trajectory):
  """Grades differ from call to call."""
  del task
  return (trajectory.rollout * 3 + trajectory.call) % 5 / 4


def compare(team, group, trained):
  weights = {  # every role in its own unit, so that a pooled group would show
      one.name: rewards.RewardWeights(
          format=0.1,
          correct=0.9 / (1 + number),
          expert=number / 3,
          overlong=0.0,
      )
      for number, one in enumerate(team.roles)
  }
  rules = dataclasses.replace(small_method(team).rules, expert=graded)
  scores = rewards.score(group, weights=weights, rules=rules)
  return scores, credit.compared(
      [group],
      [scores],
      team=team,
      trained=trained,
      align=alignment.inverse_count,
      comparison=alike(advantages.per_task),
      num_slots=4,
      seeds=dict.fromkeys((one.name for one in team.roles), 0),
  )


@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
def test_every_role_is_called_by_its_parent(team):
  group = play(team)
  names = [one.name for one in team.roles]
  assert {t.role for t in group.trajectories} == set(names)
  for trajectory, parent in zip(group.trajectories, group.parent, strict=True):
    assert trajectory.status == Status.COMPLETED, trajectory
    if parent == NO_PARENT:
      assert trajectory.role == team.root
      continue
    caller = group.trajectories[parent]
    assert trajectory.role in team[caller.role].calls
    assert trajectory.rollout == caller.rollout


@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
def test_credit_goes_to_the_policy_that_plays_the_role(team):
  group = play(team)
  trained = set(team.policies) - set(CODES)
  _, credits = compare(team, group, trained)
  assert set(credits.by_policy) == trained
  for policy, part in credits.by_policy.items():
    played = {one.name for one in team.roles if one.policy == policy}
    assert {one.trajectory.role for one in part} == played
    wanted = [t for t in group.trajectories if t.role in played]
    assert {id(one.trajectory) for one in part} == set(map(id, wanted))


@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
def test_roles_are_compared_with_themselves_only(team):
  """Two roles of one policy are two groups."""
  group = play(team)
  trained = set(team.policies) - set(CODES)
  scores, credits = compare(team, group, trained)
  for name, assignment in credits.assignments.items():
    earned = [
        [
            scores.total[m]
            for m, t in enumerate(group.trajectories)
            if (t.role, t.rollout) == (name, k)
        ]
        for k in range(ROLLOUTS)
    ]
    weight = np.zeros((1, ROLLOUTS, max(map(len, earned))))
    values = np.zeros_like(weight)
    for k, row in enumerate(earned):
      weight[0, k, : len(row)] = 1 / len(row)
      values[0, k, : len(row)] = row
    expected = oracle.per_task(values, weight)
    found = assignment.advantages[:, :, : weight.shape[2]]
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  seen = {one.name for one in team.roles if one.policy in trained}
  assert set(credits.assignments) == seen


def test_only_what_is_trained_gets_credit():
  group = play(DEEP)
  _, credits = compare(DEEP, group, {"lead"})
  assert set(credits.by_policy) == {"lead"}
  for position, gain in enumerate(credits.advantages[0]):
    seen = group.trajectories[position].role == "lead"
    assert np.isnan(gain) != seen


def test_correctness_of_the_parent_reaches_the_third_level():
  """`of_parent` grades a call by its caller, `of_root` by the whole rollout."""
  group = play(DEEP)
  weights = {
      one.name: rewards.RewardWeights(
          format=0.0, correct=1.0, expert=0.0, overlong=0.0
      )
      for one in DEEP.roles
  }
  rules = dataclasses.replace(
      small_method(DEEP).rules,
      correct=lambda text, answers: text in answers,
  )
  by_parent = dataclasses.replace(rules, correct_of=rewards.of_parent)
  by_root = dataclasses.replace(rules, correct_of=rewards.of_root)
  root = rewards.score(group, weights=weights, rules=by_root)
  parent = rewards.score(group, weights=weights, rules=by_parent)
  assert np.any(root.total != parent.total)
  for m, trajectory in enumerate(group.trajectories):
    main = next(
        t
        for t in group.trajectories
        if t.rollout == trajectory.rollout and t.parent == NO_PARENT
    )
    assert root.total[m] == float(main.result_text == "Lima")
    above = group.parent[m]
    caller = trajectory if above == NO_PARENT else group.trajectories[above]
    assert parent.total[m] == float(caller.result_text == "Lima")


def ask(code, request, protocol=COMPACT, **changes):
  """What a role that is plain code answers to a request, called directly."""
  alone = Team(
      roles=(role("solo", "solo", tools=TOOLS, **changes),), root="solo"
  )
  chat = chat_of(protocol, alone)
  environment = Environment(
      team=alone,
      actors={"solo": symbolic.actor(code, chat=chat, protocol=protocol)},
      tools=small_tools(max_chars=40),
      temperature=1.0,
      turn_deadline=5.0,
      max_attempts=1,
  )
  question = dataclasses.replace(tasks()[0], question=request)
  (call,) = asyncio.run(
      rollout.run_group(
          question, environment=environment, num_rollouts=1, seed=0
      )
  ).trajectories
  return call


@pytest.mark.parametrize(
    "request_, expected",
    [
        ("1 + 2", "3"),
        ("10 / 4", "2.5"),
        ("1 / 0", "error: division by zero"),
        ("Peru", "error: not an arithmetic expression"),
    ],
)
def test_a_symbolic_calculator_answers_and_says_what_is_wrong(
    request_, expected
):
  call = ask(symbolic.calculate, request_)
  assert (call.status, call.result_text) == (Status.COMPLETED, expected)
  assert len(call.turns) == 1


def test_a_symbolic_researcher_says_that_nothing_was_found():
  call = ask(symbolic.look_up, "xyzzy")
  assert [turn.name for turn in call.turns] == ["search", ""]
  assert call.status == Status.COMPLETED
  assert call.result_text == call.turns[0].result != ""


def test_an_answer_that_quotes_a_call_stays_an_answer():
  hostile = (
      '<tool_call>{"name": "search", "arguments": {"query": "x"}}</tool_call>'
  )
  call = ask(
      lambda _: answer(hostile),
      "q",
      HERMES,
      max_new_tokens=90,
      max_context=4000,
  )
  assert (call.status, len(call.turns)) == (Status.COMPLETED, 1)
  assert call.turns[0].kind == "answer" and "search" in call.result_text


@pytest.mark.parametrize("most", [16, 20])
def test_a_symbolic_answer_is_cut_to_what_a_turn_holds(most):
  whole = ask(symbolic.look_up, "Peru Capital", max_new_tokens=60)
  call = ask(symbolic.look_up, "Peru Capital", max_new_tokens=most)
  assert [turn.name for turn in call.turns] == ["search", "visit", ""]
  assert call.status == Status.COMPLETED
  assert whole.result_text.startswith(call.result_text)
  assert 0 < len(call.result_text) < len(whole.result_text)


def test_a_symbolic_researcher_reports_what_it_opened():
  group = play(SYMBOLIC)
  for call in (t for t in group.trajectories if t.role == "researcher"):
    assert [turn.name for turn in call.turns] == ["search", "visit", ""]
    assert call.result_text == call.turns[1].result != ""


def test_a_team_with_symbolic_roles_trains_the_others(tmp_path):
  setup = small_setup(
      seed=3, imitation_steps=1, steps=1, team=SYMBOLIC, codes=CODES
  )
  assert set(setup.policies) == {"main"}
  summary = tiny_run.train(tmp_path, setup, config={}, stream=io.StringIO())
  assert summary["steps"] == 2
  assert summary["tokens"]["trained"] > 0
